"""Write results.sqlite, whose tables `results_file` describes, and go on with it after an interruption.

A document is written at all points in one transaction or not at all, so a process that is killed loses only what it
did not add. Any number of processes write at the same time, also from several machines over a shared disk: hence the
rollback journal and not WAL, which needs shared memory. Nothing is locked between two calls.
"""

from __future__ import annotations

import json
import os
import sqlite3
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensembler.decoding.output_file import MEMBER_HASHES, name_verification
from ensembler.errors import ConfigError, OutputError, StoreError
from ensembler.evaluation.results_file import (
    APPLICATION,
    FILE,
    FORMAT,
    PATCHED,
    TABLES,
    Measured,
    Results,
    connect,
    dump,
    is_begun,
    telling,
    utf8,
)
from ensembler.launch import num_ranks

if TYPE_CHECKING:
    from ensembler.engine.grid import GridPoint
    from ensembler.evaluation.documents import Document

_BEGUN = "SELECT value FROM state WHERE key = 'begun'"  # another value each time that the file is begun anew

_OPTIONS = {  # settings that are keys of a recipe, and options of a sweep
    "alphas": "alphas",
    "rules": "rules",
    "seed": "seed",
    "batch size": "batch_size",
    "limit": "limit",
    "fewshot": "num_fewshot",
    "apply_chat_template": "apply_chat_template",
    "fewshot_as_multiturn": "fewshot_as_multiturn",
    "system_instruction": "system_instruction",
    "chat_template_kwargs": "chat_template_kwargs",
}
_SWEEP_OPTIONS = {"alphas": "alpha", "rules": "rule"}  # that are called otherwise than the key of a recipe
_HASHED = {  # settings that cannot be read, by what they are of
    "members": MEMBER_HASHES,
    "tasks": {
        "config": "settings (YAML file, metric, generation)",
        "documents": "documents or prompts",
        "tokens": "tokens",
    },
}


