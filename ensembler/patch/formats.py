"""Read a patch folder by its headers: a PEFT LoRA, deltas written by `extract` beside or instead of it. No torch.

adapter_config.json, adapter_model.safetensors   a LoRA as PEFT writes it
deltas.safetensors                               full deltas under the tensor names of the model
patch.json                                       how `extract` made this
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from ensembler.errors import PatchError, UnsupportedPatchError
from ensembler.files import read_json
from ensembler.patch.lora_settings import LoraSettings
from ensembler.patch.low_rank import Held, LowRank, Pieces
from ensembler.safetensors_files import FLOATS, StoredTensor, listed, stored_tensors

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_PICKLE = "adapter_model.bin"
DELTAS = "deltas.safetensors"
RECORD = "patch.json"
PATCH_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_PICKLE, DELTAS, RECORD)
PEFT_PREFIX = "base_model.model."

_NOT_GATHERED = (
    "DeepSpeed ZeRO-3 or FSDP saved it before the weights were gathered; gather them and save the adapter again"
)
# What training puts around a model, by the name that this leaves in those of the tensors.
_WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "module": "DataParallel or DeepSpeed",
    "base_model.model": "a second PeftModel",
}
_WRAPPED = re.compile(
    r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|^(module)\.|"
    r"(?<=^base_model\.model\.)(module|base_model\.model)\."
)
_PEFT_LAYERS = re.compile(r"(\.token_adapter)?\.(base_layer|original_module)\.")  # around a layer of the base
_ADAPTER_NAME = re.compile(r"(lora_(?:embedding_)?[AB]|modules_to_save)\.default(?=\.|$)")
# Modules that PEFT trains whole for these tasks; its first versions did not write them down.
_TASK_HEADS = dict.fromkeys(("SEQ_CLS", "TOKEN_CLS"), ("classifier", "score")) | {"QUESTION_ANS": ("qa_outputs",)}

# Keys of an adapter's configuration that leave its arithmetic alone, or that are obeyed here.
_KNOWN_KEYS = {
    *("alpha_pattern", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out", "init_lora_weights"),
    *("layers_pattern", "layers_to_transform", "lora_alpha", "modules_to_save", "peft_type", "r", "rank_pattern"),
    *("target_modules", "use_rslora", "auto_mapping", "inference_mode", "lora_dropout", "megatron_core"),
    *("ensure_weight_tying", "eva_config", "peft_version", "qalora_group_size", "revision", "runtime_config"),
    *("target_parameters", "task_type"),
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
class Patch:
    """Δθ by tensor name, to be added `scale` times: LoRA factors, full deltas, and `replaced` values.

    PEFT saves modules_to_save and trained biases as values that stand instead of the model's, not as deltas; `carried`
    are the base's own beside them, which nothing trained and which are no part of the patch. `targets` are the modules
    that the adapter's configuration says it changes (None: it does not say), `base` the model it was made for.
    `pieces`: once the patch is fitted to a model, LoRAs for parts of tensors, such as one of the experts in a stack.
    `scales`: other strengths of some tensors. `stacks`: factors in memory, for the tensors that share them.
    """

    folder: Path
    low_rank: Mapping[str, LowRank]
    full: Mapping[str, StoredTensor]
    replaced: Mapping[str, StoredTensor]
    carried: Mapping[str, StoredTensor]
    base: str | None
    base_fingerprint: str | None
    targets: tuple[str, ...] | str | None
    notes: tuple[str, ...]
    scale: float = 1.0
    pieces: Mapping[str, Pieces] = field(default_factory=dict)
    settings: LoraSettings | None = None
    scales: Mapping[str, float] = field(default_factory=dict)
    stacks: Held = field(default_factory=Held, compare=False, repr=False)

    def strength(self, name: str) -> float:
        """Return how many times the update of a tensor is added."""
        return self.scales.get(name, self.scale)

    @property
    def names(self) -> set[str]:
        return {*self.low_rank, *self.pieces, *self.full, *self.replaced}

    @property
    def files(self) -> list[Path]:
        """The weights files of the patch."""
        return [path for name in (ADAPTER_WEIGHTS, ADAPTER_PICKLE, DELTAS) if (path := self.folder / name).is_file()]

    def zero_names(self) -> list[str]:
        """Return the weights whose LoRA is zero, as it is before training, from the bytes of the factors."""
        loras: dict[str, LowRank | Pieces] = {**self.pieces, **self.low_rank}
        return [name for name, factors in loras.items() if factors.is_zero()]

    def unmatched_patterns(self) -> list[str]:
        """Return a warning for each key of the rank and alpha patterns that matches none of the LoRAs."""
        if self.settings is None:
            return []
        modules = []
        for name, factors in self.low_rank.items():
            module = base_name(f"{name.removesuffix('.weight')}.")[:-1]
            modules += self.settings.parameters_of(module, is_stack=True) if factors.is_parameter else [module]
        return self.settings.warnings(modules)

    def oriented(self, is_transposed: Callable[[str], bool | None]) -> Patch:
        """Return the patch with its factors turned as the layers are whose weights `is_transposed` knows by name.

        PEFT goes by the kind of each layer too: where a LoRA has layers of both kinds, the one fan_in_fan_out that it
        saves is that of the last layer.
        """
        low_rank = dict(self.low_rank)
        for name, factors in low_rank.items():
            turned = is_transposed(name)
            if turned is not None and not factors.is_embedding:
                low_rank[name] = replace(factors, transposed=turned)
        return replace(self, low_rank=low_rank)


def read_patch(folder: Path, *, scale: float = 1.0, allow_pickle: bool = False, unwrap: bool = False) -> Patch:
    """Return the patch in `folder`, from headers alone (a pickle is loaded, and only where it is allowed).

    `unwrap`: take the names that wrappers of training leave (torch.compile, FSDP ...) out of those of the tensors.
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
    carried: dict[str, StoredTensor] = {}
    config: dict[str, Any] = {}
    settings = None
    if (folder / ADAPTER_CONFIG).is_file():
        config = read_json(folder / ADAPTER_CONFIG, PatchError)
        _check_config(folder, config)
        tensors = own_names(folder, _adapter_tensors(folder, allow_pickle=allow_pickle), unwrap=unwrap)
        settings = LoraSettings(folder / ADAPTER_CONFIG, config)
        low_rank, replaced, carried = _read_lora(settings, tensors)
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
    notes = _notes(replaced, carried)
    targets = _targets(config)
    return Patch(folder, low_rank, full, replaced, carried, base, fingerprint, targets, notes, scale, settings=settings)


