"""Check from headers alone that patches fit a model, and plan their addition."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ensembler.errors import PatchError
from ensembler.patch.formats import Patch
from ensembler.patch.schemes.quantization_settings import METHOD, SCHEMES, quantization_of, said_scheme
from ensembler.safetensors_files import FLOATS, StoredModel, listed, read_model

if TYPE_CHECKING:
    from ensembler.patch.lora_fitting import Cut
    from ensembler.patch.model_layout import ModelLayout
    from ensembler.patch.schemes.scheme import QuantizedWeight
    from ensembler.patch.transports.transport import Transport

_QUANTIZED = "quantised"
_FUSED = ("qkv_proj", "query_key_value", "gate_up_proj", "c_attn", "Wqkv", "attn_qkv", "in_proj")


@dataclass(frozen=True)
class PatchPlan:
    """Patches that fit a model; `quantized` are its weights that stand as several tensors on disk, by their name.

    `warnings` are worth a line each. `transport`: what carries their updates to this base; None: plain addition.
    """

    model: StoredModel
    patches: tuple[Patch, ...]
    warnings: tuple[str, ...]
    quantized: Mapping[str, QuantizedWeight]
    transport: Transport | None = None

    @cached_property
    def names(self) -> list[str]:
        """The weights that change: a LoRA of zeros changes none."""
        zero = [set(patch.zero_names()) for patch in self.patches]
        changed = set().union(*(patch.names - same for patch, same in zip(self.patches, zero, strict=True)))
        return [name for name in dict.fromkeys([*self.model.tensors, *self.quantized]) if name in changed]

    @property
    def num_weights(self) -> int:
        """The number of weights: a quantised one is one, whatever it stands as on disk."""
        parts = sum(len(weight.parts) for weight in self.quantized.values())
        return len(self.model.tensors) - parts + len(self.quantized)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on what the patches hold besides additions, a line each."""
        found = [note for patch in self.patches for note in patch.notes]
        for patch in self.patches:
            if zero := patch.zero_names():
                found.append(f"{patch.folder}: the LoRA of {listed(zero)} is 0, as before training: it changes nothing")
        return (*found, *(() if self.transport is None else self.transport.notes))


def plan_patches(patches: Sequence[Patch], model: Path) -> PatchPlan:
    """Check that every patch fits the model, from headers alone.

    Raises PatchError (a module, shape, dtype or kind that does not fit) or MemberError (a file that is not whole).
    """
    from ensembler.patch.model_layout import read_layouts  # torch, which reading a patch needs not
    from ensembler.patch.schemes.find import find_quantized

    stored = read_model(model)
    quantized = find_quantized(stored)
    weights = _with_weights(stored, quantized)
    layouts = read_layouts(weights)
    fitted = [_fit(patch, weights, layouts, quantized) for patch in patches]
    for number, patch in enumerate(fitted):
        others = set().union(*(other.names for other in [*fitted[:number], *fitted[number + 1 :]]))
        both = sorted(others & patch.replaced.keys())
        if both:
            raise PatchError(f"{patch.folder} replaces {both[0]}, which another patch changes too; leave one out")
    warnings = [line for patch in fitted if (line := warn_of_other_base(patch, stored)) is not None]
    if warnings and quantization_of(stored).get(METHOD) == "awq":
        warnings.append(
            f"AWQ has scaled the inputs of layers in {stored.folder}, and divided the norms before them: a patch "
            "of the model before that does not fit exactly; test the result, or give a model in another scheme"
        )
    for patch in patches:
        warnings += patch.unmatched_patterns()
    return PatchPlan(stored, tuple(fitted), tuple(warnings), quantized)


def _with_weights(model: StoredModel, quantized: Mapping[str, QuantizedWeight]) -> StoredModel:
    """Return the model with quantised weights in place of the tensors that they stand as on disk."""
    parts = {part.name for weight in quantized.values() for part in weight.parts.values()}
    tensors = {name: tensor for name, tensor in model.tensors.items() if name not in parts}
    for name, weight in quantized.items():
        first = next(iter(weight.parts.values()))
        tensors[name] = replace(first, name=name, dtype=_QUANTIZED, shape=weight.shape)
    return replace(model, tensors=tensors)


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


