"""Plan the addition of patches to a model from headers alone: seconds for any size. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ensembler.errors import PatchError
from ensembler.patch.formats import Patch, read_patch
from ensembler.patch.headers import FLOATS, StoredTensor, fingerprint, listed, model_tensors, read_json
from ensembler.patch.places import model_name

# Families whose linear layers lie as (in, out), which PEFT calls fan_in_fan_out.
_TURNED_FAMILIES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_TURNED_LAYERS = ("c_attn", "q_attn", "c_proj", "c_fc")
HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
_FUSED = ("qkv_proj", "query_key_value", "gate_up_proj", "c_attn", "Wqkv", "attn_qkv", "in_proj")


@dataclass(frozen=True)
class Part:
    """One patch and its strength: θ′ + scale · Δθ."""

    patch: Path
    scale: float = 1.0


@dataclass(frozen=True)
class Plan:
    """Patches that fit a model: `names` are the tensors that change; `warnings` are worth a line each."""

    model: Path
    tensors: Mapping[str, StoredTensor]
    parts: tuple[tuple[Patch, float], ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        changed = set().union(*(patch.names for patch, _ in self.parts))
        return [name for name in self.tensors if name in changed]

    @property
    def num_bytes(self) -> int:
        """Bytes of the model's weights."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())


def make_plan(parts: Sequence[Part], model: Path, *, allow_pickle: bool = False) -> Plan:
    """Check that every patch fits the model, from headers alone.

    Raises PatchError (a module, shape, dtype or kind that does not fit) or MemberError (a file that is not whole).
    """
    tensors = model_tensors(model)
    tied = is_tied(model, tensors)
    read = []
    for part in parts:
        if not math.isfinite(part.scale):
            raise PatchError(f"the scale of {part.patch} is {part.scale}; expected a finite number")
        patch = _as_it_lies(read_patch(part.patch, allow_pickle=allow_pickle), model)
        if patch.replaced and part.scale != 1:
            raise PatchError(
                f"{part.patch} replaces {listed(patch.replaced)} (modules_to_save, bias), which has no strength; it "
                "can be added at scale 1 only"
            )
        _check_names(patch, model, tensors, tied=tied)
        _check_shapes(patch, model, tensors)
        read.append((patch, part.scale))
    _check_replacements([patch for patch, _ in read])
    notes = tuple(note for patch, _ in read for note in patch.notes)
    warnings = tuple(line for patch, _ in read if (line := other_base(patch, model, tensors)))
    return Plan(model, tensors, tuple(read), notes, warnings)


def has_turned_layers(model: Path) -> bool:
    """Return whether linear layers of this model's family lie as (in, out); see `is_turned` for which."""
    return read_json(model / "config.json").get("model_type") in _TURNED_FAMILIES


def is_turned(name: str) -> bool:
    """Return whether this tensor lies as (in, out), in a family that has such layers."""
    return name.removesuffix(".weight").rpartition(".")[2] in _TURNED_LAYERS


def _as_it_lies(patch: Patch, model: Path) -> Patch:
    """The patch with its factors turned as the layers of the model are.

    PEFT goes by the kind of each layer too: where a LoRA has layers of both kinds, the one fan_in_fan_out that it
    saves is that of the last layer.
    """
    if not has_turned_layers(model):
        return patch
    low_rank = {
        name: factors if factors.is_embedding else replace(factors, transposed=is_turned(name))
        for name, factors in patch.low_rank.items()
    }
    return replace(patch, low_rank=low_rank)


def other_base(patch: Patch, model: Path, tensors: Mapping[str, StoredTensor]) -> str | None:
    """Say with both names that a patch was made for another model than this; None where it was made for it.

    A patch that `extract` made knows its base by a fingerprint, one of PEFT by its name alone.
    """
    if patch.base_fingerprint is not None:
        same = patch.base_fingerprint == fingerprint(tensors.values())
    else:
        same = patch.base is None or Path(patch.base).name == Path(model_name(model)).name
    return None if same else f"{patch.folder} was made for {patch.base}; this is {model}"


def is_tied(model: Path, tensors: Mapping[str, StoredTensor]) -> bool:
    """Return whether input embedding and output head are one tensor."""
    return not any(head in tensors for head in HEADS) or bool(
        read_json(model / "config.json").get("tie_word_embeddings", False)
    )


