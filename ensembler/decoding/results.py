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


class ResultsFile:
    """Rows with a 'number', one JSON line each.

    While a run is under way, ``.NAME.run.json`` beside the file holds its settings, so that `resume` can refuse to mix
    texts of different runs. `finish` sorts the rows by number in one rename and removes it.
    """

    def __init__(self, path: Path, settings: dict[str, Any], *, resume: bool = False, overwrite: bool = False) -> None:
        self.path = path
        self._settings_path = path.with_name(f".{path.name}.run.json")
        self._rows: dict[int, dict[str, Any]] = {}
        check_output(path, resume=resume, overwrite=overwrite)
        if path.exists() and not overwrite:
            self._check_settings(settings)
            self._rows = _read_rows(path)
        self._write_sorted()
        self._settings_path.write_text(json.dumps(settings), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    @property
    def done(self) -> frozenset[int]:
        """The numbers of the rows that are there."""
        return frozenset(self._rows)

    def append(self, row: dict[str, Any]) -> None:
        """Write one row at once."""
        self._rows[row["number"]] = row
        self._file.write(_line(row))
        self._file.flush()

    def finish(self) -> None:
        """Put the rows in the order of their numbers: the run is complete."""
        self._file.close()
        self._write_sorted()
        self._settings_path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None:
            self.finish()

    def _check_settings(self, settings: dict[str, Any]) -> None:
        if not self._settings_path.is_file():
            return
        earlier = json.loads(self._settings_path.read_text(encoding="utf-8"))
        for key in settings:
            if earlier.get(key) != settings[key]:
                raise OutputError(
                    f"{self.path} was begun with {key} {earlier.get(key)!r}, not {settings[key]!r}; "
                    "resume with the same settings or add --overwrite"
                )

    def _write_sorted(self) -> None:
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_text("".join(_line(self._rows[number]) for number in sorted(self._rows)), encoding="utf-8")
        os.replace(partial, self.path)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _read_rows(path: Path) -> dict[int, dict[str, Any]]:
    """The whole rows of an interrupted file; a torn last line is left out and made again."""
    rows = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for position, line in enumerate(lines):
        try:
            row = json.loads(line)
            rows[int(row["number"])] = row
        except (ValueError, KeyError, TypeError) as error:
            if position < len(lines) - 1:
                raise OutputError(
                    f"{path}:{position + 1} is no row of a result; add --overwrite or choose another --output"
                ) from error
    return rows
