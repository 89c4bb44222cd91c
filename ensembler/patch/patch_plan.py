"""Check from headers alone that patches fit a model, and plan their addition."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ensembler.errors import PatchError
from ensembler.patch.formats import Patch
from ensembler.safetensors_files import FLOATS, StoredModel, listed, read_model

if TYPE_CHECKING:
    from ensembler.patch.model_layout import ModelLayout

_FUSED = ("qkv_proj", "query_key_value", "gate_up_proj", "c_attn", "Wqkv", "attn_qkv", "in_proj")


@dataclass(frozen=True)
class PatchPlan:
    """Patches that fit a model; `warnings` are worth a line each."""

    model: StoredModel
    patches: tuple[Patch, ...]
    warnings: tuple[str, ...]

    @cached_property
    def names(self) -> list[str]:
        """The tensors that change: a LoRA of zeros changes none."""
        zero = [set(patch.zero_names()) for patch in self.patches]
        changed = set().union(*(patch.names - same for patch, same in zip(self.patches, zero, strict=True)))
        return [name for name in self.model.tensors if name in changed]

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on what the patches hold besides additions, a line each."""
        found = [note for patch in self.patches for note in patch.notes]
        for patch in self.patches:
            if zero := patch.zero_names():
                found.append(f"{patch.folder}: the LoRA of {listed(zero)} is 0, as before training: it changes nothing")
        return tuple(found)


def plan_patches(patches: Sequence[Patch], model: Path) -> PatchPlan:
    """Check that every patch fits the model, from headers alone.

    Raises PatchError (a module, shape, dtype or kind that does not fit) or MemberError (a file that is not whole).
    """
    from ensembler.patch.model_layout import read_layouts  # torch, which reading a patch needs not

    stored = read_model(model)
    layouts = read_layouts(stored)
    fitted = [_fit(patch, stored, layouts) for patch in patches]
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


def _fit(patch: Patch, model: StoredModel, layouts: Sequence[ModelLayout]) -> Patch:
    """Return the patch under the model's names on disk, its factors turned as the layers are.

    Raises PatchError unless it fits one of the classes that load the model, or where any of them ties a weight that it
    changes by itself.
    """
    if patch.replaced and patch.scale != 1:
        raise PatchError(
            f"{patch.folder} replaces {listed(patch.replaced)} (modules_to_save, bias), which has no strength; it can "
            "be added at scale 1 only"
        )
    for layout in layouts:
        _check_ties(patch, model, layout)
    misfits: list[PatchError] = []
    for layout in layouts:
        try:
            return _fit_class(patch, model, layout)
        except PatchError as misfit:
            misfits.append(misfit)
    raise misfits[0]


def _fit_class(patch: Patch, model: StoredModel, layout: ModelLayout) -> Patch:
    loaded = {name: layout.find(name) or name for name in (*patch.names, *patch.carried)}
    on_disk = {name: _names_on_disk(name, found, patch, model, layout) for name, found in loaded.items()}
    _check_names(patch, model, layout, loaded, on_disk)
    kinds = {on_disk[name][0]: layout.kinds.get(loaded[name]) for name in patch.low_rank}
    fitted = replace(
        patch,
        low_rank={on_disk[name][0]: factors for name, factors in patch.low_rank.items()},
        replaced={on_disk[name][0]: stored for name, stored in patch.replaced.items()},
        full={each: stored for name, stored in patch.full.items() for each in on_disk[name]}
        | {name: stored for name, stored in patch.full.items() if name in model.tensors},
        carried={on_disk[name][0]: stored for name, stored in patch.carried.items() if on_disk[name]},
    ).oriented(lambda name: None if kinds[name] is None else kinds[name] == "transposed")
    tokens = {each for name in layout.token_weights for each in layout.on_disk(name)}
    _check_shapes(fitted, model, tokens)
    return fitted


def _names_on_disk(name: str, loaded: str, patch: Patch, model: StoredModel, layout: ModelLayout) -> list[str]:
    """Return the tensors on disk that hold a weight. Those that are turned when loaded take deltas from disk alone."""
    is_on_disk = name in model.tensors and (loaded not in layout.weights or name in patch.full)
    return layout.on_disk(loaded) or ([name] if is_on_disk else [])


def _check_ties(patch: Patch, model: StoredModel, layout: ModelLayout) -> None:
    """Raise PatchError where a LoRA or a trained value concerns one of two tied layers: both would change."""
    for name in sorted({*patch.low_rank, *patch.replaced}):
        loaded = layout.find(name) or name
        others = [other for other in layout.tied.get(loaded, ()) if other != loaded]
        if others:
            hint = ""
            if len(layout.on_disk(loaded)) > 1:
                hint = ' (its files hold both: "tie_word_embeddings": false in its config.json keeps them apart)'
            elif not layout.is_known:
                hint = (
                    ' (its class is not one of transformers: where it does not tie them, say "tie_word_embeddings": '
                    "false in its config.json)"
                )
            raise PatchError(
                f"{patch.folder} changes {name}, and {model.folder} ties it to {listed(others)}, so both would change; "
                f"give a model that is not tied{hint}, or a patch without it"
            )