def _check_names(patch: Patch, model: Path, tensors: Mapping[str, StoredTensor], *, tied: bool) -> None:
    missing = sorted(name for name in patch.names if name not in tensors)
    if tied:
        # One tensor in two roles: adding what was learned for one would change the other.
        apart = sorted(name for name in patch.names if name in HEADS) + _embeddings(patch)
        if apart:
            raise PatchError(
                f"{patch.folder} changes {apart[0]}, and {model} ties its input embedding to its output head, so both "
                "would change; give a model that is not tied, or a patch without it"
            )
    if missing:
        raise PatchError(
            f"{patch.folder} changes {len(missing):,} of {len(patch.names):,} tensors that {model} does not have: "
            f"{listed(missing)}; {_why_missing(missing, model, tensors)}"
        )
    extra = [name for name in _targeted(patch, tensors) if name not in patch.names]
    if extra:
        raise PatchError(
            f"{model} has {len(extra):,} matrices that {patch.folder} says it changes and holds nothing for: "
            f"{listed(extra)}; it was made for another architecture"
        )


def _why_missing(missing: Sequence[str], model: Path, tensors: Mapping[str, StoredTensor]) -> str:
    """The likeliest reason: a quantised model, another prefix, several modules in one matrix, another architecture."""
    if read_json(model / "config.json").get("quantization_config"):
        return f"{model.name} is quantised; give the model before that"
    for name in missing:
        tail = re.search(r"[^.]+\.\d+\..*", name)
        found = tail and next((other for other in tensors if f".{other}".endswith(f".{tail[0]}")), None)
        if found:
            return (
                f"{model.name} calls {name} {found}; load it with the class that the patch was trained with, "
                "AutoModelForCausalLM for most, and save it again"
            )
    parents = {name.rsplit(".", 2)[0] for name in missing}
    for name in tensors:
        if name.rsplit(".", 2)[0] in parents and any(word in name for word in _FUSED):
            return f"{model.name} keeps several of them in one matrix, such as {name}; give a patch made for that"
    return "it was made for another architecture"


def _embeddings(patch: Patch) -> list[str]:
    """Embeddings that were trained apart from the output head; a full delta is one of the tied tensor itself."""
    low_rank = [name for name, factors in patch.low_rank.items() if factors.is_embedding]
    return low_rank + [name for name in patch.replaced if "embed" in name]


def _targeted(patch: Patch, tensors: Mapping[str, StoredTensor]) -> list[str]:
    """The matrices of the model that the patch's target_modules match, as PEFT matches them."""
    if patch.targets is None:
        return []
    targets = patch.targets
    matrices = {name: name.removesuffix(".weight") for name, tensor in tensors.items() if len(tensor.shape) == 2}
    if isinstance(targets, str):
        try:
            return [name for name, module in matrices.items() if re.fullmatch(targets, module)]
        except re.error as error:
            raise PatchError(f"{patch.folder}: target_modules {targets!r} is no regular expression; mend it") from error
    endings = tuple(f".{target}" for target in targets)
    exact = set(targets)
    return [name for name, module in matrices.items() if module in exact or module.endswith(endings)]


def _check_shapes(patch: Patch, model: Path, tensors: Mapping[str, StoredTensor]) -> None:
    shapes: dict[str, tuple[int, ...]] = {name: factors.shape for name, factors in patch.low_rank.items()}
    shapes |= {name: stored.shape for name, stored in {**patch.full, **patch.replaced}.items()}
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tensor.dtype not in FLOATS.values():
            raise PatchError(
                f"{name} in {model} is stored as {tensor.dtype}; expected one of {', '.join(FLOATS)}; give the model "
                "in one of them, before any quantisation"
            )
        if shape == tensor.shape:
            continue
        factors = patch.low_rank.get(name)
        turned = factors is not None and not factors.transposed and shape[::-1] == tensor.shape
        hint = ', unless its adapter_config.json should say "fan_in_fan_out": true' if turned else ""
        raise PatchError(
            f"{patch.folder}: {name} changes a tensor of shape {shape}; in {model} it has shape {tensor.shape}: it was "
            f"made for another model{hint}"
        )


def _check_replacements(patches: Sequence[Patch]) -> None:
    for number, patch in enumerate(patches):
        others = set().union(*(other.names for other in [*patches[:number], *patches[number + 1 :]]))
        both = sorted(others & patch.replaced.keys())
        if both:
            raise PatchError(f"{patch.folder} replaces {both[0]}, which another patch changes too; leave one out")
