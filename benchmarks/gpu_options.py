"""Input and output of a section of `gpu.py`: options with the time that is left, and rows."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Options:
    """`small`: tiny shapes, few repeats. `deadline`: of `time.monotonic`; from there on no case is started."""

    device: torch.device
    small: bool
    deadline: float
    sections: list[str]
    left_out: list[str] = field(default_factory=list)

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def has_time(self, case: str) -> bool:
        """Return whether a case may start; if not, it will be named as left out."""
        if self.seconds_left > 0:
            return True
        self.left_out.append(case)
        return False


@dataclass
class Row:
    """One result: `fields` go to the file, `cells` to the table. Rows of one case share a line of the table.

    A field `error` makes the script fail.
    """

    case: str
    fields: dict[str, Any]
    cells: dict[str, str]


def table(rows: Iterable[Row]) -> list[str]:
    """Return the lines of an aligned Markdown table: a line per case, a column per name of a cell."""
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        lines.setdefault(row.case, {"case": row.case}).update(row.cells)
    names = list(dict.fromkeys(name for line in lines.values() for name in line))
    cells = [names, *([line.get(name, "") for name in names] for line in lines.values())]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]
    return [padded[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *padded[1:]] if lines else []
