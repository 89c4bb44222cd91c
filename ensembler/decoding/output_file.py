"""An output file of JSON lines that grows as results arrive, survives an interruption and ends in input order."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ensembler.errors import OutputError
from ensembler.files import digest, write_whole


def check_output(path: Path) -> None:
    """Raise OutputError unless `path` can be written to: to be asked before a long job is begun."""
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent} is not a folder; make it first or choose another --output")
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give the name of a file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise OutputError(f"{path} may not be written to; choose another --output")


class RunSettings:
    """All that the results of a run depend on, as JSON; kept beside them to name what another run has changed."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.digest = digest(self._settings)

    def write(self, path: Path) -> None:
        """Write the settings to a file. Raises OutputError."""
        write_whole(path, json.dumps(self._settings, indent=1, ensure_ascii=False) + "\n")

    def difference(self, path: Path) -> str:
        """Name the settings that differ from those in a file, with both values where those can be read; '' for none."""
        try:
            then = dict(_flat(json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, AttributeError):
            return f"which ones is not known, as {path.name} is missing"
        now = dict(_flat(self._settings))
        names = [name for name in dict.fromkeys((*then, *now)) if then.get(name) != now.get(name)]
        differences = [_difference(name, then.get(name), now.get(name)) for name in names[:3]]
        return ", ".join(differences) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class ResultsFile:
    """Rows with a 'number', one JSON line each, of a run with `settings` (JSON; all that the rows depend on).

    A file of the same settings is gone on with, one of others raises OutputError, which names a difference: the
    settings stand beside the file, in `path`.run.json, and each row holds their digest as `run`. With `overwrite`, the
    file begins anew. Nothing is written before it is entered as a context; rows are written as they come, and `finish`
    puts them in the order of their numbers in one rename.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        check_output(path)
        self.path = path
        self._settings = RunSettings(settings)
        self._rows = {} if overwrite or not path.exists() else self._read_rows()

    @property
    def settings_path(self) -> Path:
        """Return the file of the settings."""
        return self.path.with_name(f"{self.path.name}.run.json")

    @property
    def done(self) -> frozenset[int]:
        """The numbers of the rows that are there."""
        return frozenset(self._rows)

    def append(self, row: dict[str, Any]) -> None:
        """Write one row at once."""
        self._rows[row["number"]] = {**row, "run": self._settings.digest}
        self._file.write(_line(self._rows[row["number"]]))
        self._file.flush()

    def finish(self) -> None:
        """Put the rows in the order of their numbers: the run is complete."""
        self._file.close()
        self._write_sorted()

    def __enter__(self) -> Self:
        if not self._rows:
            with suppress(FileNotFoundError):
                self.path.unlink()  # first: rows never stand beside the settings of others
        if not self._rows or not self.settings_path.exists():
            self._settings.write(self.settings_path)
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
        write_whole(self.path, (_line(self._rows[number]) for number in sorted(self._rows)))

    def _read_rows(self) -> dict[int, dict[str, Any]]:
        """Return the whole rows of an interrupted run; a last line without its end was torn and is made again."""
        *lines, torn = self.path.read_bytes().split(b"\n")
        rows = {}
        for position, line in enumerate(lines):
            try:
                row = json.loads(line)
                number, run = int(row["number"]), row["run"]
            except (ValueError, KeyError, TypeError) as error:
                raise self._not_ours(f"{self.path}:{position + 1} is no row of a run") from error
            if run != self._settings.digest:
                difference = self._settings.difference(self.settings_path)
                raise self._not_ours(f"{self.path} was begun with other settings: {difference}")
            rows[number] = row
        if torn and not rows:
            raise self._not_ours(f"{self.path} holds no row of a run")
        return rows

    def _not_ours(self, found: str) -> OutputError:
        return OutputError(f"{found}; choose another --output, or add --overwrite to begin again")


def _flat(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{key} ")
        else:
            yield f"{above}{key}", value


def _difference(name: str, then: Any, now: Any) -> str:
    if name in ("prompts", "rows"):  # a digest
        return f"the {name} are others"
    return f"{name} was {json.dumps(then, ensure_ascii=False)}, now {json.dumps(now, ensure_ascii=False)}"


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
