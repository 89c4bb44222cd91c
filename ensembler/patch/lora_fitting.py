"""Fit LoRAs to the tensors of a model where these are not the weights that the LoRAs were trained on, from headers.

A LoRA of one expert may belong to rows of a stack on disk, one of a stack to many tensors, one of q, k and v to rows of
a fused matrix. Both sides are boxes of the weights of the loaded model; a piece is what two boxes share.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import PreTrainedModel

from ensembler.errors import PatchError
from ensembler.patch.boxes import Box, Shape, locate, overlap
from ensembler.patch.conversions import Conversions, Link
from ensembler.patch.formats import Patch, of_parameter
from ensembler.patch.low_rank import LowRank, Piece, Pieces
from ensembler.patch.model_layout import ModelLayout, layout_of


@dataclass
class Cut:
    """LoRAs by the tensors on disk that they go to, whole or in pieces.

    By the name of each LoRA `tensors` are these, `weights` those of the loaded model, and `reasons` say why it goes to
    none.
    """

    low_rank: dict[str, LowRank] = field(default_factory=dict)
    pieces: dict[str, Pieces] = field(default_factory=dict)
    tensors: dict[str, list[str]] = field(default_factory=dict)
    weights: dict[str, list[str]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def with_parameter_names(patch: Patch, layout: ModelLayout, model: Path) -> Patch:
    """Return the patch with LoRAs of parameters under the names of these, as the class of the model has them.

    PEFT wraps the module of such a parameter, once for each, in their order in the class: the first is innermost
    (peft.tuners.lora.layer.ParamWrapper). Raises PatchError where the class has not as many of them; `model` is named.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for name, factors in patch.low_rank.items():
        if factors.is_parameter:
            groups[name.replace(".base_layer", "")].append(name)
    if not groups or patch.settings is None:
        return patch
    order = {name: number for number, name in enumerate(layout.weights)}
    low_rank = {name: factors for name, factors in patch.low_rank.items() if not factors.is_parameter}
    for owner, wrappers in groups.items():
        names = [name for name in patch.settings.parameters_of(owner, is_stack=True) if layout.find(name) is not None]
        names.sort(key=lambda name: order[layout.find(name) or name])
        if len(names) != len(wrappers):
            raise PatchError(
                f"{patch.folder} holds {len(wrappers)} LoRAs of parameters in {owner}, and {model} has "
                f"{len(names)} of {', '.join(patch.settings.parameters)} there; it was made for another architecture"
            )
        if len(names) > 1 and not layout.is_known:
            raise PatchError(
                f"{patch.folder} changes several parameters of {owner} (target_parameters), and the class of "
                f"{model}, which says their order, is not one of transformers; add it with PEFT"
            )
        wrappers.sort(key=lambda wrapper: wrapper.count(".base_layer"), reverse=True)
        for name, wrapper in zip(names, wrappers, strict=True):
            factors = replace(
                patch.low_rank[wrapper], is_parameter=False, transposed=layout.find(name) in layout.turned
            )
            low_rank[name] = of_parameter(patch.settings, factors, owner, [name])
    return replace(patch, low_rank=low_rank)


def cut_loras(
    patch: Patch, names: Collection[str], shapes: Mapping[str, Shape], layout: ModelLayout, model: Path
) -> Cut:
    """Cut the LoRAs of these names into pieces for the tensors, of these shapes, that hold their weights.

    Raises PatchError where two of them change the same values, or where experts are missing; `model` is named.
    """
    cut = Cut()
    conversions = layout.conversions
    if not names:
        return cut
    links, cut.reasons = conversions.links({name: patch.low_rank[name].shape for name in names})
    boxes = _boxes_on_disk(conversions, shapes, {link.weight for each in links.values() for link in each}, cut.reasons)
    pieces: dict[str, list[tuple[str, Piece]]] = defaultdict(list)
    for name, found in links.items():
        cut.tensors[name] = []
        cut.weights[name] = [link.weight for link in found]
        num_elements = 0
        for link in found:
            for number in link.inside.matrices:
                for disk, other in boxes[link.weight, number]:
                    piece = _piece(patch.low_rank[name], link, other, number)
                    if piece is not None:
                        pieces[disk].append((name, piece))
                        cut.tensors[name].append(disk)
                        num_elements += piece.source.num_elements
        if num_elements < Box.whole(patch.low_rank[name].shape).num_elements:
            if num_elements:
                reason = f"is in {found[0].weight} when it is loaded, of which the files hold a part alone"
                cut.reasons.setdefault(name, reason)
            del cut.tensors[name]
    _check_experts(patch, links, layout, model)
    for disk, found_pieces in pieces.items():
        _check_apart(patch, disk, found_pieces, model)
        own = [piece for name, piece in found_pieces if name in cut.tensors]
        if own and (whole := _as_whole(own, shapes[disk])) is not None:
            cut.low_rank[disk] = whole
        elif own:
            own.sort(key=lambda piece: (piece.target.matrices[0], piece.target.rows[0]))
            cut.pieces[disk] = Pieces(shapes[disk], tuple(own))
    return cut


