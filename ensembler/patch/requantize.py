"""Patch weights of quantised checkpoints block by block: dequantise, add Δ, quantise again, and sum up what is lost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ensembler.errors import MemberError
from ensembler.patch.addition import SumCheck, WeightUpdate, patched, read_tensor
from ensembler.patch.module_patterns import find_modules
from ensembler.patch.patch_device import CPU, block_elements, is_finite
from ensembler.patch.patch_plan import PatchPlan
from ensembler.patch.schemes.quantization_settings import EXPERTS, FUSED
from ensembler.patch.schemes.scheme import QuantizedWeight
from ensembler.safetensors_files import StoredTensor


@dataclass
class Loss:
    """The part of a patch that quantising again takes in one weight: ‖requantised - exact‖ and ‖Δ‖ of its blocks.

    They stay on the device that computes them until the share is asked for.
    """

    errors: list[Tensor] = field(default_factory=list)
    deltas: list[Tensor] = field(default_factory=list)

    @property
    def share(self) -> float:
        """‖requantised - exact‖ / ‖Δ‖: 0 where all of the patch arrived, 1 where the weight might as well be as before.

        0 for a patch that is zero.
        """
        error, delta = _squared(self.errors), _squared(self.deltas)
        return math.sqrt(error / delta) if delta else 0.0


def requantized(
    weight: QuantizedWeight,
    update: WeightUpdate,
    loss: Loss | None = None,
    blocks: Iterable[tuple[int, int]] | None = None,
    device: torch.device = CPU,
) -> Iterator[tuple[str, int, Tensor]]:
    """Yield (part, first row, rows) of W + Δ in the scheme of W, every row of every part; add to `loss`, if given.

    `blocks`: only these of `weight.blocks`. The rows are on the device that computes them. Raises MemberError where a
    scale is damaged, and what `patched` raises, at the end.
    """
    scheme = weight.scheme
    largest = None
    if scheme.needs_largest:
        peaks = [block.exact.abs().max() for block in _blocks(weight, update, None, device)]
        largest = float(torch.stack(peaks).max())
    is_first = True
    for block in _blocks(weight, update, blocks, device):
        new = scheme.quantize(block.exact, block.parts, largest)
        for part, values in block.parts.items():
            if is_first or scheme.part_rows[part]:  # a part of the whole weight is the same for all blocks
                first_row, _ = weight.part_rows(part, block.first, block.last)
                yield part, first_row, new.get(part, values).to(values.dtype)
        is_first = False
        if loss is None:
            continue
        # In the memory of the old values, which are not needed any more.
        loss.deltas.append(torch.linalg.vector_norm(block.old.sub_(block.exact)))
        found = scheme.dequantize({**block.parts, **new})[: len(block.exact)]
        loss.errors.append(torch.linalg.vector_norm(found.sub_(block.exact)))


@dataclass(frozen=True)
class _Block:
    """Units `first` to `last` of a weight: their parts, their values `old` and `exact` = old + Δ, and its first row."""

    first: int
    last: int
    start: int
    parts: Mapping[str, Tensor]
    old: Tensor
    exact: Tensor


def _blocks(
    weight: QuantizedWeight, update: WeightUpdate, blocks: Iterable[tuple[int, int]] | None, device: torch.device
) -> Iterator[_Block]:
    """Yield blocks with their values on a device. They are checked at the end, so that the host waits for it once."""
    turned = _Turned(weight, device) if weight.scheme.is_transposed else None
    check, update = SumCheck(update, torch.float32), update.to(device)
    sums: list[Tensor] = []
    for first, last in weight.blocks(block_elements(device)) if blocks is None else blocks:
        parts = {
            part: read_tensor(stored, *weight.part_rows(part, first, last), device)
            for part, stored in weight.parts.items()
        }
        start, stop = weight.rows_of(first, last)
        old = weight.scheme.dequantize(parts)[: stop - start]
        sums.append(old.sum())
        if turned is None:
            exact = patched(old.clone(), update, dtype=torch.float32, start=start, check=check)
        else:
            exact = patched(old.clone(), turned.rows(update, start, stop), dtype=torch.float32, check=check)
        yield _Block(first, last, start, parts, old, exact)
    if not is_finite(sums):
        file = next(iter(weight.parts.values())).file
        raise MemberError(f"{file}: the codes or scales of {weight.name} hold NaN or infinity; fetch the model again")
    check.close()


class _Turned:
    """Reads the update of a weight that its scheme keeps the other way round: of a stack, one after the other."""

    def __init__(self, weight: QuantizedWeight, device: torch.device) -> None:
        self.shape, self.device = weight.shape[-2:], device
        self.held: dict[tuple[Path, str], tuple[int, Tensor]] = {}

    def rows(self, update: WeightUpdate, start: int, stop: int) -> WeightUpdate:
        """Return the update of rows [start, stop) in the scheme's form; its factors are in that form already."""
        return WeightUpdate(
            None if update.left is None else update.left[start:stop],
            update.right,
            tuple((self._rows(stored, start, stop), scale) for stored, scale in update.full),
            None if update.replacement is None else self._rows(update.replacement, start, stop),
            tuple(replace(part, start=part.start - start) for part in update.parts_in(start, stop)),
        )

    def _rows(self, stored: StoredTensor, start: int, stop: int) -> StoredTensor:
        length, size = self.shape
        key, pieces = (stored.file, stored.name), []
        while start < stop:
            number, at = divmod(start, size)
            if self.held.get(key, (-1,))[0] != number:
                one = read_tensor(stored, number * length, (number + 1) * length, self.device)
                self.held[key] = number, one.T.contiguous()
            pieces.append(self.held[key][1][at : at + stop - start])
            start += len(pieces[-1])
        values = torch.cat(pieces)
        return replace(stored, values=values, shape=tuple(values.shape))


