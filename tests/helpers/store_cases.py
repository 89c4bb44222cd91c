"""A results file of a known content, and processes that write it."""

from __future__ import annotations

import os
import resource
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ensembler.errors import RunError
from ensembler.evaluation import results_file
from ensembler.evaluation.results_file import FILE, Measured, open_results
from ensembler.evaluation.store import Store

POINTS = [SimpleNamespace(rule=rule, alpha=alpha) for rule in ("base-change", "eft") for alpha in (0.0, 0.5, 1.0)]
NUM = 60
SETTINGS = {"format": 2, "alphas": [0.0, 0.5, 1.0], "tasks": {"t": {"limit": 3}}}


def document(index: int) -> SimpleNamespace:
    return SimpleNamespace(
        name=f"t/test/{index}",
        task="t",
        prompt=f"question {index}",
        choices=("a", "b"),
        gold="a" if index % 2 else None,
    )


def measured(index: int, by: int = 0) -> list[Measured]:
    """What a document comes to at all points, as process `by` found it: 4 requests, one answer of them infinite."""
    return [
        Measured(
            [[-index - at / 7, False], [float("-inf"), True], [by, True], ["x" * 200, "ü\ud800"]],
            {"acc": float(index % 2), "log_prob": [float("-inf"), -index - by], "by": by},
            {"none": f"{index} at {at}"},
        )
        for at in range(len(POINTS))
    ]


def begun(folder: Path, **changes: Any) -> Store:
    store = Store(folder, {**SETTINGS, **changes})
    store.begin("the command")
    store.begin_run("sweep", POINTS, [(document(index), "test") for index in range(NUM)])
    return store


def fill(folder: Path, indices: range = range(NUM)) -> None:
    with begun(folder) as store:
        for index in indices:
            if f"t/test/{index}" not in store.done("sweep"):
                store.add("sweep", [(f"t/test/{index}", measured(index))])


def contents(folder: Path) -> dict[str, list[Any]]:
    """All rows of all tables, but for claims and the like."""
    connection = sqlite3.connect(folder / FILE)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    found = {table: connection.execute(f"SELECT * FROM {table}").fetchall() for table in results_file.TABLES}
    connection.close()
    found["state"] = [row for row in found["state"] if row[0] == "command"]
    return found


def check_whole(folder: Path, names: set[str]) -> None:
    """Documents with `names` are there, and no document is there in part or twice."""
    with open_results(folder) as results:
        rows = list(results.rows("sweep"))
        assert names <= {name for name, _ in rows}
        assert len(rows) == len(dict(rows)) == len(results.done("sweep"))
        for name, of_points in rows:
            assert of_points in [measured(int(name.rpartition("/")[2]), by) for by in range(4)], name


def start(*args: object) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def main(task: str, folder: Path, by: int) -> None:
    """The other processes of these tests: say each document once it is written."""
    if task == "limited":
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
    with begun(folder) as store:
        print("begun", flush=True)
        if task == "torn":
            with store._writing() as connection:
                connection.execute("PRAGMA cache_size = 1")  # pages go to the disk before the transaction is done
                connection.execute("UPDATE measurements SET metric_values = '{}'")
                os.kill(os.getpid(), signal.SIGKILL)
        done = store.done("sweep")
        for index in ((each + by * 17) % NUM for each in range(NUM)):
            if (name := f"t/test/{index}") not in done:
                try:
                    store.add("sweep", [(name, measured(index, by))])
                except RunError as error:
                    print(error, flush=True)
                    return
                print(name, flush=True)
        print("first" if store.claim("summary") else "later", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
