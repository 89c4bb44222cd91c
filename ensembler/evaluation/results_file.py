"""Read the results of a sweep or a benchmark: one SQLite file, results.sqlite.

    settings      key, value: what rows depend on, as JSON; another command with the same settings goes on with the file
    state         key, value: the last command, claims, and `begun`: a random text, another after each new beginning
    documents     id, run, name, task, part, prompt, choices, gold: what was asked; `part` is null of a document that
                  the last command did not ask for
    points        id, run, rule, alpha: the grid of a run
    answers       document, request, point, answer: a row for each request of a document at each point
    measurements  document, point, metric_values, predictions: what the answers of a document came to at a point
    notes         id, kind, name, content: what happened, in order: costs, failures, batch sizes and beginnings of runs

A sweep is one run, named "sweep"; a benchmark has several. JSON is as in `metric_values`. `Store` writes the file.
"""

from __future__ import annotations

import json
import lzma
import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from ensembler.errors import EnsemblerError, OutputError
from ensembler.evaluation.documents import from_json, to_json
from ensembler.launch import RANK_TIMEOUT

if TYPE_CHECKING:
    from ensembler.evaluation.documents import Answer

FILE = "results.sqlite"
PATCHED = "patched"  # a folder beside it, with the patched targets of `transported`
APPLICATION, FORMAT = 0x4C456E73, 1  # "LEns"; the format is another version's where the number differs
TABLES = {
    "settings": "(key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "state": "(key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "documents": "(id INTEGER PRIMARY KEY, run TEXT NOT NULL, name TEXT NOT NULL, task TEXT NOT NULL, part TEXT,"
    " prompt TEXT NOT NULL, choices TEXT NOT NULL, gold TEXT, UNIQUE (run, name))",
    "points": "(id INTEGER PRIMARY KEY, run TEXT NOT NULL, rule TEXT NOT NULL, alpha REAL NOT NULL,"
    " UNIQUE (run, rule, alpha))",
    "answers": "(document INTEGER REFERENCES documents, request INTEGER, point INTEGER REFERENCES points,"
    " answer TEXT NOT NULL, PRIMARY KEY (document, request, point)) WITHOUT ROWID",
    "measurements": "(document INTEGER REFERENCES documents, point INTEGER REFERENCES points,"
    " metric_values TEXT NOT NULL, predictions TEXT NOT NULL, PRIMARY KEY (document, point)) WITHOUT ROWID",
    "notes": "(id INTEGER PRIMARY KEY, kind TEXT NOT NULL, name TEXT NOT NULL, content TEXT NOT NULL)",
}
_JSON = {"value", "choices", "answer", "metric_values", "predictions", "content"}  # columns
_decode = json.JSONDecoder(object_hook=from_json).decode
_TORN = (
    "SELECT name FROM measurements JOIN documents ON documents.id = document GROUP BY document"
    " HAVING count(*) <> (SELECT count(*) FROM points WHERE points.run = documents.run)"
)
_MAKE_ROOM = "make room on its disk, and go on with the same command, without --overwrite"
_ALLOW = "allow writing to it and its folder, or give another folder"
_REPLACE = "put an undamaged copy in its place, or give another folder"
_REMEDIES = {
    sqlite3.SQLITE_FULL: _MAKE_ROOM,
    sqlite3.SQLITE_IOERR: _MAKE_ROOM,
    sqlite3.SQLITE_BUSY: "end the process that has it locked, and go on with the same command, without --overwrite",
    sqlite3.SQLITE_READONLY: _ALLOW,
    sqlite3.SQLITE_CANTOPEN: _ALLOW,
}


class Measured(NamedTuple):
    """One document at one point: an answer per request, values by metric key, and what was answered by filter."""

    answers: Answer
    values: Mapping[str, Any]
    predictions: Mapping[str, str]


class Results:
    """A results file, as `open_results` returns it. Reading raises OutputError for a damaged file."""

    def __init__(self, file: Path, connection: sqlite3.Connection) -> None:
        self.file = file
        self._connection = connection

    @property
    def settings(self) -> dict[str, Any]:
        """All that rows depend on."""
        return dict(self._read("SELECT key, value FROM settings"))

    @property
    def command(self) -> str:
        """The last command that began the results or went on with them."""
        return str(dict(self._read("SELECT key, value FROM state")).get("command"))

    def runs(self) -> list[str]:
        """Return the names of the runs that were begun, in that order."""
        return [run for (run,) in self._read("SELECT run FROM points GROUP BY run ORDER BY min(id)")]

    def points(self, run: str) -> list[tuple[str, float]]:
        """Return the rule and the α of each point of a run."""
        return self._read("SELECT rule, alpha FROM points WHERE run = ? ORDER BY id", run)

    def documents(self, run: str) -> list[tuple[str, str, str | None, str, list[str], str | None]]:
        """Return what was asked in a run: name, task, part, prompt, choices and right answer of each document."""
        columns = "name, task, part, prompt, choices, gold"
        return self._read(f"SELECT {columns} FROM documents WHERE run = ? ORDER BY id", run)

    def done(self, run: str) -> frozenset[str]:
        """Return the names of the documents that are measured, which is at all points."""
        sql = "SELECT DISTINCT name FROM documents JOIN measurements ON document = id WHERE run = ?"
        return frozenset(name for (name,) in self._read(sql, run))

    def values(self, run: str, key: str) -> dict[str, list[Any]]:
        """Return a metric of each measured document that has it, by its name, at each point; None where it has none."""
        found: dict[str, list[Any]] = {}
        sql = "SELECT name, metric_values FROM documents JOIN measurements ON document = id WHERE run = ?"
        for name, values in self._read(f"{sql} ORDER BY id, point", run):
            found.setdefault(name, []).append(values.get(key))
        return {name: values for name, values in found.items() if any(value is not None for value in values)}

    def rows(self, run: str, task: str | None = None) -> Iterator[tuple[str, list[Measured]]]:
        """Yield each measured document, of one task or of all: its name, and what it came to at each point."""
        sql = "SELECT id, name FROM documents WHERE run = ? AND task = ifnull(?, task) ORDER BY id"
        for number, name in self._read(sql, run, task):
            sql = "SELECT point, metric_values, predictions FROM measurements WHERE document = ? ORDER BY point"
            measured = self._read(sql, number)  # first: another process may add the document now, with its answers
            answers: dict[int, Answer] = defaultdict(list)
            sql = "SELECT point, answer FROM answers WHERE document = ? ORDER BY request"
            for point, answer in self._read(sql, number):
                answers[point].append(answer)
            if measured:
                yield name, [Measured(answers[point], *found) for point, *found in measured]

    def notes(self, kind: str) -> list[tuple[str, dict[str, Any]]]:
        """Return the name and the content of each note of a kind, in the order of writing."""
        return self._read("SELECT name, content FROM notes WHERE kind = ? ORDER BY id", kind)

    def all_notes(self) -> list[tuple[str, str, dict[str, Any]]]:
        """Return the kind, the name and the content of all notes, in the order of writing."""
        return self._read("SELECT kind, name, content FROM notes ORDER BY id")

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read(self, sql: str, *given: object) -> list[Any]:
        """Return all rows at once, since a cursor that is left open would keep the others from writing."""
        with telling(self.file, "read", OutputError):
            cursor = self._connection.execute(sql, given)
            is_json = [name in _JSON for name, *_ in cursor.description]
            return [
                tuple(_decode(str(value)) if known else value for known, value in zip(is_json, row, strict=True))
                for row in cursor.fetchall()
            ]


def open_results(path: Path) -> Results:
    """Open the results of a sweep or a benchmark for reading: its folder, the file, or the file compressed by xz.

    The folder may be read-only. Raises OutputError.
    """
    file = next((each for each in (path, path / FILE, path / f"{FILE}.xz") if each.is_file()), None)
    if file is None:
        raise OutputError(f"{path} holds no {FILE}; give a folder that `ensembler sweep` or `ensembler bench` wrote")
    with telling(file, "read", OutputError):
        if file.suffix == ".xz":
            connection = sqlite3.connect(":memory:")
            connection.deserialize(lzma.decompress(file.read_bytes()))
        else:
            connection = connect(file, "rw")  # not "ro", which could not take back what a killed process half wrote
        connection.execute("PRAGMA query_only = ON")
        if not is_begun(file, connection):
            raise OutputError(f"{file} holds no results yet; run the command that made it again")
    return Results(file, connection)


def dump(value: Any, source: str = FILE) -> str:
    """Return `value` as strict JSON, see `metric_values`. Raises RunError, which names `source`."""
    return utf8(json.dumps(to_json(value, source), ensure_ascii=False))


def utf8(text: str) -> str:
    """Escape halves of surrogate pairs, which names of files may have, as JSON does."""
    return text.encode("utf-8", "backslashreplace").decode()


def connect(file: Path, mode: str) -> sqlite3.Connection:
    """Open the file; `mode` is "rw", which falls back on reading alone, or "rwc", which may create it."""
    uri = f"{file.absolute().as_uri()}?mode={mode}"
    connection = sqlite3.connect(uri, uri=True, timeout=RANK_TIMEOUT, isolation_level=None)
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def is_begun(file: Path, connection: sqlite3.Connection) -> bool:
    """Return whether there are tables; raise OutputError where they are not those of this format."""
    (application,), (version,) = (
        connection.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version")
    )
    if (application, version) == (APPLICATION, FORMAT):
        if torn := connection.execute(_TORN).fetchone():
            raise OutputError(f"{file} is damaged: {torn[0]} is not measured at all points; {_REPLACE}")
        return True
    if connection.execute("SELECT 1 FROM sqlite_master").fetchone():
        known = f"results of format {version}, and this version reads {FORMAT}"
        found = known if application == APPLICATION else "something else than results"
        raise OutputError(f"{file} holds {found}; give another folder")
    return False


@contextmanager
def telling(file: Path, done: str, kind: type[EnsemblerError]) -> Iterator[None]:
    """Turn an error of SQLite into one sentence that names the file and the remedy."""
    try:
        yield
    except (sqlite3.Error, OSError, EOFError, lzma.LZMAError, ValueError) as error:
        if isinstance(error, EnsemblerError | sqlite3.ProgrammingError):
            raise
        remedy = _REMEDIES.get(getattr(error, "sqlite_errorcode", 0) & 0xFF, _REPLACE)
        reason = str(error).partition(" with text ")[0]  # which is what could not be decoded
        raise kind(f"{file} cannot be {done}: {reason}; {remedy}") from error
