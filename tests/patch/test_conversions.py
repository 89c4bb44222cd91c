"""Boxes, links and pieces against transformers' own operations on values."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    MergeModulelist,
    PermuteForRope,
    Split,
    Transpose,
    WeightConverter,
)

from ensembler.patch.addition import load_update, patched
from ensembler.patch.boxes import Box, locate, overlap, stack_shape
from ensembler.patch.conversions import Conversions, Link, Place
from ensembler.patch.formats import Patch
from ensembler.patch.lora_fitting import cut_loras
from ensembler.patch.low_rank import LowRank
from ensembler.patch.model_layout import ModelLayout
from ensembler.safetensors_files import StoredTensor

RANGES = st.builds(range, st.integers(0, 20), st.integers(0, 40), st.integers(1, 5))
EXPERTS, ROWS, COLUMNS = 3, 4, 6
STACKS = ["gate.*.weight", "up.*.weight"]


@given(RANGES, RANGES)
def test_positions_in_two_ranges(first: range, second: range) -> None:
    assert list(overlap(first, second)) == sorted({*first} & {*second})


@given(RANGES, RANGES, st.integers(0, 9), st.integers(1, 4))
def test_positions_in_another_range(first: range, second: range, start: int, step: int) -> None:
    other = range(start, start + step * len(first), step)
    part = overlap(first, second)
    assert list(locate(part, first, other)) == [other[first.index(at)] for at in part]


def box_of(values: Tensor, box: Box) -> Tensor:
    stack = values if values.dim() == 3 else values.unsqueeze(0)
    return stack[list(box.matrices)][:, list(box.rows)][:, :, list(box.columns)]


def chains(draw: Any) -> tuple[WeightConverter, dict[str, Tensor]]:
    """Return a converter, and tensors for its sources by their names."""
    kind = draw(st.sampled_from(["experts", "one", "together", "chunk", "split", "turn", "weave", "cut-woven", "all"]))
    rows, columns, experts = (2 * draw(st.integers(1, 3)) for _ in range(3))
    few = draw(st.integers(1, 3))
    stack = {f"{name}.{number}.weight": (rows, columns) for name in ("gate", "up") for number in range(few)}
    shapes: dict[str, tuple[int, ...]]
    if kind == "experts":
        converter = WeightConverter(STACKS, "both", [MergeModulelist(dim=0), Concatenate(dim=1)])
        shapes = stack
    elif kind == "all":
        converter = WeightConverter(STACKS, "both", [MergeModulelist(dim=0), Concatenate(dim=1), Transpose(1, 2)])
        shapes = stack
    elif kind == "one":
        converter = WeightConverter(STACKS[0], "both", [MergeModulelist(dim=0)])
        shapes = {name: shape for name, shape in stack.items() if name.startswith("gate")}
    elif kind == "together":
        converter = WeightConverter(["q.weight", "k.weight", "v.weight"], "both", [Concatenate(dim=0)])
        shapes = {"q.weight": (2 * rows, columns), "k.weight": (rows, columns), "v.weight": (rows, columns)}
    elif kind in ("chunk", "split"):
        operation = Chunk(dim=0) if kind == "chunk" else Split(dim=0)
        converter = WeightConverter("both", ["q.weight", "k.weight", "v.weight"], [operation])
        shapes = {"both": (3 * rows, columns)}
    elif kind == "turn":
        converter = WeightConverter("both", "other", [Transpose(1, 2)])
        shapes = {"both": (experts, rows, columns)}
    elif kind == "weave":
        converter = WeightConverter(
            "both", "other", [Interleave(dim=draw(st.sampled_from([1, 2])), inverse=draw(st.booleans()))]
        )
        shapes = {"both": (experts, rows, columns)}
    else:
        converter = WeightConverter("both", ["q.weight", "k.weight"], [Interleave(dim=0), Chunk(dim=0)])
        shapes = {"both": (rows, columns)}
    return converter, {name: torch.rand(shape) for name, shape in shapes.items()}


class Sizes:
    """The part of a model that `Split` asks for."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def get_parameter(self, name: str) -> nn.Parameter:
        return nn.Parameter(torch.empty(self.shapes[name]))