def _fit(
    patch: Patch, model: StoredModel, layouts: Sequence[ModelLayout], quantized: Mapping[str, QuantizedWeight]
) -> Patch:
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
            return _turned(_fit_class(patch, model, layout), quantized)
        except PatchError as misfit:
            misfits.append(misfit)
    raise misfits[0]


def _fit_class(patch: Patch, model: StoredModel, layout: ModelLayout) -> Patch:
    from ensembler.patch.lora_fitting import cut_loras, with_parameter_names

    patch = with_parameter_names(patch, layout, model.folder)
    loaded = {name: layout.find(name) or name for name in (*patch.names, *patch.carried)}
    on_disk = {name: _names_on_disk(name, found, patch, model, layout) for name, found in loaded.items()}
    direct = {
        name: factors
        for name, factors in patch.low_rank.items()
        if on_disk[name] and factors.num_matrices == 1 and len(model.tensors[on_disk[name][0]].shape) < 3
    }
    shapes = {name: tensor.shape for name, tensor in model.tensors.items()}
    others = [name for name in patch.low_rank if name not in direct]
    cut = cut_loras(patch, others, shapes, layout, model.folder)
    on_disk |= {name: cut.tensors.get(name, []) for name in others}
    _check_names(patch, model, layout, loaded, on_disk, cut)
    kinds = {on_disk[name][0]: layout.kinds.get(loaded[name]) for name in direct}
    if twice := sorted(kinds.keys() & {*cut.low_rank, *cut.pieces}):
        first, second = sorted(name for name in patch.low_rank if twice[0] in on_disk[name])[:2]
        raise PatchError(
            f"{patch.folder} holds {first} and {second}, and both change {twice[0]} in {model.folder}; take one out"
        )
    fitted = replace(
        patch,
        low_rank={on_disk[name][0]: factors for name, factors in direct.items()},
        replaced={on_disk[name][0]: stored for name, stored in patch.replaced.items()},
        full={each: stored for name, stored in patch.full.items() for each in on_disk[name]}
        | {name: stored for name, stored in patch.full.items() if name in model.tensors},
        carried={on_disk[name][0]: stored for name, stored in patch.carried.items() if on_disk[name]},
        notes=(*patch.notes, *_notes(patch, model, on_disk, cut.tensors)),
    ).oriented(lambda name: None if kinds[name] is None else kinds[name] == "transposed")
    fitted = replace(fitted, low_rank={**fitted.low_rank, **cut.low_rank}, pieces=cut.pieces)
    tokens = {each for name in layout.token_weights for each in layout.on_disk(name)}
    _check_shapes(fitted, model, tokens)
    return fitted


def _notes(
    patch: Patch, model: StoredModel, on_disk: Mapping[str, Sequence[str]], cut: Mapping[str, Sequence[str]]
) -> list[str]:
    """Say which names are others in the model, and which LoRAs are for parts of its tensors or for several of them."""
    renamed = [(name, on_disk[name][0]) for name in sorted(patch.names - cut.keys()) if name not in on_disk[name]]
    moved = {name: list(dict.fromkeys(found)) for name, found in sorted(cut.items()) if {*found} != {name}}
    notes = []
    if renamed:
        name, other = renamed[0]
        more = f" ({len(renamed):,} names in all)" if len(renamed) > 1 else ""
        notes.append(f"{patch.folder}: {name} is {other} in the files of {model.folder}{more}")
    if moved:
        name, tensors = next(iter(moved.items()))
        more = f" ({len(moved):,} LoRAs in all)" if len(moved) > 1 else ""
        notes.append(f"{patch.folder}: the LoRA of {name} is added to {listed(tensors)} in {model.folder}{more}")
    return notes


