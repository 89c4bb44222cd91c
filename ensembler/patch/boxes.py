"""Boxes of matrices in tensors, as ranges of positions: where a part of one tensor lies in another."""

from __future__ import annotations

import math
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """Rows and columns of some matrices in a tensor (matrices, rows, columns); a plain matrix is a stack of one."""

    matrices: range
    rows: range
    columns: range

    @classmethod
    def whole(cls, shape: Shape) -> Box:
        """Return the box of a whole tensor (rows, columns) or (matrices, rows, columns)."""
        return cls(*map(range, stack_shape(shape)))

    @property
    def num_elements(self) -> int:
        return len(self.matrices) * len(self.rows) * len(self.columns)

    def transposed(self) -> Box:
        """Return the box in the tensor with its last two axes exchanged."""
        return Box(self.matrices, self.columns, self.rows)

    def overlaps(self, other: Box) -> bool:
        """Return whether the two boxes of one tensor share an element."""
        return all(
            overlap(mine, theirs)
            for mine, theirs in zip(
                (self.matrices, self.rows, self.columns), (other.matrices, other.rows, other.columns), strict=True
            )
        )


def stack_shape(shape: Shape) -> tuple[int, int, int]:
    """Return the shape of a matrix or of a stack of them as that of a stack."""
    stack, rows, columns = (1,) * (3 - len(shape)) + shape
    return stack, rows, columns


def overlap(first: range, second: range) -> range:
    """Return the positions that are in both ranges, whose steps are positive."""
    step = math.lcm(first.step, second.step)
    start, stop = max(first.start, second.start), min(first.stop, second.stop)
    found = next((at for at in range(start, min(start + step, stop)) if at in first and at in second), None)
    return range(0) if found is None else _tight(range(found, stop, step))


def locate(part: range, whole: range, other: range) -> range:
    """Return the positions in `other`, which has one for each of `whole`, of those of `part`, which is in `whole`."""
    if not part:
        return range(0)
    return _tight(other[whole.index(part[0]) : whole.index(part[-1]) + 1 : max(1, part.step // whole.step)])


def _tight(positions: range) -> range:
    """Return the same positions with the least end, so that equal positions are equal ranges."""
    if len(positions) < 2:
        return range(positions[0], positions[0] + 1) if positions else range(0)
    return range(positions[0], positions[-1] + 1, positions.step)
