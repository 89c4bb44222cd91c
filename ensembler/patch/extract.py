"""Make a patch from two models: Δθ_i = θ_i - θ, matrix by matrix, as a LoRA that PEFT reads.

What no LoRA holds (norms, biases, an embedding that is also the output head) is kept beside it in full: PEFT alone
would drop it, `apply` adds it. With `full`, every delta is kept (Param-Δ, arXiv 2504.21023; chat vectors, arXiv
2310.04799).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ensembler import __version__
from ensembler.errors import ConfigError, PatchError
from ensembler.files import check_not_input, other_tokenizer
from ensembler.patch.addition import DTYPES, read_tensor
from ensembler.patch.apply import make_header, new_folder
from ensembler.patch.formats import ADAPTER_WEIGHTS, DELTAS, PEFT_PREFIX, RECORD
from ensembler.patch.model_layout import ModelLayout, read_layouts
from ensembler.patch.patch_device import CPU, memory_of
from ensembler.patch.patch_plan import resize_command
from ensembler.patch.peft_check import why_not_read_by_peft
from ensembler.patch.schemes.quantization_settings import quantization_of
from ensembler.patch.singular_values import Svd, is_exact, truncate
from ensembler.safetensors_files import FLOATS, StoredModel, StoredTensor, listed, read_model

_BATCH_ELEMENTS = 2**25  # deltas that a GPU decomposes together: 128 MiB in fp32, and three times that for the result
_HEADER_BYTES = 160  # of one tensor beside its name: dtype, shape and offsets, with room to spare
_ENDINGS = {
    "linear": (".lora_A.weight", ".lora_B.weight"),
    "transposed": (".lora_A.weight", ".lora_B.weight"),
    "embedding": (".lora_embedding_A", ".lora_embedding_B"),
}


@dataclass(frozen=True)
class KeptDelta:
    """The kept part of one tensor's delta: `rank` of the factors (None: in full), `norm` ‖Δ‖_F of the whole delta.

    `bound` is that of `Truncated`: None where the delta was not decomposed at random.
    """

    name: str
    rank: int | None
    energy: float
    norm: float
    bound: float | None = None


@dataclass(frozen=True)
class Extracted:
    """An extraction: tensors that differ, the number that do not, the share of all energy that is kept.

    `why_not_peft`: why PEFT cannot load the LoRA, which `patch apply` reads all the same; None where it can. `files`:
    the tokenizer of the fine-tuned model, which is not its base's, copied beside the patch.
    """

    out: Path
    kept: tuple[KeptDelta, ...]
    num_equal: int
    why_not_peft: str | None = None
    files: tuple[str, ...] = ()

    @property
    def energy(self) -> float:
        """Σ kept ‖Δ‖_F² over Σ ‖Δ‖_F²."""
        total = sum(kept.norm**2 for kept in self.kept)
        return sum(kept.energy * kept.norm**2 for kept in self.kept) / total

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the patch's record and of --json."""
        kept = [asdict(kept) for kept in self.kept]
        return {"energy": self.energy, "num_equal": self.num_equal, "why_not_peft": self.why_not_peft, "kept": kept}


def extract_patch(
    base: Path,
    finetuned: Path,
    out: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    full: bool = False,
    dtype: str = "float32",
    overwrite: bool = False,
    device: torch.device = CPU,
    advance: Callable[[int], None] | None = None,
) -> Extracted:
    """Write Δ = finetuned - base to the new folder `out`; give one of `rank`, `energy` (0 to 1] and `full`.

    `dtype` is that of the factors and deltas; `overwrite` replaces an earlier result; `device` computes. Raises
    PatchError for models whose tensors or shapes differ, ConfigError, MemberError, OutputError before anything is
    written; RunError when the disk is full.
    """
    _check_limit(rank, energy, full)
    check_not_input(out, base, finetuned)
    old, new = read_model(base), read_model(finetuned)
    layout = read_layouts(old)[0]
    old, new = (replace(model, tensors=_needed(model, other, layout)) for model, other in ((old, new), (new, old)))
    _check_versions(old, new, layout)
    torch_dtype = DTYPES[FLOATS[dtype]]
    kinds = {} if full else _low_rank_kinds(old, layout)
    modules = {disk: name for name, disk in layout.stored.items()}  # PEFT goes by names in the loaded model
    modules = {name: modules.get(name, name).removesuffix(".weight") for name in kinds}
    factor_names = [f"{PEFT_PREFIX}{modules[name]}{ending}" for name in kinds for ending in _ENDINGS[kinds[name]]]
    num_bytes = sum(tensor.num_elements for tensor in new.tensors.values()) * torch_dtype.itemsize if full else 0
    kept: list[KeptDelta] = []
    with new_folder(out, num_bytes, overwrite=overwrite) as made:
        with (
            _safetensors_writer(made / ADAPTER_WEIGHTS, factor_names) as add_factor,
            _safetensors_writer(made / DELTAS, old.tensors) as add_delta,
            memory_of(device),
        ):
            for name, delta, whole in _decomposed(old, new, kinds, device, advance):
                norm = delta.double().norm().item()
                if name in kinds:
                    kind = kinds[name]
                    matrix = delta if kind == "linear" else delta.T
                    found = truncate(matrix, rank=rank, energy=energy, whole=whole)
                    for ending, factor in zip(_ENDINGS[kind], (found.right, found.left), strict=True):
                        add_factor(f"{PEFT_PREFIX}{modules[name]}{ending}", factor.to(torch_dtype))
                    kept.append(KeptDelta(name, found.left.shape[1], found.energy, norm, found.bound))
                else:
                    add_delta(name, delta.reshape(new.tensors[name].shape).to(torch_dtype))
                    kept.append(KeptDelta(name, None, 1.0, norm))
        if not kept:
            raise PatchError(f"{finetuned} and {base} have the same weights; there is nothing to extract")
        extracted = Extracted(out, tuple(kept), len(new.tensors) - len(kept), files=_copy_tokenizer(old, new, made))
        ranks = {modules[each.name]: each.rank for each in kept if each.rank is not None}
        if ranks:
            write_lora_config(made, old, ranks, transposed="transposed" in kinds.values())
            extracted = replace(extracted, why_not_peft=why_not_read_by_peft(made, old.folder))
        _write_record(made, extracted, old, new)
    return extracted