def named_bases(folder: Path) -> list[str]:
    """Return the base model that an adapter's configuration and a patch's record name; raise PatchError if damaged."""
    files = ((folder / ADAPTER_CONFIG, "base_model_name_or_path"), (folder / RECORD, "base"))
    named = (read_json(file, PatchError).get(key) for file, key in files if file.is_file())
    return [str(base) for base in named if base]


def why_not_plain(config: Mapping[str, Any], allowed: Container[str] = ()) -> str | None:
    """Return why an adapter's configuration is not that of a plain LoRA, or None; keys in `allowed` are no reason."""
    kind, start = config.get("peft_type"), config.get("init_lora_weights", True)
    if kind != "LORA":
        return f"is of kind {kind!r}; only LORA is a sum with the weights"
    if config.get("use_dora") and "use_dora" not in allowed:
        return "is a DoRA (use_dora), whose update depends on the base's norms"
    if start not in _PLAIN_STARTS:
        return f"was started with init_lora_weights={start!r}, which changes the base's weights"
    unknown = {key: value for key, value in config.items() if key not in {*_KNOWN_KEYS, "use_dora"}}
    found = (key for key, value in unknown.items() if value not in _UNSET and key not in allowed)
    return next((f"uses {key}={unknown[key]!r}, which is not supported" for key in found), None)


def _check_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise UnsupportedPatchError for a kind, or a key, that would change the arithmetic."""
    reason = why_not_plain(config)
    if reason is not None:
        raise UnsupportedPatchError(f"{folder} {reason}; give a plain LoRA, or convert it to one with PEFT first")


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


def own_names(folder: Path, tensors: Mapping[str, StoredTensor], *, unwrap: bool) -> dict[str, StoredTensor]:
    """Return an adapter's tensors under the names of its model's modules; raise PatchError for those of a wrapper."""
    if not tensors:
        raise PatchError(f"{folder} holds a weights file without tensors: {_NOT_GATHERED}")
    own = {}
    for name, tensor in tensors.items():
        path = name
        while found := _WRAPPED.search(path):
            if not unwrap:
                wrapper = found[0].removesuffix(".")
                raise PatchError(
                    f"{folder} was saved with the wrapper of {_WRAPPERS[wrapper]}: {name} has {wrapper!r} in its name; "
                    "save the adapter from the model inside, or leave that out with: ensembler patch apply --unwrap"
                )
            path = path[: found.start()] + path[found.end() :]
        own[_ADAPTER_NAME.sub(r"\1", path.removeprefix(PEFT_PREFIX))] = tensor
    return own


def base_name(name: str) -> str:
    """Return the name that a tensor of the base had before PEFT wrapped the layers."""
    return _PEFT_LAYERS.sub(".", name.removeprefix(PEFT_PREFIX))


def _read_lora(
    settings: LoraSettings, tensors: Mapping[str, StoredTensor]
) -> tuple[dict[str, LowRank], dict[str, StoredTensor], dict[str, StoredTensor]]:
    """Return factors by the name of their weight, replaced values, and the base's own that nothing trained."""
    folder, config = settings.folder, settings.config
    factors: dict[str, dict[str, StoredTensor]] = {}
    replaced, carried = {}, {}
    for path, tensor in tensors.items():
        ending = next((ending for ending in _FACTORS if path.endswith(ending)), None)
        name = base_name(path).replace(".modules_to_save.", ".")
        if ending is not None:
            factors.setdefault(path.removesuffix(ending), {})[_FACTORS[ending]] = tensor
        elif "lora_" in path or "token_adapter" in path:
            raise UnsupportedPatchError(f"{folder} holds {path}, which is not supported; give a plain LoRA")
        elif ".original_module." not in path and _is_trained(config, name):
            replaced[name] = tensor
        else:
            carried[name] = tensor
    low_rank = {}
    for module, pair in factors.items():
        found = _low_rank(settings, module, pair)
        low_rank[module if found.is_parameter else f"{module}.weight"] = found
    return low_rank, replaced, {name: tensor for name, tensor in carried.items() if name not in replaced}


