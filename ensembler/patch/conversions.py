"""The places of tensors, of files and of patches, in the weights of a loaded model, by the converters of its class.

transformers puts tensors together, cuts and turns them when it loads a model (transformers.core_model_loading). Each
of its operations moves positions along an axis, so that a tensor is a few boxes of the weights it goes to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import core_model_loading
from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist, Transpose, WeightConverter

from ensembler.patch.boxes import Box, Shape, locate, overlap, stack_shape

_MATRICES, _ROWS, _COLUMNS = range(3)
# Operations that transformers has from 5.20 on.
_Split, _Interleave = (getattr(core_model_loading, name, None) for name in ("Split", "Interleave"))
# Linear layers whose rows are those of others, in this order; classes where they are so, by the type of their config.
_PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_PHI = ("phi3", "phi4_multimodal")
_PACKED_TYPES = {
    "qkv_proj": _PHI,
    "gate_up_proj": (*_PHI, "glm", "glm4", "glm4v_text", "glm_image_text", "glm_ocr_text"),
}


@dataclass(frozen=True)
class Link:
    """The box `own` of a tensor is the box `inside` of a loaded weight; `turned`: with rows and columns exchanged."""

    weight: str
    own: Box
    inside: Box
    turned: bool = False


class UnknownConversion(Exception):
    """A tensor whose boxes cannot be derived. The message is the reason: the rest of a sentence."""


@dataclass(frozen=True)
class Place:
    """The weight that a tensor goes to, or the first of several, with its converter and the expert's `number`."""

    weight: str
    converter: WeightConverter | None = None
    pattern: str = ""
    number: int | None = None


