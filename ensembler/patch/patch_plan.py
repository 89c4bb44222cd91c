"""Check from headers alone that patches fit a model, and plan their addition. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ensembler.errors import PatchError
from ensembler.patch.formats import Patch
from ensembler.safetensors_files import FLOATS, HEADS, StoredModel, listed, read_model

_FUSED = ("qkv_proj", "query_key_value", "gate_up_proj", "c_attn", "Wqkv", "attn_qkv", "in_proj")


@dataclass(frozen=True)
class PatchPlan:
    """Patches that fit a model; `warnings` are worth a line each."""

    model: StoredModel
    patches: tuple[Patch, ...]
    warnings: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """The tensors that change."""
        changed = set().union(*(patch.names for patch in self.patches))
        return [name for name in self.model.tensors if name in changed]

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on what the patches hold besides additions, a line each."""
        return tuple(note for patch in self.patches for note in patch.notes)


def plan_patches(patches: Sequence[Patch], model: Path) -> PatchPlan:
    """Check that every patch fits the model, from headers alone.

    Raises PatchError (a module, shape, dtype or kind that does not fit) or MemberError (a file that is not whole).
    """
    stored = read_model(model)
    fitted = [_fit(patch, stored) for patch in patches]
    for number, patch in enumerate(fitted):
        others = set().union(*(other.names for other in [*fitted[:number], *fitted[number + 1 :]]))
        both = sorted(others & patch.replaced.keys())
        if both:
            raise PatchError(f"{patch.folder} replaces {both[0]}, which another patch changes too; leave one out")
    warnings = (warn_of_other_base(patch, stored) for patch in fitted)
    return PatchPlan(stored, tuple(fitted), tuple(line for line in warnings if line is not None))


def warn_of_other_base(patch: Patch, model: StoredModel) -> str | None:
    """Return a warning with both names where a patch was made for another model than this.

    A patch that `extract` made knows its base by a fingerprint, one of PEFT by its name alone.
    """
    if patch.base_fingerprint is not None:
        is_base = patch.base_fingerprint == model.fingerprint()
    else:
        is_base = patch.base is None or Path(patch.base).name == Path(model.name).name
    if is_base:
        return None
    return f"{patch.folder} was made for {patch.base}; this is {model.folder} (expected where that was updated)"


def _fit(patch: Patch, model: StoredModel) -> Patch:
    """Return the patch with its factors turned as the model's layers are; raise PatchError unless it fits."""
    if patch.replaced and patch.scale != 1:
        raise PatchError(
            f"{patch.folder} replaces {listed(patch.replaced)} (modules_to_save, bias), which has no strength; it can "
            "be added at scale 1 only"
        )
    if model.has_transposed_layers:
        patch = patch.oriented(model.is_transposed)
    _check_names(patch, model)
    shapes: dict[str, tuple[int, ...]] = {name: factors.shape for name, factors in patch.low_rank.items()}
    shapes |= {name: stored.shape for name, stored in {**patch.full, **patch.replaced}.items()}
    for name, shape in shapes.items():
        tensor = model.tensors[name]
        if tensor.dtype not in FLOATS.values():
            raise PatchError(
                f"{name} in {model.folder} is stored as {tensor.dtype}; expected one of {', '.join(FLOATS)}; give the "
                "model in one of them, before any quantisation"
            )
        if shape != tensor.shape:
            factors = patch.low_rank.get(name)
            is_turned = factors is not None and not factors.transposed and shape[::-1] == tensor.shape
            hint = ', unless its adapter_config.json should say "fan_in_fan_out": true' if is_turned else ""
            raise PatchError(
                f"{patch.folder}: {name} changes a tensor of shape {shape}; in {model.folder} it has shape "
                f"{tensor.shape}: it was made for another model{hint}"
            )
    return patch


def _check_names(patch: Patch, model: StoredModel) -> None:
    if model.has_tied_head:
        # One tensor in two roles: adding what was learned for one would change the other.
        apart = sorted(name for name in patch.names if name in HEADS)
        apart += [name for name, factors in patch.low_rank.items() if factors.is_embedding]
        apart += [name for name in patch.replaced if "embed" in name]
        if apart:
            raise PatchError(
                f"{patch.folder} changes {apart[0]}, and {model.folder} ties its input embedding to its output head, "
                "so both would change; give a model that is not tied, or a patch without it"
            )
    missing = sorted(name for name in patch.names if name not in model.tensors)
    if missing:
        raise PatchError(
            f"{patch.folder} changes {len(missing):,} of {len(patch.names):,} tensors that {model.folder} does not "
            f"have: {listed(missing)}; {_why_missing(missing, model)}"
        )
    extra = [name for name in _targeted(patch, model) if name not in patch.names]
    if extra:
        raise PatchError(
            f"{model.folder} has {len(extra):,} matrices that {patch.folder} says it changes and holds nothing for: "
            f"{listed(extra)}; it was made for another architecture"
        )


def _why_missing(missing: Sequence[str], model: StoredModel) -> str:
    """Return the likeliest reason: quantised, another prefix, several modules in one matrix, another architecture."""
    folder = model.folder.name
    if model.config.get("quantization_config"):
        return f"{folder} is quantised; give the model before that"
    for name in missing:
        tail = re.search(r"[^.]+\.\d+\..*", name)
        found = tail and next((other for other in model.tensors if f".{other}".endswith(f".{tail[0]}")), None)
        if found:
            return (
                f"{folder} calls {name} {found}; load it with the class that the patch was trained with, "
                "AutoModelForCausalLM for most, and save it again"
            )
    parents = {name.rsplit(".", 2)[0] for name in missing}
    for name in model.tensors:
        if name.rsplit(".", 2)[0] in parents and any(word in name for word in _FUSED):
            return f"{folder} keeps several of them in one matrix, such as {name}; give a patch made for that"
    return "it was made for another architecture"


def _targeted(patch: Patch, model: StoredModel) -> list[str]:
    """Return the matrices of the model that the patch's target_modules match, as PEFT matches them."""
    targets = patch.targets
    if targets is None:
        return []
    matrices = {name: name.removesuffix(".weight") for name, tensor in model.tensors.items() if len(tensor.shape) == 2}
    if isinstance(targets, str):
        try:
            return [name for name, module in matrices.items() if re.fullmatch(targets, module)]
        except re.error as error:
            raise PatchError(f"{patch.folder}: target_modules {targets!r} is no regular expression; mend it") from error
    endings = tuple(f".{target}" for target in targets)
    return [name for name, module in matrices.items() if module in targets or module.endswith(endings)]
