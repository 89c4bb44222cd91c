"""A weight that a quantised checkpoint keeps as several tensors, and how a scheme reads and writes it in pieces.

A scheme cuts the weight into units of rows that can be quantised apart from each other: a row of blocks, a group. Each
of its tensors on disk has a fixed number of rows for a unit, or belongs to the weight as a whole.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ensembler.safetensors_files import StoredTensor

Parts = Mapping[str, Tensor]
"""Rows of the tensors of one weight, by their part in the scheme."""


def power_of_two(exponents: Tensor) -> Tensor:
    """Return 2 to the power of int32 exponents, -127 to 128, in fp32: exact on any device, infinity for 128."""
    bits = (exponents + 127) << 23
    return torch.where(exponents == -127, 1 << 22, bits).view(torch.float32)  # 2⁻¹²⁷ is below fp32's normal range


class Scheme(ABC):
    """The form in which one weight (rows, columns) is kept. `label` names the scheme in messages and cards.

    `unit`: rows of the weight that belong together; `part_rows`: rows of each part for a unit, 0 for a part of the
    whole weight. `is_transposed`: the last two axes are the other way round than in the loaded weight.
    """

    label: str
    unit: int
    part_rows: Mapping[str, int]
    is_transposed: bool = False

    @abstractmethod
    def dequantize(self, parts: Parts) -> Tensor:
        """Return whole units of a weight in fp32, (rows, columns), new memory."""

    @abstractmethod
    def quantize(self, values: Tensor, parts: Parts, largest: float | None = None) -> dict[str, Tensor]:
        """Return the parts that stand for `values` (rows, columns) fp32, in the shapes and dtypes of `parts`.

        `parts` are those of the values before: what stays as it is may be left out of the answer. `largest` is the
        largest magnitude in the whole weight, where `needs_largest`.
        """

    @property
    def needs_largest(self) -> bool:
        """True where one number for the whole weight depends on all values, so that they are read twice."""
        return False


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight that stands on disk as the tensors `parts`; `name` and `shape` are those that it has when loaded.

    `matrix` (rows, columns) is the form in which the scheme has it, for a stack of experts all of them in one.
    """

    name: str
    shape: tuple[int, ...]
    matrix: tuple[int, int]
    parts: Mapping[str, StoredTensor]
    scheme: Scheme

    @property
    def num_elements(self) -> int:
        return math.prod(self.matrix)

    @property
    def num_units(self) -> int:
        return math.ceil(self.matrix[0] / self.scheme.unit)

    def blocks(self, num_elements: int) -> Iterator[tuple[int, int]]:
        """Yield (first, last + 1) of units whose values are about `num_elements` together."""
        step = max(1, num_elements // max(1, self.scheme.unit * self.matrix[1]))
        for first in range(0, self.num_units, step):
            yield first, min(first + step, self.num_units)

    def rows_of(self, first: int, last: int) -> tuple[int, int]:
        """Return the rows of the weight that these units are."""
        return first * self.scheme.unit, min(last * self.scheme.unit, self.matrix[0])

    def part_rows(self, part: str, first: int, last: int) -> tuple[int, int]:
        """Return the rows of a part that belong to these units."""
        rows, of_unit = self.parts[part].matrix[0], self.scheme.part_rows[part]
        return (0, rows) if of_unit == 0 else (min(first * of_unit, rows), min(last * of_unit, rows))
