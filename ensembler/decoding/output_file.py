"""An output file of JSON lines that grows as results arrive, survives an interruption and ends in input order."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from ensembler.errors import OutputError, RunError
from ensembler.files import digest, write_whole


def check_output(path: Path) -> None:
    """Raise OutputError unless `path` can be written to: to be asked before a long job is begun."""
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent} is not a folder; make it first or choose another --output")
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give the name of a file")
    if path.exists() and not path.is_file():
        raise OutputError(f"{path} is no ordinary file; name one, or leave --output out to print")
    for each in (path.resolve().parent, path):  # a file is written by renaming another
        if each.exists() and not os.access(each, os.W_OK):
            raise OutputError(f"{each} may not be written to; choose another --output")


_ABSENT = object()
MEMBER_HASHES = {
    "config": "config.json",
    "fingerprint": "weights",
    "weights_sha256": "weights",
    "weight_files": "sizes or times of the weight files",
    "commit": "commit on the hub",
    "adapter_sha256": "adapter",
    "head_sha256": "head",
}
"""Settings of members that nobody can read, by what they are of."""


def name_verification(was_verified: bool) -> str:
    """Name the one difference between a run begun with --verify-weights, or without it, and one that is not."""
    return "with --verify-weights (add it)" if was_verified else "without --verify-weights (leave it out)"


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
            content = json.loads(path.read_text(encoding="utf-8"))
            then, now = dict(_flat(content)), dict(_flat(self._settings))
        except (OSError, ValueError, AttributeError):
            return f"which ones is not known, as {path.name} is missing or damaged"
        if digest(content) == self.digest:
            return ""
        was_verified = bool(then.get("verify_weights"))
        if was_verified != bool(now.get("verify_weights")):  # all hashes of weights differ with it
            return name_verification(was_verified)
        names = [name for name in {**then, **now} if then.get(name, _ABSENT) != now.get(name, _ABSENT)]
        found = list(dict.fromkeys(_difference(name, then.get(name), now.get(name)) for name in names))
        return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


class OutputFile:
    """Rows with a 'number', one JSON line each, of a run with `settings` (JSON; all that the rows depend on).

    Resume a file with the same settings; raise OutputError for one with others, and name a difference: the settings
    stand beside the file, in `path`.run.json, and each row holds their digest as `run`. With `overwrite`, the file
    begins anew. Nothing is written before it is entered as a context, which one process at a time may do; rows are
    written as they come, and put in the order of their numbers at the end, in one rename.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        check_output(path)
        self.path = path.resolve()
        self._settings = RunSettings(settings)
        self._overwrites = overwrite
        self._rows = self._read_rows()
        self._lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))

    @property
    def settings_path(self) -> Path:
        """Return the file of the settings."""
        return self.path.with_name(f"{self.path.name}.run.json")

    @property
    def done(self) -> frozenset[int]:
        """The numbers of the rows that are there."""
        return frozenset(self._rows)

    def append(self, row: dict[str, Any]) -> None:
        """Write one row at once; raise RunError where the disk does not take it."""
        self._rows[row["number"]] = {**row, "run": self._settings.digest}
        try:
            self._file.write(_line(self._rows[row["number"]]))
            self._file.flush()
        except OSError as error:
            raise RunError(f"{self.path} cannot be written: {error.strerror}; make room, and go on with it") from error

    def __enter__(self) -> Self:
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise OutputError(f"another process writes {self.path}; wait for it, or choose another --output") from error
        try:
            self._begin()
        except BaseException:
            self._release()
            raise
        return self

    def _begin(self) -> None:
        if self._read_rows() != self._rows:
            raise OutputError(f"another process has written to {self.path} meanwhile; start the command again")
        if not self._rows:
            with suppress(FileNotFoundError):
                self.path.unlink()  # first: rows never stand beside the settings of others
        if not self._rows or not self.settings_path.exists():
            self._settings.write(self.settings_path)
        self._write_sorted()
        self._file = self.path.open("a", encoding="utf-8")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
            if kind is None:
                self._write_sorted()  # the run is complete
        finally:
            self._release()

    def _release(self) -> None:
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()

    def _write_sorted(self) -> None:
        write_whole(self.path, (_line(self._rows[number]) for number in sorted(self._rows)))

    def _read_rows(self) -> dict[int, dict[str, Any]]:
        """Return the whole rows of an interrupted run; a last line without its end was torn and is made again."""
        if self._overwrites or not self.path.exists():
            return {}
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
    if name in ("prompts", "rows", "fields"):  # a digest
        return f"the {name} are others"
    if name.startswith("members ") and (key := name.rpartition(" ")[2]) in MEMBER_HASHES:
        return f"the {MEMBER_HASHES[key]} of {name.split(' ')[1]} changed"
    return f"{name} was {json.dumps(then, ensure_ascii=False)}, now {json.dumps(now, ensure_ascii=False)}"


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
