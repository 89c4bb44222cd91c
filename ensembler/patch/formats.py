"""Read a patch folder by its headers: a PEFT LoRA, deltas written by `extract` beside or instead of it. No torch.

adapter_config.json, adapter_model.safetensors   a LoRA as PEFT writes it
deltas.safetensors                               full deltas under the tensor names of the model
patch.json                                       how `extract` made this
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ensembler.errors import PatchError, UnsupportedPatchError
from ensembler.files import read_json
from ensembler.safetensors_files import FLOATS, StoredTensor, listed, stored_tensors

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_PICKLE = "adapter_model.bin"
DELTAS = "deltas.safetensors"
RECORD = "patch.json"
PATCH_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_PICKLE, DELTAS, RECORD)
PEFT_PREFIX = "base_model.model."

# Keys of an adapter's configuration that leave its arithmetic alone, or that are obeyed here.
_KNOWN_KEYS = {
    *("alpha_pattern", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out", "init_lora_weights"),
    *("layers_pattern", "layers_to_transform", "lora_alpha", "modules_to_save", "peft_type", "r", "rank_pattern"),
    *("target_modules", "use_rslora", "auto_mapping", "inference_mode", "lora_dropout", "megatron_core"),
    *("ensure_weight_tying", "eva_config", "peft_version", "qalora_group_size", "revision", "runtime_config"),
    *("task_type",),
}
# Ways to start a LoRA that leave the base's weights as they are; the others (pissa, olora ...) change them.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_UNSET: tuple[object, ...] = (None, False, "", [], {})
_FACTORS = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_embedding_A": "lora_embedding_A",
    ".lora_embedding_B": "lora_embedding_B",
}


@dataclass(frozen=True)
class LowRank:
    """Δ = scale · B A, with A (r, in) and B (out, r) on disk; `transposed`: the weight lies as (in, out).

    An embedding's weight (tokens, width) is the transposed case too, with A (r, tokens) and B (width, r).
    """

    a: StoredTensor
    b: StoredTensor
    scale: float
    transposed: bool

    @property
    def is_embedding(self) -> bool:
        return "lora_embedding" in self.a.name

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight that this is added to."""
        rows, columns = self.b.shape[0], self.a.shape[1]
        return (columns, rows) if self.transposed else (rows, columns)


@dataclass(frozen=True)
class Patch:
    """Δθ by tensor name, to be added `scale` times: LoRA factors, full deltas, and `replaced` values.

    PEFT saves modules_to_save and trained biases as values that stand instead of the model's, not as deltas. `targets`
    are the modules that the adapter's configuration says it changes (None: it does not say), `base` the model it was
    made for.
    """

    folder: Path
    low_rank: Mapping[str, LowRank]
    full: Mapping[str, StoredTensor]
    replaced: Mapping[str, StoredTensor]
    base: str | None
    base_fingerprint: str | None
    targets: tuple[str, ...] | str | None
    notes: tuple[str, ...]
    scale: float = 1.0

    @property
    def names(self) -> set[str]:
        return {*self.low_rank, *self.full, *self.replaced}

    @property
    def files(self) -> list[Path]:
        """The weights files of the patch."""
        return [path for name in (ADAPTER_WEIGHTS, ADAPTER_PICKLE, DELTAS) if (path := self.folder / name).is_file()]

    def oriented(self, is_transposed: Callable[[str], bool]) -> Patch:
        """Return the patch with its factors turned as the layers are whose weights `is_transposed` knows by name.

        PEFT goes by the kind of each layer too: where a LoRA has layers of both kinds, the one fan_in_fan_out that it
        saves is that of the last layer.
        """
        low_rank = {
            name: factors if factors.is_embedding else replace(factors, transposed=is_transposed(name))
            for name, factors in self.low_rank.items()
        }
        return replace(self, low_rank=low_rank)


