"""Check a patched model against its base and patch: a sample of blocks of every tensor is computed again."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ensembler.errors import RunError
from ensembler.files import reading
from ensembler.patch.addition import DTYPES, WeightUpdate, block_rows, patched, planned_update, read_tensor
from ensembler.patch.patch_device import BLOCK_ELEMENTS, CPU, block_elements, memory_of, on_host
from ensembler.patch.patch_plan import PatchPlan
from ensembler.patch.requantize import plain_rows, requantized
from ensembler.patch.schemes.quantization_settings import scales_of
from ensembler.patch.schemes.scheme import QuantizedWeight
from ensembler.safetensors_files import FLOATS, StoredModel, StoredTensor, listed, read_model

Block = TypeVar("Block")
Pieces = Iterator[tuple[str, int, bytes]]
"""Name of a tensor, first byte, and bytes as they should be."""


@dataclass(frozen=True)
class Verified:
    """Numbers of tensors, and of blocks of these, that were computed again and found equal, bit by bit."""

    num_tensors: int
    num_blocks: int


def verify_applied(
    plan: PatchPlan,
    out: Path,
    *,
    num_blocks: int = 3,
    seed: int = 0,
    device: torch.device = CPU,
    advance: Callable[[int], None] = lambda num: None,
) -> Verified:
    """Compute blocks of base + patch again and compare them with those of the model in `out`, bit by bit.

    Of every tensor the first block and the last, and others by chance, `num_blocks` in all. Quantised weights are
    quantised again; those that are plain in `out` are compared as such, and other dtypes than the base's as well.
    `device`: that which wrote `out`, since others may round sums otherwise. `advance` is called with numbers of tensors
    of the base. Raises RunError where tensors are missing or differ.
    """
    found = read_model(out)
    kept = [weight for weight in plan.quantized.values() if _is_plain(weight, found)]
    expected = _expected(plan, kept)
    missing, more = sorted(expected.keys() - found.tensors.keys()), sorted(found.tensors.keys() - expected.keys())
    if missing or more:
        parts = [f"lacks {listed(missing)}"] if missing else []
        parts += [f"has {listed(more)} beside"] if more else []
        raise RunError(f"{out} {' and '.join(parts)}: it is not {plan.model.folder} with a patch; apply it again")
    wrong = {name for name, tensor in expected.items() if not _has_form(found.tensors[name], tensor)}
    num = 0
    with _one_thread(), memory_of(device):
        for num_tensors, pieces in _recomputed(plan, kept, found, _Sample(num_blocks, seed, device)):
            for name, start, piece in pieces:
                num += 1
                if _read(found.tensors[name], start, len(piece)) != piece:
                    wrong.add(name)
            advance(num_tensors)
    if wrong:
        raise RunError(
            f"{out} is not {plan.model.folder} with the patch at these strengths: {len(wrong):,} of {len(expected):,} "
            f"tensors differ, {listed(sorted(wrong))}; give the --scale, --also and --transport that apply was given, "
            "or apply it again"
        )
    return Verified(len(expected), num)


def _is_plain(weight: QuantizedWeight, found: StoredModel) -> bool:
    """Return whether a weight that the base has quantised is a plain one in the model that was found."""
    stored = found.tensors.get(weight.name)
    return stored is not None and stored.dtype in DTYPES


def _expected(plan: PatchPlan, kept: list[QuantizedWeight]) -> dict[str, StoredTensor]:
    """Return the tensors that the patched model should have, in the base's dtypes where these may change."""
    expected = dict(plan.model.tensors)
    for weight in kept:
        for part in weight.parts.values():
            del expected[part.name]
        expected[weight.name] = StoredTensor(weight.name, Path(), "BF16", weight.shape, 0, 2 * weight.num_elements)
    for name in scales_of({weight.name.removesuffix(".weight") for weight in kept}, expected):
        del expected[name]
    return expected


def _has_form(found: StoredTensor, expected: StoredTensor) -> bool:
    """Return whether a tensor has its shape, and its dtype or another one that --dtype takes."""
    is_cast = found.dtype in FLOATS.values() and expected.dtype in FLOATS.values()
    return found.shape == expected.shape and (found.dtype == expected.dtype or is_cast)


