"""An output file of JSON lines that grows as results arrive, survives an interruption and ends in input order."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ensembler.errors import OutputError


def check_output(path: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise OutputError unless `path` can be written to: to be asked before a long job is begun."""
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent} is not a folder; make it first or choose another --output")
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give the name of a file")
    if path.exists() and not (resume or overwrite):
        raise OutputError(f"{path} exists already; add --resume to go on with it or --overwrite to replace it")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise OutputError(f"{path} may not be written to; choose another --output")


class ResultsFile:
    """Rows with a 'number', one JSON line each.

    Each row also holds `run`, the fingerprint of the settings that it was made with: `resume` takes up only a file of
    the same run. Nothing is written before it is entered as a context; rows are written as they come, and `finish` puts
    them in the order of their numbers in one rename.
    """

    def __init__(self, path: Path, run: str, *, resume: bool = False, overwrite: bool = False) -> None:
        check_output(path, resume=resume, overwrite=overwrite)
        self.path = path
        self._run = run
        self._rows: dict[int, dict[str, Any]] = {}
        if path.exists() and resume:
            self._rows = _read_rows(path, run)

    @property
    def done(self) -> frozenset[int]:
        """The numbers of the rows that are there."""
        return frozenset(self._rows)

    def append(self, row: dict[str, Any]) -> None:
        """Write one row at once."""
        self._rows[row["number"]] = {**row, "run": self._run}
        self._file.write(_line(self._rows[row["number"]]))
        self._file.flush()

    def finish(self) -> None:
        """Put the rows in the order of their numbers: the run is complete."""
        self._file.close()
        self._write_sorted()

    def __enter__(self) -> Self:
        self._write_sorted()
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None:
            self.finish()

    def _write_sorted(self) -> None:
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_text("".join(_line(self._rows[number]) for number in sorted(self._rows)), encoding="utf-8")
        os.replace(partial, self.path)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _read_rows(path: Path, run: str) -> dict[int, dict[str, Any]]:
    """The whole rows of an interrupted run; a last line without its end was torn and is made again."""
    *lines, _torn = path.read_bytes().split(b"\n")
    rows = {}
    for position, line in enumerate(lines):
        try:
            row = json.loads(line)
            number, found = int(row["number"]), row["run"]
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(
                f"{path}:{position + 1} is no row of a run; choose another --output or add --overwrite"
            ) from error
        if found != run:
            raise OutputError(
                f"{path} was begun with another ensemble, other prompts or other options (run {found}, now {run}); "
                "resume with the same ones, choose another --output or add --overwrite"
            )
        rows[number] = row
    if _torn and not rows:
        raise OutputError(f"{path} holds no row of a run; choose another --output or add --overwrite")
    return rows