def read_patch(folder: Path, *, scale: float = 1.0, allow_pickle: bool = False) -> Patch:
    """Return the patch in `folder`, from headers alone (a pickle is loaded, and only where it is allowed).

    Raises PatchError where there is no patch or a damaged one, UnsupportedPatchError for a kind that cannot be added to
    weights, MemberError for a weights file that is not whole.
    """
    if not folder.is_dir():
        raise PatchError(f"there is no folder {folder}; give a PEFT LoRA folder, or one that `patch extract` made")
    if not math.isfinite(scale):
        raise PatchError(f"the scale of {folder} is {scale}; expected a finite number")
    record = read_json(folder / RECORD, PatchError) if (folder / RECORD).is_file() else {}
    low_rank: dict[str, LowRank] = {}
    replaced: dict[str, StoredTensor] = {}
    notes: tuple[str, ...] = ()
    config: dict[str, Any] = {}
    if (folder / ADAPTER_CONFIG).is_file():
        config = read_json(folder / ADAPTER_CONFIG, PatchError)
        _check_config(folder, config)
        low_rank, replaced, notes = _read_lora(folder, config, _adapter_tensors(folder, allow_pickle=allow_pickle))
    full = stored_tensors(folder / DELTAS) if (folder / DELTAS).is_file() else {}
    if not low_rank and not replaced and not full:
        below = sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_CONFIG}"))
        hint = f"; its folders {listed(below)} hold one, name one of them" if below else ""
        raise PatchError(
            f"{folder} holds no patch; expected {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} (a PEFT LoRA), or {DELTAS} "
            f"(made by `patch extract`){hint}"
        )
    both = sorted(full.keys() & {*low_rank, *replaced})
    if both:
        raise PatchError(f"{folder}: {both[0]} is in the LoRA and in {DELTAS}; keep one")
    for name, tensor in {**full, **replaced}.items():
        _check_float(folder, name, tensor)
    base = record.get("base") or config.get("base_model_name_or_path") or None
    fingerprint = record.get("base_fingerprint")
    return Patch(folder, low_rank, full, replaced, base, fingerprint, _targets(config), notes, scale)


def named_base(folder: Path) -> str | None:
    """Return the base model that an adapter's configuration or a patch's record names; raise PatchError if damaged."""
    for name, key in ((ADAPTER_CONFIG, "base_model_name_or_path"), (RECORD, "base")):
        if (folder / name).is_file():
            return read_json(folder / name, PatchError).get(key) or None
    return None


def _check_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise UnsupportedPatchError for a kind, or a key, that would change the arithmetic."""
    kind, start = config.get("peft_type"), config.get("init_lora_weights", True)
    unknown = {key: value for key, value in config.items() if key not in _KNOWN_KEYS}
    reasons = [f"uses {key}={value!r}, which is not supported" for key, value in unknown.items() if value not in _UNSET]
    if kind != "LORA":
        reasons = [f"is of kind {kind!r}; only LORA is a sum with the weights"]
    elif config.get("use_dora"):
        reasons = ["is a DoRA (use_dora), whose update depends on the base's norms"]
    elif start not in _PLAIN_STARTS:
        reasons = [f"was started with init_lora_weights={start!r}, which changes the base's weights"]
    if reasons:
        raise UnsupportedPatchError(f"{folder} {reasons[0]}; give a plain LoRA, or convert it to one with PEFT first")


def _targets(config: Mapping[str, Any]) -> tuple[str, ...] | str | None:
    value = config.get("target_modules")
    is_restricted = any(config.get(key) is not None for key in ("layers_to_transform", "exclude_modules"))
    if value is None or value == "all-linear" or is_restricted:
        return None
    return value if isinstance(value, str) else tuple(value)


def _adapter_tensors(folder: Path, *, allow_pickle: bool) -> dict[str, StoredTensor]:
    """Return the tensors of an adapter's weights file; those of a pickle are held in memory."""
    if (folder / ADAPTER_WEIGHTS).is_file():
        return stored_tensors(folder / ADAPTER_WEIGHTS)
    pickle = folder / ADAPTER_PICKLE
    if not pickle.is_file():
        raise PatchError(f"{folder} has {ADAPTER_CONFIG} and no {ADAPTER_WEIGHTS}; fetch it again")
    if not allow_pickle:
        raise PatchError(
            f"{pickle} is a pickle file, which can run code when it is read; convert it to safetensors, or add it to "
            "its model with: ensembler patch apply --allow-pickle"
        )
    import torch

    dtypes = {getattr(torch, name): word for name, word in FLOATS.items()}
    try:
        state = torch.load(pickle, map_location="cpu", weights_only=True)  # torch's reader still refuses code
        return {
            name: StoredTensor(
                name, pickle, dtypes.get(t.dtype, str(t.dtype)), tuple(t.shape), 0, t.nbytes, t.contiguous()
            )
            for name, t in state.items()
        }
    except Exception as error:  # pickle and torch raise what they like for a file they cannot or will not read
        raise PatchError(f"{pickle} cannot be read: {' '.join(str(error).split())[:200]}") from error