def _recomputed(
    plan: PatchPlan, kept: list[QuantizedWeight], found: StoredModel, sample: _Sample
) -> Iterator[tuple[int, Pieces]]:
    """Yield how many tensors of the base were done, and pieces of those that they are in the patched model."""
    changed, names = set(plan.names), {weight.name for weight in kept}
    parts = {part.name for weight in plan.quantized.values() for part in weight.parts.values()}
    for name, tensor in plan.model.tensors.items():
        if name not in parts and name in found.tensors:  # scales of what is plain in the patched model are not
            update = planned_update(plan, name) if name in changed else None
            yield 1, _plain(tensor, found.tensors[name], update, sample)
    for weight in plan.quantized.values():
        if weight.name in names:
            update = planned_update(plan, weight.name) if weight.name in changed else WeightUpdate()
            yield len(weight.parts), _kept(weight, found.tensors[weight.name], update, sample)
        elif weight.name in changed:
            yield len(weight.parts), _quantized(weight, planned_update(plan, weight.name), sample)
        else:
            for part in weight.parts.values():
                yield 1, _same(part, sample)


def _plain(tensor: StoredTensor, target: StoredTensor, update: WeightUpdate | None, sample: _Sample) -> Pieces:
    if tensor.dtype not in DTYPES or (update is None and target.dtype == tensor.dtype):
        yield from _same(tensor, sample)
        return
    rows, columns = tensor.matrix
    dtype = DTYPES.get(target.dtype, DTYPES[tensor.dtype])
    step = max(1, block_rows(rows, columns, sample.device))
    update = (update or WeightUpdate()).to(sample.device)
    for start in sample.of(range(0, rows if columns else 0, step)):
        block = read_tensor(tensor, start, min(start + step, rows), sample.device)
        values = patched(block, update, dtype=dtype, start=start)
        yield tensor.name, start * columns * values.itemsize, _bytes(values)


def _same(tensor: StoredTensor, sample: _Sample) -> Pieces:
    for start in sample.of(range(0, tensor.num_bytes, 4 * BLOCK_ELEMENTS)):
        yield tensor.name, start, _read(tensor, start, min(4 * BLOCK_ELEMENTS, tensor.num_bytes - start))


def _quantized(weight: QuantizedWeight, update: WeightUpdate, sample: _Sample) -> Pieces:
    blocks = sample.of([*weight.blocks(block_elements(sample.device))])
    for part, start, rows in requantized(weight, update, blocks=blocks, device=sample.device):
        stored = weight.parts[part]
        yield stored.name, start * (stored.num_bytes // max(1, stored.matrix[0])), _bytes(rows)


def _kept(weight: QuantizedWeight, target: StoredTensor, update: WeightUpdate, sample: _Sample) -> Pieces:
    blocks = sample.of(list(weight.blocks(block_elements(sample.device))))
    for start, rows in plain_rows(weight, update, DTYPES[target.dtype], blocks, sample.device):
        yield weight.name, start * rows.shape[1] * rows.itemsize, _bytes(rows)


def _bytes(rows: Tensor) -> bytes:
    return bytes(on_host(rows).reshape(-1).view(torch.uint8).numpy().tobytes())


def _read(tensor: StoredTensor, start: int, num_bytes: int) -> bytes:
    with reading(tensor.file), tensor.file.open("rb", buffering=0) as file:
        file.seek(tensor.start + start)
        return file.read(min(num_bytes, tensor.num_bytes - start))


class _Sample:
    """Chooses `num` of the blocks of each tensor on a device: the first, the last, and others by chance."""

    def __init__(self, num: int, seed: int, device: torch.device) -> None:
        self.num, self.random, self.device = num, random.Random(seed), device

    def of(self, blocks: Sequence[Block]) -> list[Block]:
        """Return some of the blocks, in their order."""
        ends = [0, len(blocks) - 1][: self.num] if len(blocks) > 1 else range(len(blocks))
        rest = range(1, len(blocks) - 1)
        others = self.random.sample(rest, min(len(rest), max(0, self.num - len(ends))))
        return [blocks[index] for index in sorted({*ends, *others})]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with one thread, as `apply` does: sums in another order could be rounded otherwise."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