class Store(Results):
    """The results in `folder`, of a command with `settings` (JSON; all that rows depend on).

    Nothing is written, and nothing can be read, before `begin`. Raises OutputError where the folder cannot be written
    to or holds something else, or rows of other settings: the message names the difference. With `overwrite`, `begin`
    removes the rows and the report that are there, of any settings; raises ConfigError for several processes, of which
    each would remove the others' rows.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        if overwrite and num_ranks() > 1:
            raise ConfigError(
                f"--overwrite was given to {num_ranks()} processes; remove {folder}, and start them without it"
            )
        super().__init__(folder / FILE, sqlite3.connect(":memory:"))
        self.folder = folder
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))
        self._overwrite = overwrite
        self._points: dict[str, list[int]] = {}
        self._documents: dict[str, dict[str, int]] = {}
        self._check()

    def begin(self, command: str) -> None:
        """Make the folder and the file, go on with them, or begin them anew, which a failure leaves as they were.

        Raises OutputError as `Store` does, or for a full disk.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{self.folder} cannot be made: {error.strerror}; give --output another folder"
            ) from error
        with telling(self.file, "written", OutputError):
            self.close()
            self._connection = connect(self.file, "rwc")
            with self._connection as connection:
                connection.execute("BEGIN IMMEDIATE")
                if not self._goes_on(connection):
                    self._begin_anew(connection)
                connection.execute("REPLACE INTO state VALUES ('command', ?)", [dump(command)])
                self._begun = self._read(_BEGUN)
                if self._overwrite:
                    from ensembler.evaluation.report import remove_report

                    remove_report(self.folder)

    def begin_run(self, run: str, points: Sequence[GridPoint], documents: Iterable[tuple[Document, str]]) -> None:
        """Add a run, its points and its documents, each with its part, unless they are there; parts may change.

        Raises OutputError where a document was asked otherwise.
        """
        rows = [
            (run, one.name, one.task, part, utf8(one.prompt), dump(one.choices), one.gold and utf8(one.gold))
            for one, part in documents
        ]
        with self._writing() as connection:
            grid = [(run, point.rule, point.alpha) for point in points]
            connection.executemany("INSERT OR IGNORE INTO points (run, rule, alpha) VALUES (?, ?, ?)", grid)
            connection.execute("UPDATE documents SET part = NULL WHERE run = ?", [run])
            connection.executemany(
                "INSERT INTO documents (run, name, task, part, prompt, choices, gold) VALUES (?, ?, ?, ?, ?, ?, ?)"
                " ON CONFLICT (run, name) DO UPDATE SET part = excluded.part"
                " WHERE (prompt, choices, gold) IS (excluded.prompt, excluded.choices, excluded.gold)",
                rows,
            )
            known = dict(self._read("SELECT name, part FROM documents WHERE run = ?", run))
            if changed := next((one for _, one, *_ in rows if known[one] is None), None):
                raise OutputError(f"{self.file} has rows of another {changed}; give --output another folder")
        self._points[run] = [number for (number,) in self._read("SELECT id FROM points WHERE run = ? ORDER BY id", run)]
        self._documents[run] = dict(self._read("SELECT name, id FROM documents WHERE run = ?", run))

    def add(self, run: str, rows: Sequence[tuple[str, Sequence[Measured]]]) -> None:
        """Write documents, by their names, at all points in the order of `begin_run`, in one transaction.

        Of two processes that answered the same document the first one counts. Raises StoreError.
        """
        answers, measurements = [], []
        for name, of_points in rows:
            document = self._documents[run][name]
            for point, (answered, values, predictions) in zip(self._points[run], of_points, strict=True):
                answers += [(document, request, point, dump(each, name)) for request, each in enumerate(answered)]
                measurements.append((document, point, dump(values, name), dump(predictions, name)))
        with self._writing() as connection:
            connection.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?)", answers)
            connection.executemany("INSERT OR IGNORE INTO measurements VALUES (?, ?, ?, ?)", measurements)

    def note(self, kind: str, name: str, content: Mapping[str, Any]) -> None:
        """Write a note behind the others. Raises StoreError."""
        note = [kind, name, dump(content, f"the note {kind} {name}")]
        with self._writing() as connection:
            connection.execute("INSERT INTO notes (kind, name, content) VALUES (?, ?, ?)", note)

    def claim(self, what: str) -> bool:
        """Return whether this process is to do what is claimed: of several that finish together the first to ask."""
        with self._writing() as connection:
            return connection.execute("INSERT OR IGNORE INTO state VALUES (?, 'true')", [f"claim {what}"]).rowcount == 1

    def release(self, what: str) -> None:
        """Take back a claim, which may be that of a process that was lost."""
        with self._writing() as connection:
            connection.execute("DELETE FROM state WHERE key = ?", [f"claim {what}"])

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """Write all that is written in the `with` block, or nothing."""
        with telling(self.file, "written", StoreError), self._connection as connection:
            connection.execute("BEGIN IMMEDIATE")
            if self._read(_BEGUN) != self._begun:
                raise StoreError(f"{self.file} was begun anew by another process; give --output another folder")
            yield connection

    def _check(self) -> None:
        """Raise OutputError where `begin` would fail; write nothing."""
        if self.folder.exists() and not self.folder.is_dir():
            raise OutputError(f"{self.folder} is no folder; give --output the name of a new one")
        packed = self.folder / f"{FILE}.xz"
        if packed.exists() and not self.file.exists():
            raise OutputError(f"{packed} holds compressed results; unpack it (unxz), or give --output another folder")
        others = [each for each in self.folder.glob("*") if not each.name.startswith((FILE, PATCHED))]
        if others and not self.file.exists():  # which another process may have made by now
            raise OutputError(f"{self.folder} holds something else than results; give --output another folder")
        if self.file.exists():
            with telling(self.file, "read", OutputError), closing(connect(self.file, "rw")) as connection:
                self._goes_on(connection)
        near = next(each for each in (self.folder, *self.folder.absolute().parents) if each.exists())
        for each in (near, self.file):
            if each.exists() and not os.access(each, os.W_OK):
                raise OutputError(f"{each} may not be written to; give --output another folder")

    def _goes_on(self, connection: sqlite3.Connection) -> bool:
        """Return whether rows are added to those in the file; raise OutputError where they are of other settings."""
        if not is_begun(self.file, connection) or self._overwrite:
            return False
        there = Results(self.file, connection)
        different = list(dict.fromkeys(_differences(there.settings, self._settings)))
        if different and connection.execute("SELECT 1 FROM measurements").fetchone():
            kinds = ["benchmark" if "runs" in each else "sweep" for each in (there.settings, self._settings)]
            if kinds[0] != kinds[1]:
                different = [f"it is a {kinds[0]}, and this is a {kinds[1]}"]
            more = f" (and {len(different) - 3} more)" if len(different) > 3 else ""
            raise OutputError(
                f"{self.folder} holds the results of another run: {'; '.join(different[:3])}{more}. Run the same "
                "command to go on with it, give --output another folder, or add --overwrite to begin again"
            )
        return not different

    def _begin_anew(self, connection: sqlite3.Connection) -> None:
        for table, columns in TABLES.items():
            connection.execute(f"CREATE TABLE IF NOT EXISTS {table} {columns}")
            connection.execute(f"DELETE FROM {table}")
        settings = [(key, dump(value, key)) for key, value in self._settings.items()]
        connection.executemany("INSERT INTO settings VALUES (?, ?)", settings)
        connection.execute("INSERT INTO state VALUES ('begun', ?)", [dump(uuid.uuid4().hex)])
        connection.execute(f"PRAGMA application_id = {APPLICATION}")
        connection.execute(f"PRAGMA user_version = {FORMAT}")