def _read_lora(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> tuple[dict[str, LowRank], dict[str, StoredTensor], tuple[str, ...]]:
    """Return factors by the name of their weight, replaced values, and notes on tensors that are not additions."""
    factors: dict[str, dict[str, StoredTensor]] = {}
    replaced, carried, notes = {}, [], []
    for name, tensor in tensors.items():
        path = name.removeprefix(PEFT_PREFIX)
        ending = next((ending for ending in _FACTORS if path.endswith(ending)), None)
        if ending is not None:
            factors.setdefault(path.removesuffix(ending), {})[_FACTORS[ending]] = tensor
        elif "lora_" in path or "token_adapter" in path:
            raise UnsupportedPatchError(f"{folder} holds {name}, which is not supported; give a plain LoRA")
        elif path.endswith(".base_layer.weight"):
            carried.append(path.removesuffix(".base_layer.weight"))
        else:
            replaced[path.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = tensor
    if carried:
        notes.append(f"the base's own {listed(carried)}, which the patch carries along, is left out")
    if replaced:
        notes.append(
            f"{listed(replaced)}: trained as a whole (modules_to_save, bias), so it replaces the model's own value"
        )
    low_rank = {f"{module}.weight": _low_rank(folder, config, module, pair) for module, pair in factors.items()}
    return low_rank, replaced, tuple(notes)


def _low_rank(folder: Path, config: Mapping[str, Any], module: str, pair: Mapping[str, StoredTensor]) -> LowRank:
    is_embedding = any("embedding" in name for name in pair)
    first, second = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A", "lora_B")
    for name in (first, second):
        if name not in pair:
            raise PatchError(f"{folder}: {module} has no {name}; fetch the patch again")
        _check_float(folder, module, pair[name])
    a, b = pair[first], pair[second]
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or a.shape[0] == 0:
        raise UnsupportedPatchError(
            f"{folder}: {module} has {first} of shape {a.shape} and {second} of shape {b.shape}; expected (r, in) and "
            "(out, r) of a linear layer or an embedding"
        )
    transposed = is_embedding or bool(config.get("fan_in_fan_out"))
    return LowRank(a, b, _scale(folder, config, module, a.shape[0]), transposed)


def _scale(folder: Path, config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return α / r, or α / √r for rslora, with the patterns that PEFT matches against the end of a module's name."""

    def configured(default: str, pattern: str) -> float:
        try:
            for key, value in (config.get(pattern) or {}).items():
                if re.match(rf"(.*\.)?({key})$", module):
                    return float(value)
            return float(config[default])
        except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
            raise PatchError(f"{folder}/{ADAPTER_CONFIG}: {default} or {pattern} is damaged; mend it") from error

    expected = configured("r", "rank_pattern")
    if expected != rank:
        raise PatchError(f"{folder}: {module} has rank {rank}; {ADAPTER_CONFIG} says {expected:g}; mend it")
    return configured("lora_alpha", "alpha_pattern") / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _check_float(folder: Path, name: str, tensor: StoredTensor) -> None:
    if tensor.dtype not in FLOATS.values():
        raise UnsupportedPatchError(
            f"{folder}: {name} is stored as {tensor.dtype}; expected one of {', '.join(FLOATS)}"
        )