def _turned(patch: Patch, quantized: Mapping[str, QuantizedWeight]) -> Patch:
    """Return the patch with its factors turned where a scheme keeps a weight as (in, out)."""
    turned = {name for name, weight in quantized.items() if weight.scheme.is_transposed}
    low_rank = {
        name: replace(factors, transposed=not factors.transposed) if name in turned else factors
        for name, factors in patch.low_rank.items()
    }
    pieces = {name: each.transposed() if name in turned else each for name, each in patch.pieces.items()}
    return replace(patch, low_rank=low_rank, pieces=pieces)


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
    cut: Cut,
) -> None:
    given: dict[str, str] = {}
    for name in sorted(patch.names):
        first = given.setdefault(loaded[name], name)
        if first != name:
            raise PatchError(
                f"{patch.folder} holds {first} and {name}, and both are {loaded[name]} in {model.folder}; take one out"
            )
    missing = sorted(name for name in patch.names if not on_disk[name])
    unfit = next((name for name in missing if name in cut.reasons), None)
    if unfit is not None and not any(other.startswith(f"{unfit.removesuffix('.weight')}.") for other in model.tensors):
        raise PatchError(
            f"{patch.folder} changes {unfit}, which {cut.reasons[unfit]} in {model.folder}; give a model and a patch "
            "of one architecture and size"
        )
    if missing:
        raise PatchError(
            f"{patch.folder} changes {len(missing):,} of {len(patch.names):,} tensors that {model.folder} does not "
            f"have: {listed(missing)}; {_why_missing(missing, model, layout)}"
        )
    found = {loaded[name] for name in patch.names - cut.tensors.keys()}.union(*cut.weights.values())
    extra = sorted(_targeted(patch, model, layout, found) - set().union(*cut.tensors.values()))
    if extra:
        raise PatchError(
            f"{model.folder} has {len(extra):,} matrices that {patch.folder} says it changes and holds nothing for: "
            f"{listed(extra)}; it was made for another architecture"
        )


def _check_shapes(patch: Patch, model: StoredModel, tokens: Collection[str]) -> None:
    """Raise PatchError where a shape or a dtype does not fit; `tokens` are the tensors with a row for each token."""
    shapes: dict[str, tuple[int, ...]] = {name: factors.shape for name, factors in patch.low_rank.items()}
    shapes |= {name: stored.shape for name, stored in {**patch.full, **patch.replaced}.items()}
    shapes |= {name: model.tensors[name].shape for name in patch.pieces}
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
        if tensor.dtype not in (*FLOATS.values(), _QUANTIZED):
            raise PatchError(
                f"{name} in {folder} is stored as {tensor.dtype} ({said_scheme(model)}); expected one of "
                f"{', '.join(FLOATS)}, or {SCHEMES}; give the model before any quantisation"
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
    modules = tuple(name.removesuffix(".weight") for name in missing)
    if quantization_of(model) and any(name.startswith(modules) for name in model.tensors):
        return (
            f"{folder} is quantised ({said_scheme(model)}), and no scheme that is known holds these ({SCHEMES}); give "
            "the model before that"
        )
    parents = {name.rsplit(".", 2)[0] for name in missing}
    for name in model.tensors:
        if name.rsplit(".", 2)[0] in parents and any(word in name for word in _FUSED):
            return f"{folder} keeps several of them in one matrix, such as {name}; give a patch made for that"
    if not layout.is_known:
        return f"the class of {folder} is not one of transformers, so that a patch has to use the names in its files"
    return "it was made for another architecture"


def _targeted(patch: Patch, model: StoredModel, layout: ModelLayout, found: set[str]) -> set[str]:
    """Return the matrices that the patch's target_modules match, as PEFT matches them, and that are not in `found`.

    These are layers of the class, or of its text model alone where all changes lie in that. Experts that are fused when
    loaded count where the patch changes one of them: it was then made with an older class, which had them as layers.
    """
    from ensembler.patch.lora_fitting import is_target

    if patch.targets is None:
        return set()
    if layout.is_known:
        names = {name for name in layout.kinds if name in layout.stored}
        inside = "" if layout.text_model is None else layout.text_model[1]
        if all(name.startswith(inside) or name in layout.token_weights for name in found):
            names = {name for name in names if name.startswith(inside) or name in layout.token_weights}
        if layout.fused & found:
            names |= {name for name in layout.fused if len(model.tensors[name].shape) == 2}
    else:
        names = {name for name, tensor in model.tensors.items() if len(tensor.shape) == 2}
    matrices = {name: name.removesuffix(".weight") for name in names - found}
    return {name for name, module in matrices.items() if is_target(patch, module)}