def _decomposed(
    old: StoredModel,
    new: StoredModel,
    kinds: Mapping[str, str],
    device: torch.device,
    advance: Callable[[int], None] | None,
) -> Iterator[tuple[str, Tensor, Svd | None]]:
    """Yield (name, Δ, all its singular values where they are known) of tensors that differ.

    A GPU decomposes small matrices of one shape together, those of all layers for example.
    """
    for names in _batches(new, kinds, device):
        deltas = {}
        for name in names:
            delta = _difference(old.tensors[name], new.tensors[name], device)
            if delta is not None:
                deltas[name] = delta
            if advance is not None:
                advance(new.tensors[name].num_bytes)
        if len(deltas) < 2:
            yield from ((name, delta, None) for name, delta in deltas.items())
            continue
        turned = [delta if kinds[name] == "linear" else delta.T for name, delta in deltas.items()]
        svd = torch.linalg.svd(torch.stack(turned), full_matrices=False)
        for (name, delta), left, values, right in zip(deltas.items(), *svd, strict=True):
            yield name, delta, (left, values, right)


def _batches(new: StoredModel, kinds: Mapping[str, str], device: torch.device) -> Iterator[list[str]]:
    """Yield the names of tensors to decompose together: on a CPU one by one, in the order of the files."""
    batches: dict[tuple[object, ...], list[str]] = {}
    for name, stored in new.tensors.items():
        if device.type == "cpu" or name not in kinds or not is_exact(stored.matrix):
            yield [name]
            continue
        batch = batches.setdefault((kinds[name], stored.matrix), [])
        batch.append(name)
        if (len(batch) + 1) * stored.num_elements > _BATCH_ELEMENTS:
            yield batches.pop((kinds[name], stored.matrix))
    yield from batches.values()


def _copy_tokenizer(old: StoredModel, new: StoredModel, made: Path) -> tuple[str, ...]:
    """Copy the tokenizer of the fine-tuned model beside the patch where it differs from its base's; return its files.

    As beside a LoRA that was trained, a member with the patch then reads texts as the fine-tuned model does.
    """
    names = other_tokenizer(new.folder, old.folder)
    for name in names:
        shutil.copyfile(new.folder / name, made / name)
    return tuple(names)


def _check_limit(rank: int | None, energy: float | None, full: bool) -> None:
    if (rank is not None) + (energy is not None) + full != 1:
        raise ConfigError("one of rank, energy and full says how much is kept; give exactly one")
    if rank is not None and rank < 1:
        raise ConfigError(f"the rank is {rank}; expected 1 or more")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"the energy is {energy:g}; expected a share above 0 and up to 1, such as 0.95")


def _check_versions(old: StoredModel, new: StoredModel, layout: ModelLayout) -> None:
    """Raise PatchError unless both have the same tensors in the same shapes, and both or neither are quantised."""
    for first, second in ((old, new), (new, old)):
        if quantization_of(first) and not quantization_of(second):
            raise PatchError(
                f"{first.folder} is quantised and {second.folder} is not; give both models in plain weights, before "
                "they were quantised"
            )
    for first, second in ((old, new), (new, old)):
        absent = sorted(first.tensors.keys() - second.tensors.keys())
        if absent:
            is_tied = any(layout.find(name) in layout.tied for name in absent)
            hint = (
                "give two that both tie their head, or both not" if is_tied else "give two versions of one architecture"
            )
            raise PatchError(f"{second.folder} has no {listed(absent)}, which the other model has; {hint}")
    for name, tensor in new.tensors.items():
        before = old.tensors[name]
        if tensor.shape != before.shape:
            hint = "; there is no difference to take, give two versions of one architecture and one vocabulary"
            if layout.find(name) in layout.token_weights and tensor.shape[1:] == before.shape[1:]:
                smaller, rows = (old, tensor.shape[0]) if tensor.shape > before.shape else (new, before.shape[0])
                command = resize_command(smaller.folder, rows)
                hint = f"; resize the smaller vocabulary first: {command}"
            raise PatchError(
                f"{name} has shape {tensor.shape} in {new.folder} and {before.shape} in {old.folder}{hint}"
            )
        if tensor.dtype != before.dtype and not {tensor.dtype, before.dtype} <= set(FLOATS.values()):
            raise PatchError(
                f"{name} is {tensor.dtype} in {new.folder} and {before.dtype} in {old.folder}; expected floats"
            )