def pattern_of(name: str, converter: WeightConverter) -> tuple[str, int | None]:
    for pattern in converter.source_patterns:
        before, star, after = pattern.partition("*")
        if name == pattern:
            return pattern, None
        if star and name.startswith(before) and name.endswith(after):
            return pattern, int(name.removeprefix(before).removesuffix(after))
    raise AssertionError(name)


def convert(converter: WeightConverter, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run the operations of transformers on values."""
    first = next(iter(tensors.values()))
    rows = first.shape[0] // 3
    model = Sizes(dict.fromkeys(("q.weight", "k.weight", "v.weight"), (rows, first.shape[1])))
    collected: dict[str, Any] = {}
    for name, values in tensors.items():
        collected.setdefault(pattern_of(name, converter)[0], []).append(values)
    for operation in converter.operations:
        collected = operation.convert(
            collected,
            source_patterns=converter.source_patterns,
            target_patterns=converter.target_patterns,
            full_layer_name=converter.target_patterns[0],
            model=model,
        )
    return {name: values[0] if isinstance(values, list) else values for name, values in collected.items()}


def conversions_of(converter: WeightConverter, loaded: dict[str, Tensor]) -> Conversions:
    def place(name: str) -> Place:
        if name in loaded:
            return Place(name)
        pattern, number = pattern_of(name, converter)
        return Place(converter.target_patterns[0], converter, pattern, number)

    return Conversions({name: tuple(v.shape) for name, v in loaded.items()}, "llama", (0, 0), place)


@given(st.data())
@settings(deadline=None)
def test_links_are_what_the_operations_do(data: st.DataObject) -> None:
    converter, tensors = chains(data.draw)
    loaded = convert(converter, tensors)
    conversions = conversions_of(converter, loaded)
    found, reasons = conversions.links({name: tuple(values.shape) for name, values in tensors.items()})
    assert not reasons
    assert found.keys() == tensors.keys()
    seen = {name: torch.zeros(values.shape) for name, values in loaded.items()}
    for name, links in found.items():
        for link in links:
            own = box_of(tensors[name], link.own)
            assert torch.equal(box_of(loaded[link.weight], link.inside), own.mT if link.turned else own)
            stack = seen[link.weight] if seen[link.weight].dim() == 3 else seen[link.weight].unsqueeze(0)
            stack[link.inside.matrices[0] : link.inside.matrices[-1] + 1 : 1][
                :, slice(link.inside.rows[0], link.inside.rows[-1] + 1, link.inside.rows.step)
            ][:, :, slice(link.inside.columns[0], link.inside.columns[-1] + 1, link.inside.columns.step)] += 1
    assert all((count == 1).all() for count in seen.values())  # every value comes from one place


def test_a_stack_that_is_loaded_as_it_is() -> None:
    loaded = {"stack": torch.rand(EXPERTS, ROWS, COLUMNS)}
    conversions = conversions_of(WeightConverter(STACKS, "stack", [MergeModulelist()]), loaded)
    box = Box(range(EXPERTS), range(ROWS), range(COLUMNS))
    assert conversions.links({"stack": (EXPERTS, ROWS, COLUMNS)}) == ({"stack": [Link("stack", box, box)]}, {})


@pytest.mark.parametrize(
    ("operations", "shape", "reason"),
    [
        (
            [MergeModulelist(dim=0), Concatenate(dim=1)],
            (ROWS + 1, COLUMNS),
            r"of shape \(5, 6\) does not fit into both of shape",
        ),
        (
            [MergeModulelist(dim=0), Concatenate(dim=1)],
            (ROWS, COLUMNS + 1),
            r"does not fit into both of shape \(3, 8, 6\)",
        ),
        (
            [PermuteForRope()],
            (ROWS, COLUMNS),
            "is changed by PermuteForRope when it is loaded, which is not known here",
        ),
    ],
)
def test_reasons_name_what_does_not_fit(operations: list[Any], shape: tuple[int, int], reason: str) -> None:
    converter = WeightConverter(STACKS, "both", operations)
    conversions = conversions_of(converter, {"both": torch.empty(EXPERTS, 2 * ROWS, COLUMNS)})
    links, reasons = conversions.links({"gate.0.weight": shape})
    assert not links
    (found,) = reasons.values()
    assert re.search(reason, found), found


def test_an_expert_too_many() -> None:
    converter = WeightConverter(STACKS, "both", [MergeModulelist(dim=0), Concatenate(dim=1)])
    conversions = conversions_of(converter, {"both": torch.empty(EXPERTS, 2 * ROWS, COLUMNS)})
    _, reasons = conversions.links({"gate.3.weight": (ROWS, COLUMNS)})
    assert reasons == {"gate.3.weight": "is of expert 3, and both has 3 experts"}


def lora_of(name: str, shape: tuple[int, ...], rank: int) -> tuple[LowRank, Tensor]:
    """Return random factors of a matrix or a stack as PEFT has them, in memory, and Δ in fp64."""
    num, rows, columns = stack_shape(shape)
    a, b = torch.randn(num * rank, columns), torch.randn(rows, rank * num)
    stored = [
        StoredTensor(f"{name}.lora_{end}", Path(), "F32", tuple(values.shape), 0, values.nbytes, values)
        for end, values in (("A", a), ("B", b))
    ]
    by_matrix = b.double().reshape(rows, rank, num)
    delta = 0.5 * torch.einsum("ore,eri->eoi", by_matrix, a.double().reshape(num, rank, columns))
    return LowRank(*stored, 0.5, transposed=False, num_matrices=num), delta.view(shape)


def cut(loras: dict[str, LowRank], shapes: dict[str, tuple[int, ...]], conversions: Conversions) -> Patch:
    layout = ModelLayout(conversions.weights, {}, frozenset(), {}, {}, frozenset(), conversions)
    patch = Patch(Path("patch"), loras, {}, {}, {}, None, None, None, ())
    found = cut_loras(patch, list(loras), shapes, layout, Path("model"))
    assert found.tensors.keys() == loras.keys()
    assert not found.reasons
    return replace(patch, low_rank=found.low_rank, pieces=found.pieces)


@pytest.mark.parametrize("to", ["loaded", "files"])
@given(st.data())
@settings(deadline=None)
def test_pieces_add_what_the_operations_would_make_of_the_whole(to: str, data: st.DataObject) -> None:
    """LoRAs of the tensors in files, added to loaded weights, or the reverse; any rows at a time."""
    converter, files = chains(data.draw)
    loaded = convert(converter, files)
    conversions = conversions_of(converter, loaded)
    sources, targets = (files, loaded) if to == "loaded" else (loaded, files)
    loras, deltas = {}, {}
    for name, values in sources.items():
        loras[name], deltas[name] = lora_of(name, tuple(values.shape), data.draw(st.integers(1, 3)))
    patch = cut(loras, {name: tuple(values.shape) for name, values in targets.items()}, conversions)
    found = {}
    for name, values in targets.items():
        matrix = torch.zeros(values.shape).view(-1, values.shape[-1])
        update = load_update([patch], name)
        step = data.draw(st.integers(1, len(matrix)))
        for start in range(0, len(matrix), step):
            matrix[start : start + step] = patched(
                matrix[start : start + step], update, dtype=torch.float32, start=start
            )
        found[name] = matrix.view(values.shape)
    if to == "loaded":
        expected = convert(converter, deltas)
    else:
        found, expected = convert(converter, found), deltas
    for name, values in expected.items():
        torch.testing.assert_close(found[name].double(), values, atol=1e-5, rtol=1e-5)
