"""Types of the fixtures of conftest.py: a function that runs the command line, one that saves a tiny member."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SaveMember = Callable[..., Path]


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of an error."""
        lines = self.err.strip().splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("Error: "), self.err
        assert self.out == ""
        return lines[0]


Run = Callable[..., Result]