@dataclass
class Conversions:
    """The conversions of one class: `weights` are the shapes of its loaded weights, in the order of the class.

    `model_type` of its config, None for a class that transformers does not have; `head_rows`: rows of q, and of k or v;
    `place`: where a tensor of some name goes, or its own name.
    """

    weights: Mapping[str, Shape]
    model_type: str | None
    head_rows: tuple[int, int]
    place: Callable[[str], Place]
    _places: dict[str, Place] = field(default_factory=dict)

    def links(self, shapes: Mapping[str, Shape]) -> tuple[dict[str, list[Link]], dict[str, str]]:
        """Return the links of tensors with these names and shapes, and for others the reason why there are none.

        A name without a reason is simply not known to the class.
        """
        sizes = {}
        for name, shape in shapes.items():
            place = self.place_of(name)
            if place.converter is not None:
                sizes[place.weight, place.pattern] = shape
        found: dict[str, list[Link]] = {}
        reasons: dict[str, str] = {}
        for name, shape in shapes.items():
            try:
                if links := self._links_of(name, shape, sizes):
                    found[name] = links
            except UnknownConversion as reason:
                reasons[name] = str(reason)
        return found, reasons

    def place_of(self, name: str) -> Place:
        """Return where a tensor goes when it is loaded."""
        if name not in self._places:
            self._places[name] = self.place(name)
        return self._places[name]

    def targets(self, name: str) -> list[str]:
        """Return the weights that a tensor goes to."""
        place = self.place_of(name)
        if place.converter is None:
            return [place.weight]
        return [place.weight, *(place.weight.replace(*pair) for pair in _other_targets(place.converter))]

    def _links_of(self, name: str, shape: Shape, sizes: Mapping[tuple[str, str], Shape]) -> list[Link]:
        place = self.place_of(name)
        if place.converter is not None and place.weight in self.weights:
            return self._converted(name, shape, place, sizes)
        if place.weight in self.weights:
            expected = self.weights[place.weight]
            if len(expected) not in (2, 3):
                return []
            if len(shape) == 3 and len(expected) == 3 and shape[1:] == expected[1:] and shape != expected:
                raise UnknownConversion(f"is of {shape[0]} experts, and {place.weight} has {expected[0]}")
            if stack_shape(shape) != stack_shape(expected):
                raise UnknownConversion(f"has shape {shape}, and {place.weight} has {expected}")
            return [Link(place.weight, Box.whole(shape), Box.whole(shape))]
        return self._packed(name, shape)

    def _converted(self, name: str, shape: Shape, place: Place, sizes: Mapping[tuple[str, str], Shape]) -> list[Link]:
        """Follow a tensor through the operations of its converter."""
        assert place.converter is not None
        if len(shape) not in (2, 3):
            raise UnknownConversion(f"has {len(shape)} axes, and goes into {place.weight}")
        routes = [_Route.start(place.weight, shape)]
        for operation in place.converter.operations:
            routes = [new for route in routes for new in self._after(route, operation, place, sizes)]
        for route in routes:
            expected = self.weights[route.weight]
            is_inside = len(expected) == len(route.axes) and all(
                size in (None, length) for size, length in zip(route.sizes, expected, strict=True)
            )
            if not is_inside:
                raise UnknownConversion(f"of shape {shape} does not fit into {route.weight} of shape {expected}")
            if place.number is not None and place.number >= expected[0]:
                raise UnknownConversion(f"is of expert {place.number}, and {route.weight} has {expected[0]} experts")
        return [route.link() for route in routes]

    def _after(
        self, route: _Route, operation: Any, place: Place, sizes: Mapping[tuple[str, str], Shape]
    ) -> list[_Route]:
        """Return the routes of a tensor after an operation, which may cut it. Raises UnknownConversion."""
        kind = type(operation)
        if kind is MergeModulelist and operation.dim == 0 and place.number is not None and len(route.axes) == 2:
            return [route.stacked(place.number)]
        if kind is Concatenate and operation.num_shards_attribute is None:
            patterns = [] if place.converter is None else place.converter.source_patterns
            sizes_there = [sizes.get((place.weight, each)) for each in patterns]
            axis, own = route.axes[operation.dim].number, route.sizes[operation.dim]
            lengths = [own if shape is None else stack_shape(shape)[axis] for shape in sizes_there]
            return [route.shifted(operation.dim, lengths, patterns.index(place.pattern))]
        if kind is Transpose:
            is_as_expected = operation.check_dims and route.sizes == list(self.weights[place.weight])
            return [route if is_as_expected else route.turned(operation.dim0, operation.dim1)]
        if kind is _Interleave:
            return route.interleaved(operation.dim, inverse=operation.inverse)
        if kind is _Split or (kind is Chunk and operation.num_shards_attribute is None):
            targets = self.targets_of(place)
            length = route.sizes[operation.dim]
            if length is not None and kind is Chunk and length % len(targets) == 0:
                return route.cut(operation.dim, targets, [length // len(targets)] * len(targets))
            if kind is _Split:
                return route.cut(operation.dim, targets, [self.weights[each][operation.dim] for each in targets])
        raise UnknownConversion(f"is changed by {operation} when it is loaded, which is not known here")

    def targets_of(self, place: Place) -> list[str]:
        """Return the weights that a converter makes, in its order. Raises UnknownConversion."""
        others = [] if place.converter is None else _other_targets(place.converter)
        targets = [place.weight, *(place.weight.replace(*pair) for pair in others)]
        unknown = [target for target in targets if target not in self.weights]
        if unknown:
            raise UnknownConversion(f"goes into {unknown[0]}, which the class does not have")
        return targets

    def _find(self, name: str) -> str | None:
        """Return the loaded name of a matrix that lies in files as it is loaded, or None."""
        place = self.place_of(name)
        return place.weight if place.converter is None and len(self.weights.get(place.weight, ())) == 2 else None

    def _packed(self, name: str, shape: Shape) -> list[Link]:
        """Return the links between layers and one that has the rows of all of them, as in Phi-3."""
        parent, _, module = name.removesuffix(".weight").rpartition(".")
        if not name.endswith(".weight") or len(shape) != 2 or self.model_type is None:
            return []
        if module in _PACKED:
            weights = [self._find(f"{parent}.{each}.weight") for each in _PACKED[module]]
            return self._unpacked(shape, [each for each in weights if each is not None]) if all(weights) else []
        for packed, modules in _PACKED.items():
            weight = self._find(f"{parent}.{packed}.weight") if module in modules else None
            if weight is not None:
                return [self._rows_of(shape, weight, packed, modules.index(module))]
        return []

    def _unpacked(self, shape: Shape, weights: Sequence[str]) -> list[Link]:
        """Return the links of a matrix that has the rows of all these weights."""
        boxes = [Box.whole(self.weights[each]) for each in weights]
        expected = sum(len(box.rows) for box in boxes), len(boxes[0].columns)
        if shape != expected:
            raise UnknownConversion(f"has shape {shape}, and {', '.join(weights)} have {expected} together")
        links, start = [], 0
        for weight, box in zip(weights, boxes, strict=True):
            stop = start + len(box.rows)
            links.append(Link(weight, replace(box, rows=range(start, stop)), box))
            start = stop
        return links

    def _rows_of(self, shape: Shape, weight: str, packed: str, number: int) -> Link:
        """Return the link of a layer that is some rows of a packed weight."""
        if self.model_type not in _PACKED_TYPES[packed]:
            raise UnknownConversion(
                f"may be in {weight}, whose order of rows in a model of type {self.model_type!r} is not known"
            )
        rows, columns = self.weights[weight]
        heads, groups = self.head_rows
        lengths = [heads, groups, groups] if packed == "qkv_proj" else [rows // 2] * 2
        expected = (lengths[number], columns)
        if shape != expected or sum(lengths) != rows:
            raise UnknownConversion(f"has shape {shape}, and its rows in {weight} have {expected}")
        start = sum(lengths[:number])
        inside = Box(range(1), range(start, start + lengths[number]), range(columns))
        return Link(weight, Box.whole(shape), inside)


@dataclass(frozen=True)
class _Axis:
    """An axis of a tensor on its way: the positions `own` along axis `number` of the source are at `at` now."""

    number: int
    own: range
    at: range

    def part(self, positions: range) -> _Axis | None:
        """Return the axis with those of its positions alone, or None."""
        at = overlap(self.at, positions)
        return replace(self, own=locate(at, self.at, self.own), at=at) if at else None

    def moved(self, by: int, scale: int = 1, divisor: int = 1) -> _Axis:
        """Return the axis at positions · scale / divisor + by."""
        places = [at * scale // divisor + by for at in (self.at[0], self.at[-1])]
        step = max(1, self.at.step * scale // divisor)
        return replace(self, at=range(places[0], places[1] + 1, step))


@dataclass(frozen=True)
class _Route:
    """A part of a tensor on its way to a weight: its axes, and the sizes of the tensor now, where they are known."""

    weight: str
    axes: tuple[_Axis, ...]
    sizes: list[int | None]

    @classmethod
    def start(cls, weight: str, shape: Shape) -> _Route:
        first = _ROWS if len(shape) == 2 else _MATRICES
        axes = tuple(_Axis(first + number, range(size), range(size)) for number, size in enumerate(shape))
        return cls(weight, axes, list(shape))

    def link(self) -> Link:
        own = {axis.number: axis.own for axis in self.axes}
        at = [axis.at for axis in self.axes]
        rows_first = [axis.number for axis in self.axes if axis.number != _MATRICES] == [_ROWS, _COLUMNS]
        if len(at) == 3 and self.axes[0].number != _MATRICES:
            raise UnknownConversion(f"is turned with its experts on the way to {self.weight}")
        inside = Box(*([range(1)] if len(at) == 2 else []), *at)
        return Link(
            self.weight, Box(own.get(_MATRICES, range(1)), own[_ROWS], own[_COLUMNS]), inside, turned=not rows_first
        )

    def stacked(self, number: int) -> _Route:
        axis = _Axis(_MATRICES, range(1), range(number, number + 1))
        return replace(self, axes=(axis, *self.axes), sizes=[None, *self.sizes])

    def shifted(self, dim: int, lengths: list[int | None], number: int) -> _Route:
        if None in lengths:
            raise UnknownConversion("is put behind tensors of unknown size")
        known = [length for length in lengths if length is not None]
        return self._with(dim, self.axes[dim].moved(sum(known[:number])), sum(known))

    def turned(self, first: int, second: int) -> _Route:
        order = list(range(len(self.axes)))
        order[first], order[second] = order[second], order[first]
        return replace(self, axes=tuple(self.axes[at] for at in order), sizes=[self.sizes[at] for at in order])

    def interleaved(self, dim: int, *, inverse: bool) -> list[_Route]:
        """Even positions first and odd ones behind them, or the other way round."""
        length = self.sizes[dim]
        if length is None or length % 2:
            raise UnknownConversion(f"is interleaved along an axis of {length} on the way to {self.weight}")
        half, axis = length // 2, self.axes[dim]
        found = []
        for number in range(2):
            if inverse:
                part = axis.part(range(number * half, (number + 1) * half))
                moved = None if part is None else part.moved(number - 2 * number * half, 2)
            else:
                part = axis.part(range(number, length, 2))
                moved = None if part is None else part.moved(number * half, 1, 2)
            if moved is not None:
                found.append(self._with(dim, moved, length))
        return found

    def cut(self, dim: int, weights: Iterable[str], lengths: list[int]) -> list[_Route]:
        if self.sizes[dim] != sum(lengths):
            raise UnknownConversion(f"has {self.sizes[dim]} positions to cut into {lengths}")
        found, start = [], 0
        for weight, length in zip(weights, lengths, strict=True):
            part = self.axes[dim].part(range(start, start + length))
            if part is not None:
                found.append(replace(self._with(dim, part.moved(-start), length), weight=weight))
            start += length
        return found

    def _with(self, dim: int, axis: _Axis, size: int) -> _Route:
        axes, sizes = list(self.axes), list(self.sizes)
        axes[dim], sizes[dim] = axis, size
        return replace(self, axes=tuple(axes), sizes=sizes)


def _other_targets(converter: WeightConverter) -> list[tuple[str, str]]:
    first, *others = converter.target_patterns
    return [(first, other) for other in others]