def _is_trained(config: Mapping[str, Any], name: str) -> bool:
    """Return whether an adapter's configuration has this tensor trained whole, by modules_to_save or as a bias."""
    if name.endswith(".bias") and config.get("bias", "none") != "none":
        return True
    saved: Any = config.get("modules_to_save") or _TASK_HEADS.get(str(config.get("task_type")), ())
    modules = accumulate(name.split(".")[:-1], "{}.{}".format)
    return any(module.endswith(tuple(saved)) for module in modules)


def _notes(replaced: Mapping[str, StoredTensor], carried: Mapping[str, StoredTensor]) -> tuple[str, ...]:
    notes = []
    if carried:
        notes.append(
            f"the base's own {listed(carried)}, which the patch carries along and did not train (modules_to_save in "
            f"{ADAPTER_CONFIG} does not name it), is left out"
        )
    if replaced:
        notes.append(
            f"{listed(replaced)}: trained as a whole (modules_to_save, bias), so it replaces the model's own value"
        )
    return tuple(notes)


def _low_rank(settings: LoraSettings, module: str, pair: Mapping[str, StoredTensor]) -> LowRank:
    folder = settings.folder
    is_embedding = any("embedding" in name for name in pair)
    first, second = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A", "lora_B")
    for name in (first, second):
        if name not in pair:
            raise PatchError(f"{folder}: {module} has no {name}; fetch the patch again")
        _check_float(folder, module, pair[name])
    a, b = pair[first], pair[second]
    if not a.num_elements or not b.num_elements:
        raise PatchError(f"{folder}: {module} has an empty {first} or {second}: {_NOT_GATHERED}")
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise UnsupportedPatchError(
            f"{folder}: {module} has {first} of shape {a.shape} and {second} of shape {b.shape}; expected (r, in) and "
            "(out, r) of a linear layer or an embedding"
        )
    rows, owner = a.shape[0], base_name(f"{module}.")[:-1]
    parameters = settings.parameters_of(owner, is_stack=owner != module or rows != settings.rank(module))
    if parameters and parameters != [f"{owner}.weight"]:
        return of_parameter(settings, LowRank(a, b, 1.0, transposed=False, is_parameter=True), module, parameters)
    if settings.rank(module) != rows:
        raise PatchError(
            f"{folder}: {module} has rank {rows}; {ADAPTER_CONFIG} says {settings.rank(module):g}; mend it"
        )
    transposed = is_embedding or bool(settings.config.get("fan_in_fan_out"))
    return LowRank(a, b, settings.scale(module), transposed)


def of_parameter(settings: LoraSettings, factors: LowRank, module: str, names: Sequence[str]) -> LowRank:
    """Return the factors of a tensor with its scale and its number of matrices, by the first of the names that fits.

    A has r rows for each matrix. Raises PatchError where its rows are no multiple of r.
    """
    rows = factors.a.shape[0]
    ranks = {name: settings.rank(name) for name in names}
    name = next((name for name, rank in ranks.items() if rank > 0 and rows % rank == 0), None)
    if name is None:
        expected = " or ".join(f"{rank}" for rank in dict.fromkeys(ranks.values()))
        raise PatchError(
            f"{settings.folder}: {module} has lora_A of {rows} rows, which is no multiple of the rank {expected} that "
            f"{ADAPTER_CONFIG} says for a stack of experts; mend it"
        )
    return replace(factors, scale=settings.scale(name), num_matrices=rows // ranks[name])


def _check_float(folder: Path, name: str, tensor: StoredTensor) -> None:
    if tensor.dtype not in FLOATS.values():
        raise UnsupportedPatchError(
            f"{folder}: {name} is stored as {tensor.dtype}; expected one of {', '.join(FLOATS)}"
        )