def _differences(there: Any, here: Any, *keys: str) -> Iterator[str]:
    """Yield the differences in words: '--alpha is [0.0, 1.0] there and [0.5] here'.

    Of a task, or a member, hashes are told only where nothing that can be read differs.
    """
    if (there or here) and isinstance(there or {}, dict) and isinstance(here or {}, dict):
        one, other = there or {}, here or {}
        if keys and keys[-1] in ("runs", *_HASHED) and one.keys() != other.keys():
            yield _difference(list(one), list(other), keys)
            return
        verified = [bool(each.get("verify_weights")) for each in (one, other)]
        if one and other and verified[0] != verified[1]:  # all hashes of weights differ with it
            yield f"it was begun {name_verification(verified[0])}"
            return
        different = [key for key in {**one, **other} if one.get(key) != other.get(key)]
        hashed = _HASHED.get(keys[-2], {}) if len(keys) > 1 else {}
        readable = [key for key in different if key not in hashed and (one.get(key) or other.get(key))]
        for key in readable or different[:1]:
            yield from _differences(one.get(key), other.get(key), *keys, key)
    elif there != here:
        yield _difference(there, here, keys)


def _difference(there: Any, here: Any, keys: Sequence[str]) -> str:
    """Name what differs as the user knows it: an option, a key of the recipe, a file; else by its keys."""
    run, keys = (f"{keys[1]}: ", keys[2:]) if keys[0] == "runs" and len(keys) > 2 else ("", keys)
    group, owner, key = ("", "", *keys)[-3:]
    if key in _HASHED.get(group, {}):
        return f"{run}the {_HASHED[group][key]} of {owner} changed"
    if key in _OPTIONS:
        name = _OPTIONS[key] if run else f"--{_SWEEP_OPTIONS.get(key, _OPTIONS[key]).replace('_', '-')}"
    elif owner == "versions":
        name = f"the version of {key}"
    else:
        name = run + (f"{key} of {owner}" if group in _HASHED else " ".join(keys))
    return f"{name} is {_short(there)} there and {_short(here)} here"


def _short(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = "none" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:56]} ..."
