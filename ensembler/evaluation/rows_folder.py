"""A folder of results: the settings of a run and its rows, which grow as they are made and survive an interruption.

    run.json        the settings, and the command that made them
    examples.jsonl  what was asked
    rows.jsonl      what came of it; of several processes, each but the first writes rows.RANK.jsonl until the end

Rows belong to an `id`, of which all are written at once; an id with fewer than `rows_per_id` rows was interrupted and
is made again. Any number of processes may run at the same time or one after another: none waits for another.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ensembler.errors import OutputError
from ensembler.launch import this_rank

RUN = "run.json"
EXAMPLES = "examples.jsonl"
ROWS = "rows.jsonl"
_OTHER_ROWS = "rows.*.jsonl"
_PARTIAL, _LOCK, _CLAIM = ".partial", ".lock", ".claimed"

Row = dict[str, Any]


class RowsFolder:
    """The folder at `path`, for a run with `settings` (JSON; what the rows depend on).

    Nothing is written before `begin`. Raises OutputError where the folder holds something else, or a run with other
    settings: the message names the difference.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, rows_per_id: int, rank: int = 0) -> None:
        self.path = path
        self._settings = json.loads(json.dumps(settings))
        self._rows_per_id = rows_per_id
        self._own = path / (ROWS if rank == 0 else f"rows.{rank}.jsonl")
        self._check()

    def begin(self, command: str, examples: Iterable[Row] | None = None) -> None:
        """Make the folder and say what it is for, and what is asked where `examples` are. Raises OutputError."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.path} cannot be made: {error.strerror}; give --output another folder") from error
        if examples is not None:
            write_whole(self.path / EXAMPLES, map(_line, examples))
        write_whole(self.path / RUN, json.dumps({"command": command, "settings": self._settings}, indent=2) + "\n")

    @property
    def command(self) -> str:
        """The last command that began the run or went on with it."""
        return str(_read_run(self.path)["command"])

    def rows(self) -> dict[str, list[Row]]:
        """Return the rows of every id that is complete, from all files."""
        found: dict[str, list[Row]] = {}
        for file in [self.path / ROWS, *sorted(self.path.glob(_OTHER_ROWS))]:
            for name, rows in self._complete(file).items():
                found.setdefault(name, rows)
        return found

    def append(self, rows: Sequence[Row]) -> None:
        """Write rows at once: all those of their ids."""
        self._file.write("".join(map(_line, rows)))
        self._file.flush()

    def finish(self, ids: Sequence[str]) -> dict[str, list[Row]] | None:
        """Put the rows of `ids` in this order into one file and return them; None where some are still missing.

        Missing are those of other processes, which are at work or were lost.
        """
        found = self.rows()
        if any(name not in found for name in ids):
            return None
        wanted = {name: found[name] for name in ids}
        write_whole(self.path / ROWS, (_line(row) for rows in {**wanted, **found}.values() for row in rows))
        for file in self.path.glob(_OTHER_ROWS):
            file.unlink(missing_ok=True)
        return wanted

    def __enter__(self) -> Self:
        """Open this process's file; what an interrupted run left half-done there is taken out.

        Raises OutputError where another process writes to it.
        """
        self._lock = (self.path / f".{self._own.name}{_LOCK}").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise OutputError(
                f"{self.path} is being written to by another process; wait for it, or give --output another folder"
            ) from error
        complete = self._complete(self._own)
        write_whole(self._own, (_line(row) for rows in complete.values() for row in rows))
        self._file = self._own.open("a", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._lock.close()  # and so unlocked

    def claim(self) -> bool:
        """Whether this process is to write the summary: of several that finish together the first that asks."""
        try:
            os.close(os.open(self.path / _CLAIM, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def release(self) -> None:
        """Take back a claim, which may be of a process that was lost."""
        (self.path / _CLAIM).unlink(missing_ok=True)

    def _complete(self, file: Path) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        for row in _read_rows(file):
            found.setdefault(row["id"], []).append(row)
        return {name: rows for name, rows in found.items() if len(rows) == self._rows_per_id}

    def _has_rows(self) -> bool:
        """Whether any row is there, of runs within this one too; without one, a folder may be begun anew."""
        files = [*self.path.rglob(ROWS), *self.path.rglob(_OTHER_ROWS)]
        return any(next(_read_rows(file), None) is not None for file in files)

    def _check(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.path} is no folder; give --output the name of a new one")
        if not (self.path / RUN).is_file():
            foreign = self.path.is_dir() and any(map(_is_foreign, self.path.iterdir()))
            if foreign and not (self.path / RUN).is_file():  # another process may have begun it just now
                raise OutputError(f"{self.path} holds something else than results; give --output another folder")
            place = next(parent for parent in (self.path, *self.path.absolute().parents) if parent.exists())
            if not os.access(place, os.W_OK):
                raise OutputError(f"{self.path} may not be written to; give --output another folder")
            return
        there = _read_run(self.path)["settings"]
        different = list(_differences(there, self._settings))
        if different and self._has_rows():
            more = f" (and {len(different) - 3} more)" if len(different) > 3 else ""
            raise OutputError(
                f"{self.path} holds the results of another run: {'; '.join(different[:3])}{more}. Run the same command "
                "to go on with it, or give --output another folder"
            )


def write_whole(path: Path, content: str | bytes | Iterable[str]) -> None:
    """Write a file in one rename: it is there whole or not at all. Raises OutputError."""
    parts = [content] if isinstance(content, str | bytes) else content
    partial = path.with_name(f".{path.name}.{this_rank()}{_PARTIAL}")
    try:
        with partial.open("wb") as file:
            file.writelines(part if isinstance(part, bytes) else part.encode() for part in parts)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written: {error.strerror}; choose another place") from error


def read_examples(path: Path) -> dict[str, Row]:
    """Return what was asked in the run at `path`, by id."""
    return {row["id"]: row for row in _read_rows(path / EXAMPLES)}


def _is_foreign(entry: Path) -> bool:
    """Whether a folder that holds this is not ours: a run that ended at its very begin leaves these alone."""
    return entry.name not in (EXAMPLES, RUN, _CLAIM) and entry.suffix not in (_PARTIAL, _LOCK)


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _read_run(path: Path) -> dict[str, Any]:
    try:
        run = json.loads((path / RUN).read_text(encoding="utf-8"))
        return {"command": run["command"], "settings": dict(run["settings"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{path / RUN} cannot be read; give --output another folder") from error


def _read_rows(file: Path) -> Iterator[Row]:
    """The rows of a file, none where it is not there; a last line without its end was torn and does not count."""
    try:
        *lines, _torn = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row["id"]
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(
                f"{file}:{number} is no row of a run; mend or remove the line to have its example made again"
            ) from error
        yield row


def _differences(there: Any, here: Any, name: str = "") -> Iterator[str]:
    """What differs, in words: 'alphas is [0.0, 1.0] there and [0.5] here'."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in dict.fromkeys((*there, *here)):
            yield from _differences(there.get(key), here.get(key), f"{name} {key}".strip())
    elif there != here:
        yield f"{name} is {_short(there)} there and {_short(here)} here"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:56]} ..."
