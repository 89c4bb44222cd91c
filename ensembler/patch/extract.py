"""Make a patch from two models: Δθ_i = θ_i - θ, matrix by matrix, as a LoRA that PEFT reads.

What no LoRA holds (norms, biases, an embedding that is also the output head) is kept beside it in full: PEFT alone
would drop it, `apply` adds it. With `full`, every delta is kept (Param-Δ, arXiv 2504.21023; chat vectors, arXiv
2310.04799).
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ensembler import __version__
from ensembler.errors import ConfigError, PatchError
from ensembler.patch.apply import new_folder
from ensembler.patch.changes import DTYPES, read_tensor
from ensembler.patch.formats import ADAPTER_WEIGHTS, DELTAS, PEFT_PREFIX, RECORD
from ensembler.patch.headers import FLOATS, StoredTensor, fingerprint, listed, model_tensors
from ensembler.patch.places import model_name
from ensembler.patch.plan import HEADS, has_turned_layers, is_tied, is_turned
from ensembler.patch.truncation import truncate
from ensembler.patch.writer import SafetensorsWriter

# Last names of embeddings: embed_tokens, embed_in, word_embeddings, tok_embeddings, wte, wpe ...
_EMBEDDING = re.compile(r"emb|^w[tp]e$")
_ENDINGS = {
    "linear": (".lora_A.weight", ".lora_B.weight"),
    "transposed": (".lora_A.weight", ".lora_B.weight"),
    "embedding": (".lora_embedding_A", ".lora_embedding_B"),
}


@dataclass(frozen=True)
class Kept:
    """The kept part of one tensor's delta: `rank` of the factors (None: in full), `norm` ‖Δ‖_F of the whole delta."""

    name: str
    rank: int | None
    energy: float
    norm: float


@dataclass(frozen=True)
class Extracted:
    """An extraction: tensors that differ, the number that do not, the share of all energy that is kept."""

    out: Path
    kept: tuple[Kept, ...]
    num_equal: int

    @property
    def energy(self) -> float:
        """Σ kept ‖Δ‖_F² over Σ ‖Δ‖_F²."""
        total = sum(kept.norm**2 for kept in self.kept)
        return sum(kept.energy * kept.norm**2 for kept in self.kept) / total

    def to_dict(self) -> dict[str, Any]:
        """For the patch's record and for --json."""
        return {"energy": self.energy, "num_equal": self.num_equal, "kept": [asdict(kept) for kept in self.kept]}


def extract_patch(
    base: Path,
    finetuned: Path,
    out: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    full: bool = False,
    dtype: str = "float32",
    advance: Callable[[int], None] | None = None,
) -> Extracted:
    """Write Δ = finetuned - base to the new folder `out`; give one of `rank`, `energy` (0 to 1] and `full`.

    `dtype` is that of the factors and deltas. Raises PatchError for models whose tensors or shapes differ, ConfigError,
    MemberError, OutputError before anything is written; RunError when the disk is full.
    """
    limit = _Limit(rank, energy, full)
    factor_dtype = DTYPES[FLOATS[dtype]]
    old, new = model_tensors(base), model_tensors(finetuned)
    _check(base, old, finetuned, new)
    kinds = {} if full else _kinds(base, old)
    factor_names = [f"{name}{ending}" for name, kind in kinds.items() for ending in _ENDINGS[kind]]
    kept = []
    with new_folder(
        out, sum(tensor.num_elements * factor_dtype.itemsize for tensor in new.values()) if full else 0
    ) as made:
        with (
            SafetensorsWriter(made / ADAPTER_WEIGHTS, factor_names) as factors,
            SafetensorsWriter(made / DELTAS, old) as deltas,
        ):
            for name, stored in new.items():
                delta = _delta(old[name], stored)
                if delta is not None and name in kinds:
                    kept.append(_keep_factors(factors, name, kinds[name], delta, limit, factor_dtype))
                elif delta is not None:
                    deltas.add(name, delta.reshape(stored.shape).to(factor_dtype))
                    kept.append(Kept(name, None, 1.0, delta.double().norm().item()))
                if advance is not None:
                    advance(stored.num_bytes)
        if not kept:
            raise PatchError(f"{finetuned} and {base} have the same weights; there is nothing to extract")
        extracted = Extracted(out, tuple(kept), len(new) - len(kept))
        if any(entry.rank is not None for entry in kept):
            _write_adapter_config(made, extracted, base, transposed="transposed" in kinds.values())
        _write_record(made, extracted, base, old, finetuned, new)
    return extracted


@dataclass(frozen=True)
class _Limit:
    """The part of a matrix that is kept: exactly one of the three."""

    rank: int | None
    energy: float | None
    full: bool

    def __post_init__(self) -> None:
        if (self.rank is not None) + (self.energy is not None) + self.full != 1:
            raise ConfigError("one of rank, energy and full says how much is kept; give exactly one")
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"the rank is {self.rank}; expected 1 or more")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ConfigError(f"the energy is {self.energy:g}; expected a share above 0 and up to 1, such as 0.95")


