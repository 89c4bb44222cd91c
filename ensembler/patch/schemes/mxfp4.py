"""MXFP4 (OCP Microscaling Formats 1.0, 2023): 32 values of four bits (E2M1) share a scale that is a power of two.

A block gets the exponent that leaves the smaller squared error: the one it had, or that of its new largest value.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ensembler.patch.schemes.scheme import Parts, Scheme, power_of_two

BLOCKS, SCALES = "blocks", "scales"
BLOCK = 32
_BIAS = 127
_LARGEST_EXPONENT = 2  # of E2M1: 6 is 1.5 · 2²
_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_MIDDLES = (_VALUES[1:] + _VALUES[:-1]) / 2
VALUES = torch.cat([_VALUES, -_VALUES])


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the values of the codes and the middles between neighbours, copied to each device once."""
    return VALUES.to(device), _MIDDLES.to(device)


class MXFP4(Scheme):
    """Codes `blocks` uint8 (rows, columns / 2), the earlier value in the low four bits; `scales` (rows, blocks)."""

    unit = 1
    is_transposed = True  # of experts, which are (in, out) when loaded
    label = "MXFP4"

    def __init__(self) -> None:
        self.part_rows = {BLOCKS: 1, SCALES: 1}

    def dequantize(self, parts: Parts) -> Tensor:
        packed = parts[BLOCKS].int()
        values, _ = _tables(packed.device)
        values = values[torch.stack([packed & 15, packed >> 4], 2).flatten(1)]
        return _by_block(values).mul_(_power(parts[SCALES]).unsqueeze(2)).flatten(1)

    def quantize(self, values: Tensor, parts: Parts, largest: float | None = None) -> dict[str, Tensor]:
        blocks, old = _by_block(values), parts[SCALES]
        peaks = blocks.abs().amax(2)
        exponent = torch.frexp(peaks).exponent - 1 - _LARGEST_EXPONENT + _BIAS
        new = torch.where(peaks == 0, old.int(), exponent).clamp_(0, 254).to(torch.uint8)
        (codes, error), (new_codes, new_error) = (_nearest(blocks, scales) for scales in (old, new))
        is_better = new_error < error
        found = torch.where(is_better.unsqueeze(2), new_codes, codes).flatten(1)
        packed = found[:, 0::2] | found[:, 1::2] << 4
        return {BLOCKS: packed, SCALES: torch.where(is_better, new, old)}


def _nearest(blocks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes uint8 nearest to blocks (rows, blocks, 32), even ones of two as near, and the squared errors."""
    values, middles = _tables(blocks.device)
    power = _power(scales).unsqueeze(2)
    scaled = blocks / power
    size = scaled.abs()
    codes = torch.bucketize(size, middles)
    up = torch.bucketize(size, middles, right=True)
    codes = torch.where((codes != up) & (codes % 2 == 1), up, codes)
    codes += 8 * torch.signbit(scaled)
    error = (values[codes] * power).sub_(blocks).square_().sum(2)
    return codes.to(torch.uint8), error


def _power(scales: Tensor) -> Tensor:
    return power_of_two(scales.int() - _BIAS)


def _by_block(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1, BLOCK)