def _needed(model: StoredModel, other: StoredModel, layout: ModelLayout) -> dict[str, StoredTensor]:
    """Return a model's tensors, without those that the other lacks where they are not loaded or copy a tied one."""
    shared = model.tensors.keys() & other.tensors.keys()
    needed = {}
    for name, tensor in model.tensors.items():
        loaded = layout.find(name)
        if name in shared:
            needed[name] = tensor
            continue
        others = [] if loaded is None else [each for each in layout.on_disk(loaded) if each in shared]
        is_copy = any(tensor.has_values_of(model.tensors[each]) for each in others)
        is_unused = layout.is_known and loaded is None and name not in layout.fused
        if not is_copy and not is_unused:
            needed[name] = tensor
    return needed


def _low_rank_kinds(base: StoredModel, layout: ModelLayout) -> dict[str, str]:
    """Return the tensors that a LoRA can hold, as the class has them: 'linear', 'transposed' or 'embedding'.

    Experts that are fused when they are loaded are linear layers on disk, and PEFT reads LoRAs of them.
    """
    names = [name for name in layout.stored if name not in layout.tied]
    if layout.is_known:
        kinds = {layout.stored[name]: layout.kinds[name] for name in names if name in layout.kinds}
    else:
        kinds = {layout.stored[name]: "linear" for name in names if name not in layout.token_weights}
    kinds |= dict.fromkeys(layout.fused, "linear")
    return {
        name: kind for name, kind in kinds.items() if len(base.tensors[name].shape) == 2 and name.endswith(".weight")
    }


def _difference(old: StoredTensor, new: StoredTensor, device: torch.device) -> Tensor | None:
    """Return new - old in fp32 as a matrix on a device, or None where the two are equal."""
    if old.dtype not in FLOATS.values():
        if not new.has_values_of(old):
            raise PatchError(
                f"{new.name} is {new.dtype} and differs; only floats have a difference that can be added: give both "
                "models in plain weights, before they were quantised"
            )
        return None
    delta = read_tensor(new, device=device).float() - read_tensor(old, device=device).float()
    if not torch.isfinite(delta).all():
        raise PatchError(f"{new.name} holds NaN or infinity in {new.file} or {old.file}; mend the model first")
    return delta if delta.any() else None


@contextmanager
def _safetensors_writer(path: Path, names: Iterable[str]) -> Iterator[Callable[[str, Tensor], None]]:
    """Yield a function that appends a float tensor to a file, which has room for a header of all `names`.

    The header is written last; a file that got no tensors is removed.
    """
    header_bytes = 64 + sum(len(json.dumps(name)) + _HEADER_BYTES for name in names)
    header_bytes += -header_bytes % 8
    words = {dtype: word for word, dtype in DTYPES.items()}
    entries: dict[str, Any] = {}
    with path.open("wb") as file:
        file.seek(header_bytes)

        def add(name: str, tensor: Tensor) -> None:
            flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))  # of stride 1
            start = file.tell() - header_bytes
            values: Any = flat.view(torch.uint8).numpy()
            file.write(values)
            offsets = [start, start + tensor.nbytes]
            entries[name] = {"dtype": words[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}

        yield add
        file.seek(0)
        file.write(make_header({"__metadata__": {"format": "pt"}, **entries}, length=header_bytes))
    if not entries:
        path.unlink()


def _write_record(made: Path, extracted: Extracted, old: StoredModel, new: StoredModel) -> None:
    """Write how this was made; its fingerprints know both models under any name."""
    # A hub id as it is, a folder by its path from the patch, so that both can be moved together.
    base = old.name if "/" in old.name else os.path.relpath(old.folder.resolve(), extracted.out.resolve())
    record = {
        "made_by": f"ensembler patch extract {__version__}",
        "base": base,
        "base_fingerprint": old.fingerprint(),
        "finetuned": new.name,
        "finetuned_fingerprint": new.fingerprint(),
        **extracted.to_dict(),
    }
    (made / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def write_lora_config(made: Path, base: StoredModel, ranks: Mapping[str, int], *, transposed: bool) -> None:
    """Write what PEFT needs to load the factors of modules with these ranks.

    It gets the commonest rank, patterns for the others, and α = r everywhere, so that the scale is 1; and the base by a
    name that can be loaded from any folder.
    """
    from peft import LoraConfig

    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {re.escape(module): other for module, other in ranks.items() if other != rank}
    LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.name if "/" in base.name else str(base.folder.resolve()),
        r=rank,
        lora_alpha=rank,
        rank_pattern=others,
        alpha_pattern=others,
        target_modules=sorted(ranks),
        fan_in_fan_out=transposed,
        inference_mode=True,
    ).save_pretrained(made)