def fit_loaded(patch: Patch, model: PreTrainedModel) -> Patch | None:
    """Return a patch with the LoRAs that are no layer's of a model in memory on the weights that they change there.

    None where it does not fit. Raises PatchError as `cut_loras`.
    """
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters(remove_duplicate=False)}
    layout = layout_of(model, shapes)
    folder = Path(model.config.name_or_path)
    patch = with_parameter_names(patch, layout, folder)
    low_rank = {
        name: factors
        for name, factors in patch.low_rank.items()
        if factors.num_matrices == 1 and shapes.get(name) == factors.shape
    }
    cut = cut_loras(patch, [name for name in patch.low_rank if name not in low_rank], shapes, layout, folder)
    fitted = replace(patch, low_rank={**low_rank, **cut.low_rank}, pieces=cut.pieces)
    return fitted if len(low_rank) + len(cut.tensors) == len(patch.low_rank) and fitted.names <= shapes.keys() else None


def _boxes_on_disk(
    conversions: Conversions, shapes: Mapping[str, Shape], wanted: set[str], reasons: dict[str, str]
) -> dict[tuple[str, int], list[tuple[str, Link]]]:
    """Return the tensors on disk, with their links, that hold a matrix of a weight, by the two."""
    near = {name: shape for name, shape in shapes.items() if not wanted.isdisjoint(conversions.targets(name))}
    links, unknown = conversions.links(near)
    reasons.update(unknown)
    boxes: dict[tuple[str, int], list[tuple[str, Link]]] = defaultdict(list)
    for name, found in links.items():
        for link in found:
            for number in link.inside.matrices:
                boxes[link.weight, number].append((name, link))
    return boxes


def _piece(factors: LowRank, link: Link, other: Link, number: int) -> Piece | None:
    """Return the piece that the box of a LoRA and that of a tensor share in a matrix of a weight, or None."""
    matrix = range(number, number + 1)
    rows, columns = overlap(link.inside.rows, other.inside.rows), overlap(link.inside.columns, other.inside.columns)
    if not rows or not columns:
        return None
    shared = Box(matrix, rows, columns)
    return Piece(factors, _own_box(link, shared), _own_box(other, shared), link.turned != other.turned)


def _own_box(link: Link, shared: Box) -> Box:
    """Return the box of a tensor that is the box `shared` of the weight it is linked to."""
    own = link.own.transposed() if link.turned else link.own
    found = Box(
        locate(shared.matrices, link.inside.matrices, own.matrices),
        locate(shared.rows, link.inside.rows, own.rows),
        locate(shared.columns, link.inside.columns, own.columns),
    )
    return found.transposed() if link.turned else found


def _as_whole(pieces: Sequence[Piece], shape: Shape) -> LowRank | None:
    """Return the factors of a single LoRA that is added to the whole of a matrix, or None."""
    first = pieces[0]
    is_whole = first.target == Box.whole(shape) and first.source == Box.whole(first.factors.shape)
    if len(pieces) > 1 or len(shape) > 2 or not is_whole:
        return None
    return replace(first.factors, transposed=first.factors.transposed != first.turned)


def _check_apart(patch: Patch, disk: str, pieces: Sequence[tuple[str, Piece]], model: Path) -> None:
    """Raise PatchError where two LoRAs of a patch change the same values of a tensor."""
    by_matrix: dict[int, list[tuple[str, Piece]]] = defaultdict(list)
    for name, piece in pieces:
        others = by_matrix[piece.target.matrices[0]]
        twice = next((other for other, box in others if other != name and box.target.overlaps(piece.target)), None)
        if twice is not None:
            raise PatchError(
                f"{patch.folder} holds {twice} and {name}, and both change {disk} in {model}; take one out"
            )
        others.append((name, piece))


def _check_experts(patch: Patch, links: Mapping[str, Sequence[Link]], layout: ModelLayout, model: Path) -> None:
    """Raise PatchError where a patch holds LoRAs of some experts of a stack and says that it changes more of them."""
    seen: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for name in links:
        place = layout.conversions.place_of(name)
        if place.number is not None:
            seen[place.weight, place.pattern][place.number] = name
    for (weight, _), names in seen.items():
        number, name = next(iter(names.items()))
        before, _, after = name.removesuffix(".weight").rpartition(f".{number}.")
        lacking = [each for each in range(layout.weights[weight][0]) if each not in names]
        modules = [f"{before}.{each}.{after}" for each in lacking]
        missing = [module for module in modules if is_target(patch, module)]
        if missing:
            raise PatchError(
                f"{patch.folder} holds LoRAs of {len(names)} of the {layout.weights[weight][0]} experts in "
                f"{weight} of {model}, and nothing for {missing[0]}; it was made for another number of experts"
            )


def is_target(patch: Patch, module: str) -> bool:
    """Return whether a patch's target_modules match a module, as PEFT matches them; raise PatchError if damaged."""
    targets = patch.targets
    if targets is None:
        return False
    if isinstance(targets, str):
        try:
            return re.fullmatch(targets, module) is not None
        except re.error as error:
            raise PatchError(f"{patch.folder}: target_modules {targets!r} is no regular expression; mend it") from error
    return module in targets or module.endswith(tuple(f".{target}" for target in targets))