def _check_names(
    patch: Patch,
    model: StoredModel,
    layout: ModelLayout,
    loaded: Mapping[str, str],
    on_disk: Mapping[str, Sequence[str]],
) -> None:
    given: dict[str, str] = {}
    for name in sorted(patch.names):
        first = given.setdefault(loaded[name], name)
        if first != name:
            raise PatchError(
                f"{patch.folder} holds {first} and {name}, and both are {loaded[name]} in {model.folder}; take one out"
            )
    missing = sorted(name for name in patch.names if not on_disk[name])
    if missing:
        raise PatchError(
            f"{patch.folder} changes {len(missing):,} of {len(patch.names):,} tensors that {model.folder} does not "
            f"have: {listed(missing)}; {_why_missing(missing, model, layout)}"
        )
    extra = sorted(_targeted(patch, model, layout, {loaded[name] for name in patch.names}))
    if extra:
        raise PatchError(
            f"{model.folder} has {len(extra):,} matrices that {patch.folder} says it changes and holds nothing for: "
            f"{listed(extra)}; it was made for another architecture"
        )


def _check_shapes(patch: Patch, model: StoredModel, tokens: Collection[str]) -> None:
    """Raise PatchError where a shape or a dtype does not fit; `tokens` are the tensors with a row for each token."""
    shapes: dict[str, tuple[int, ...]] = {name: factors.shape for name, factors in patch.low_rank.items()}
    shapes |= {name: stored.shape for name, stored in {**patch.full, **patch.replaced}.items()}
    for name, stored in patch.carried.items():
        if name in tokens and stored.shape > model.tensors[name].shape:  # trained on tokens that the model lacks
            shapes.setdefault(name, stored.shape)
    for name, shape in shapes.items():
        tensor, folder = model.tensors[name], model.folder
        if tensor.dtype == "F64":
            raise PatchError(
                f"{name} in {folder} is float64, and sums are taken in float32; save the model in that first: "
                + _command(f'm = M.from_pretrained({_quoted(folder)}, dtype="float32")', f"{folder}-float32")
            )
        if tensor.dtype not in FLOATS.values():
            raise PatchError(
                f"{name} in {folder} is stored as {tensor.dtype}; expected one of {', '.join(FLOATS)}; give the model "
                "in one of them, before any quantisation"
            )
        if name in tokens and shape[1:] == tensor.shape[1:] and shape > tensor.shape:
            raise PatchError(
                f"{patch.folder} was trained with {shape[0]:,} tokens, and {folder} has {tensor.shape[0]:,}; resize it "
                f"first, and add the patch to the result: {resize_command(folder, shape[0])}"
            )
        if shape != tensor.shape:
            raise PatchError(
                f"{patch.folder}: {name} changes a tensor of shape {shape}; in {folder} it has shape {tensor.shape}: "
                "it was made for another model"
            )


def resize_command(model: str | Path, num_tokens: int) -> str:
    """Return the command that saves a model with embeddings of `num_tokens` rows beside itself."""
    code = f"m = M.from_pretrained({_quoted(model)}); m.resize_token_embeddings({num_tokens})"
    return _command(code, f"{str(model).rstrip('/')}-{num_tokens}")


def _command(code: str, out: str) -> str:
    """Return a shell command that makes the model `m` by `code` and saves it in `out`."""
    code = f"from transformers import AutoModelForCausalLM as M; {code}; m.save_pretrained({_quoted(out)})"
    return shlex.join(["python", "-c", code])


def _quoted(name: str | Path) -> str:
    return json.dumps(str(name), ensure_ascii=False)  # a literal of Python too, without single quotes


def _why_missing(missing: Sequence[str], model: StoredModel, layout: ModelLayout) -> str:
    """Return the likeliest reason: quantised, several modules in one matrix, another architecture or class."""
    folder = model.folder.name
    if model.config.get("quantization_config"):
        return f"{folder} is quantised; give the model before that"
    parents = {name.rsplit(".", 2)[0] for name in missing}
    for name in model.tensors:
        if name.rsplit(".", 2)[0] in parents and any(word in name for word in _FUSED):
            return f"{folder} keeps several of them in one matrix, such as {name}; give a patch made for that"
    if not layout.is_known:
        return f"the class of {folder} is not one of transformers, so that a patch has to use the names in its files"
    return "it was made for another architecture"


def _targeted(patch: Patch, model: StoredModel, layout: ModelLayout, found: set[str]) -> list[str]:
    """Return the matrices that the patch's target_modules match, as PEFT matches them, and that are not in `found`.

    These are layers of the class, or of its text model alone where all changes lie in that. Experts that are fused when
    loaded count where the patch changes one of them: it was then made with an older class, which had them as layers.
    """
    targets = patch.targets
    if targets is None:
        return []
    if layout.is_known:
        names = {name for name in layout.kinds if name in layout.stored}
        inside = "" if layout.text_model is None else layout.text_model[1]
        if all(name.startswith(inside) for name in found):
            names = {name for name in names if name.startswith(inside) or name in layout.token_weights}
        if layout.fused & found:
            names |= {name for name in layout.fused if len(model.tensors[name].shape) == 2}
    else:
        names = {name for name, tensor in model.tensors.items() if len(tensor.shape) == 2}
    matrices = {name: name.removesuffix(".weight") for name in names - found}
    if isinstance(targets, str):
        try:
            return [name for name, module in matrices.items() if re.fullmatch(targets, module)]
        except re.error as error:
            raise PatchError(f"{patch.folder}: target_modules {targets!r} is no regular expression; mend it") from error
    endings = tuple(f".{target}" for target in targets)
    return [name for name, module in matrices.items() if module in targets or module.endswith(endings)]
