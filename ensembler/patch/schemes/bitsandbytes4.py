"""bitsandbytes' four-bit weights (nf4 and fp4, Dettmers et al. 2023, arXiv 2305.14314): codes by a table, a largest
magnitude for every 64 values, which with double quantisation are codes of eight bits themselves.

A block keeps its magnitude, or gets that of its new values, whichever leaves the smaller squared error; with double
quantisation all blocks that share a second magnitude do so together.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ensembler.patch.schemes.scheme import Parts, Scheme

CODES, MAGNITUDE, TABLE = "codes", "magnitude", "table"
SECOND_MAGNITUDE, SECOND_TABLE, STATE = "second_magnitude", "second_table", "state"


class FourBit(Scheme):
    """Values row by row in blocks of `block`; `second_block` of these share a second magnitude (None: there is none).

    `codes` uint8 (n / 2, 1) with the earlier value in the high four bits; `magnitude` (n / block,) fp32, or uint8 codes
    of `second_table` whose values times `second_magnitude` plus `offset` are the magnitudes.
    """

    def __init__(self, columns: int, block: int, second_block: int | None, offset: float, kind: str) -> None:
        self.columns, self.block, self.second_block, self.offset = columns, block, second_block, offset
        together = block * (second_block or 1)
        self.unit = together // math.gcd(columns, together)
        num = self.unit * columns
        self.part_rows = {CODES: num // 2, MAGNITUDE: num // block, TABLE: 0, STATE: 0}
        if second_block is not None:
            self.part_rows |= {SECOND_MAGNITUDE: num // together, SECOND_TABLE: 0}
        self.label = f"{kind} in blocks of {block} (bitsandbytes)"

    def dequantize(self, parts: Parts) -> Tensor:
        packed = parts[CODES].flatten().int()
        values = parts[TABLE].flatten()[torch.stack([packed >> 4, packed & 15], 1).flatten()]
        num = len(values) // self.columns * self.columns  # without the half byte of an odd end
        blocks = _in_blocks(values[:num], self.block)
        return blocks.mul_(self._magnitudes(parts).unsqueeze(1)).flatten()[:num].view(-1, self.columns)

    def quantize(self, values: Tensor, parts: Parts, largest: float | None = None) -> dict[str, Tensor]:
        blocks = _in_blocks(values.flatten(), self.block)
        new = self._stored(blocks.abs().amax(1), parts)
        old = {name: parts[name].flatten() for name in new}
        table = parts[TABLE].flatten()
        codes, error = self._nearest(blocks, self._magnitudes(parts), table)
        new_codes, new_error = self._nearest(blocks, self._magnitudes({**parts, **new}), table)
        of_choice = self.second_block or 1
        is_better = _in_blocks(new_error, of_choice).sum(1) < _in_blocks(error, of_choice).sum(1)
        of_block = is_better.repeat_interleave(of_choice)[: len(blocks)]
        found = torch.where(of_block.unsqueeze(1), new_codes, codes).flatten()[: values.numel()]
        pairs = _in_blocks(found, 2)
        chosen = {CODES: (pairs[:, 0] << 4 | pairs[:, 1]).unsqueeze(1)}
        for name, magnitude in new.items():
            chosen[name] = torch.where(of_block if name == MAGNITUDE else is_better, magnitude, old[name])
        return chosen

    def _magnitudes(self, parts: Parts) -> Tensor:
        stored = parts[MAGNITUDE].flatten()
        if self.second_block is None:
            return stored
        values = _in_blocks(parts[SECOND_TABLE].flatten()[stored.int()], self.second_block)
        return values.mul_(parts[SECOND_MAGNITUDE].view(-1, 1)).add_(self.offset).flatten()[: len(stored)]

    def _stored(self, magnitudes: Tensor, parts: Parts) -> dict[str, Tensor]:
        """Return the magnitudes as their parts on disk."""
        if self.second_block is None:
            return {MAGNITUDE: magnitudes}
        shifted = _in_blocks(magnitudes - self.offset, self.second_block)
        second = shifted.abs().amax(1)
        table = parts[SECOND_TABLE].flatten()
        codes = _nearest_in(table, shifted / torch.where(second == 0, 1, second).unsqueeze(1))
        return {MAGNITUDE: codes.flatten()[: len(magnitudes)], SECOND_MAGNITUDE: second}

    def _nearest(self, blocks: Tensor, magnitudes: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes (blocks, block) uint8 nearest to the values, and each block's squared error."""
        each = magnitudes.unsqueeze(1)
        codes = _nearest_in(table, blocks / torch.where(each == 0, 1, each))
        return codes, (table[codes.int()] * each).sub_(blocks).square_().sum(1)


def _nearest_in(table: Tensor, values: Tensor) -> Tensor:
    """Return the places uint8 of the entries of a table that are nearest to values."""
    entries, places = table.sort(stable=True)  # of two equal entries any device takes the same
    return places.to(torch.uint8)[torch.bucketize(values, (entries[1:] + entries[:-1]) / 2)]


def _in_blocks(values: Tensor, size: int) -> Tensor:
    """Return (blocks, size) of values in a row, with zeros behind the last."""
    return torch.nn.functional.pad(values, (0, -len(values) % size)).view(-1, size)