def _squared(norms: Sequence[Tensor]) -> float:
    return float(sum(norm**2 for norm in torch.stack(list(norms)).tolist())) if norms else 0.0


def plain_rows(
    weight: QuantizedWeight,
    update: WeightUpdate,
    dtype: torch.dtype,
    blocks: Iterable[tuple[int, int]] | None = None,
    device: torch.device = CPU,
) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, rows) of W + Δ in a dtype as a plain weight has them, all axes but the last as rows.

    `blocks`: only these of `weight.blocks`, but for a weight that its scheme keeps the other way round: that is turned
    whole, or one of a stack after the other.
    """
    if not weight.scheme.is_transposed:
        check = SumCheck(WeightUpdate(), dtype)
        for block in _blocks(weight, update, blocks, device):
            yield block.start, patched(block.exact, WeightUpdate(), dtype=dtype, check=check)
        check.close()
        return
    rows, columns = weight.shape[-2:]  # of one, which has `columns` rows where it is quantised
    whole = torch.empty(columns, rows, dtype=dtype, device=device)
    check = SumCheck(WeightUpdate(), dtype)
    for block in _blocks(weight, update, None, device):
        done = 0
        while done < len(block.exact):
            number, at = divmod(block.start + done, columns)
            step = min(columns - at, len(block.exact) - done)
            rest = block.exact[done : done + step]
            whole[at : at + step] = patched(rest, WeightUpdate(), dtype=dtype, check=check)
            done += step
            if at + step == columns:
                yield number * rows, whole.T.contiguous()
    check.close()


def kept_weights(plan: PatchPlan, patterns: Sequence[str]) -> list[str]:
    """Return the quantised weights that are to become plain ones: of changed modules those that a pattern matches.

    A pattern is a module's name with * and ?, or the end of one from a dot on: 'down_proj', 'layers.0.*'. Layers that
    servers run as one (q, k and v; gate and up; all experts of a layer) become plain together. Raises ConfigError for a
    pattern that matches nothing.
    """
    names = [name for name in plan.names if name in plan.quantized]
    kept = {name for pattern in patterns for name in find_modules("--keep-bf16", pattern, names, "quantised module")}
    together = {other for name in kept for other in _run_with(name)}
    return [name for name in plan.quantized if name in kept or name in together or _stem(name) in together]


def _run_with(name: str) -> list[str]:
    """Return the weights that run as one with this, or what the names of all such begin with."""
    if EXPERTS in name:
        return [_stem(name)]
    parent, _, last = name.removesuffix(".weight").rpartition(".")
    return [f"{parent}.{each}.weight" for parts in FUSED.values() if last in parts for each in parts]


def _stem(name: str) -> str:
    """Return the name of the experts that a weight belongs to; empty where it is of none."""
    before, found, _ = name.partition(EXPERTS)
    return before + found if found else ""