def _check(base: Path, old: Mapping[str, StoredTensor], finetuned: Path, new: Mapping[str, StoredTensor]) -> None:
    for first, second, folder in ((old, new, finetuned), (new, old, base)):
        absent = sorted(first.keys() - second.keys())
        if absent:
            raise PatchError(
                f"{folder} has no {listed(absent)}, which the other model has; give two versions of one architecture"
            )
    for name, tensor in new.items():
        if tensor.shape != old[name].shape:
            raise PatchError(
                f"{name} has shape {tensor.shape} in {finetuned} and {old[name].shape} in {base}; there is no "
                "difference to take, give two versions of one architecture and one vocabulary"
            )
        both = {tensor.dtype, old[name].dtype}
        if not both <= set(FLOATS.values()) and len(both) > 1:
            raise PatchError(
                f"{name} is {tensor.dtype} in {finetuned} and {old[name].dtype} in {base}; expected floats"
            )


def _kinds(base: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, str]:
    """The tensors that a LoRA can hold: 'linear', 'transposed' or 'embedding', told by shape, name and family."""
    turned = has_turned_layers(base)
    tied = is_tied(base, tensors)
    kinds = {}
    for name, tensor in tensors.items():
        module, _, last = name.rpartition(".")
        if len(tensor.shape) != 2 or last != "weight" or (name in HEADS and (tied or name != "lm_head.weight")):
            continue  # a head of another name has been renamed on its way to disk, and PEFT would not find it
        embedding = _EMBEDDING.search(module.rpartition(".")[2])
        if turned:
            if is_turned(name):
                kinds[name] = "transposed"
        elif not embedding:
            kinds[name] = "linear"
        elif not tied:
            kinds[name] = "embedding"
    return kinds


def _delta(old: StoredTensor, new: StoredTensor) -> Tensor | None:
    """The difference in fp32 as a matrix, or None where the two are equal."""
    if old.dtype not in FLOATS.values():
        if _raw(old) != _raw(new):
            raise PatchError(f"{new.name} is {new.dtype} and differs; only floats have a difference that can be added")
        return None
    delta = read_tensor(new).float() - read_tensor(old).float()
    if not torch.isfinite(delta).all():
        raise PatchError(f"{new.name} holds NaN or infinity in {new.file} or {old.file}; mend the model first")
    return delta if delta.any() else None


def _raw(stored: StoredTensor) -> bytes:
    with stored.file.open("rb") as file:
        file.seek(stored.start)
        return file.read(stored.num_bytes)


def _keep_factors(
    writer: SafetensorsWriter, name: str, kind: str, delta: Tensor, limit: _Limit, dtype: torch.dtype
) -> Kept:
    oriented = delta if kind == "linear" else delta.T
    left, right, energy = truncate(oriented, rank=limit.rank, energy=limit.energy)
    for ending, factor in zip(_ENDINGS[kind], (right, left), strict=True):
        writer.add(f"{PEFT_PREFIX}{name.removesuffix('.weight')}{ending}", factor.to(dtype))
    return Kept(name, left.shape[1], energy, delta.double().norm().item())


def _write_adapter_config(made: Path, extracted: Extracted, base: Path, *, transposed: bool) -> None:
    """As PEFT writes it: the commonest rank, patterns for the others, α = r everywhere, so that the scale is 1."""
    from peft import LoraConfig

    ranks = {kept.name.removesuffix(".weight"): kept.rank for kept in extracted.kept if kept.rank is not None}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {re.escape(module): other for module, other in ranks.items() if other != rank}
    LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=_recorded_name(base, extracted.out),
        r=rank,
        lora_alpha=rank,
        rank_pattern=others,
        alpha_pattern=others,
        target_modules=sorted(ranks),
        fan_in_fan_out=transposed,
        inference_mode=True,
    ).save_pretrained(made)


def _write_record(
    made: Path,
    extracted: Extracted,
    base: Path,
    old: Mapping[str, StoredTensor],
    finetuned: Path,
    new: Mapping[str, StoredTensor],
) -> None:
    """Say what the patch was made of; the fingerprints know both models again under any name."""
    record = {
        "made_by": f"ensembler patch extract {__version__}",
        "base": _recorded_name(base, extracted.out),
        "base_fingerprint": fingerprint(old.values()),
        "finetuned": model_name(finetuned),
        "finetuned_fingerprint": fingerprint(new.values()),
        **extracted.to_dict(),
    }
    (made / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _recorded_name(base: Path, out: Path) -> str:
    """A hub id as it is, a folder by its path from the patch, so that both can be moved together."""
    name = model_name(base)
    return name if "/" in name else os.path.relpath(base.resolve(), out.resolve())
