"""`ensembler sweep` killed, interrupted, out of disk, or run by several processes: no row is lost, none twice."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from helpers.process_cases import fork, launch
from helpers.sweep_cases import data_flags, read_rows, save_ensemble, start, write_questions

from ensembler.evaluation.results_file import FILE, open_results
from ensembler.evaluation.text_answers import TextAnswerer


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return save_ensemble(tmp_path_factory.mktemp("members")).flags


def command(members: list[str], number: int, *more: object) -> list[str]:
    """A sweep of so many questions, two at a time."""
    flags = data_flags(write_questions(Path("questions.jsonl"), number))
    return ["sweep", *members, *flags, "--alphas", "0:1:0.1", "--batch-size", "2", *map(str, more)]


def size(folder: str) -> int:
    path = Path(folder, FILE)
    return path.stat().st_size if path.exists() else 0


def tasks_of(folder: str) -> list[dict[str, Any]]:
    return list(json.loads(Path(folder, "summary.json").read_text())["tasks"])


def test_20_kills_lose_no_row_and_make_none_twice(members: list[str], run: Any) -> None:
    flags = command(members, 150, "--validation", 50)
    assert run(*flags, "--output", "whole").code == 0
    draw = random.Random(0)
    done: frozenset[str] = frozenset()
    num_killed = 0
    for kill in range(20):
        process = fork([*flags, "--output", "killed"])
        step = max(0, size("whole") - size("killed")) / (20 - kill)
        target = size("killed") + draw.uniform(0, 2 * step)
        while process.is_alive() and size("killed") < target:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.05))
        process.kill()
        process.join()
        num_killed += process.exitcode == -signal.SIGKILL
        if size("killed"):
            with open_results(Path("killed")) as results:
                now = results.done("sweep")
            assert done <= now
            done = now
    assert num_killed > 10
    resumed = run(*flags, "--output", "killed")
    assert resumed.code == 0
    assert read_rows(Path("killed")) == read_rows(Path("whole"))
    assert tasks_of("killed") == tasks_of("whole")


def test_an_interrupt_is_one_line_and_the_same_command_goes_on(members: list[str], run: Any) -> None:
    flags = command(members, 150)
    assert run(*flags, "--output", "whole").code == 0
    process = fork([*flags, "--output", "stopped"])
    while process.is_alive() and size("stopped") < size("whole") / 3:
        time.sleep(0.001)
    os.kill(process.pid or 0, signal.SIGINT)
    process.join()
    assert process.exitcode == 130
    last = Path("said").read_text().splitlines()[-1]
    assert last == "Error: interrupted; finished rows are kept; go on with the same command"
    assert 0 < len(read_rows(Path("stopped"))) < len(read_rows(Path("whole")))
    resumed = run(*flags, "--output", "stopped")
    assert re.search(r"150 examples at 12 points.*, \d+ are done", resumed.err)
    assert read_rows(Path("stopped")) == read_rows(Path("whole"))


def test_two_commands_at_once_on_one_folder(members: list[str], run: Any) -> None:
    flags = command(members, 60)
    assert run(*flags, "--output", "whole").code == 0
    processes = [fork([*flags, "--output", "both"], f"said{number}") for number in range(2)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0], Path("said0").read_text() + Path("said1").read_text()
    assert read_rows(Path("both")) == read_rows(Path("whole"))
    assert tasks_of("both") == tasks_of("whole")
    assert {path.name for path in Path("both").iterdir()} == {path.name for path in Path("whole").iterdir()}


def test_processes_of_a_launcher_share_the_documents(members: list[str], run: Any) -> None:
    flags = command(members, 40, "--validation", 10)
    assert run(*flags, "--output", "one").code == 0
    printed, errors = (process := start(*flags, "--output", "two", "--json", ranks=2)).communicate(timeout=300)
    assert process.returncode == 0, errors
    assert json.loads(printed)["tasks"] == tasks_of("one")  # said once
    assert read_rows(Path("two")) == read_rows(Path("one"))
    assert len(re.findall(r"40 examples at 12 points.*\n2 processes share the batches\n", errors)) == 1


def test_a_lost_process_costs_its_own_documents(members: list[str], run: Any) -> None:
    flags = command(members, 40)
    assert run(*flags, "--output", "one").code == 0
    several = [*flags, "--output", "several"]
    said = launch(several, 3, [0, 2])
    assert "this process is done, others are not" in said[0]
    assert said[2] == ""
    assert not Path("several/summary.json").exists()
    rows = read_rows(Path("several"))
    assert 0 < len(rows) < len(read_rows(Path("one")))
    said = launch(several, 2, [1, 0])  # with another number of processes
    assert [("p (Holm)" in said[rank]) for rank in (0, 1)] == [True, False]
    assert read_rows(Path("several")) == read_rows(Path("one"))
    assert tasks_of("several") == tasks_of("one")
    before = (Path("several") / "summary.json").read_bytes()
    said = launch(several, 2, [1, 0])
    assert said[1] == ""
    assert "p (Holm)" in said[0]
    assert (Path("several") / "summary.json").read_bytes() == before


def test_a_process_lost_while_it_wrote_the_summary_keeps_no_other_from_it(members: list[str]) -> None:
    several = command(members, 12, "--output", "several")
    launch(several, 2, [0, 1])
    (Path("several") / "summary.json").unlink()
    with closing(sqlite3.connect(f"several/{FILE}")) as connection, connection:
        connection.execute("REPLACE INTO state VALUES ('claim summary', 'true')")
    launch(several, 2, [0, 1])
    assert len(tasks_of("several")) == 1


# -- the disk ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB."""
    (tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path / "disk")]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a disk cannot be mounted here")
    yield tmp_path / "disk"
    subprocess.run(["umount", "--lazy", str(tmp_path / "disk")], check=True)


def test_a_full_disk_ends_it_in_one_sentence_and_room_lets_it_go_on(disk: Path, members: list[str], run: Any) -> None:
    flags = command(members, 120)
    assert run(*flags, "--output", "whole").code == 0
    (disk / "ballast").write_bytes(b"x" * (2**20 - 150_000))
    full = run(*flags, "--output", disk / "out")
    assert full.code == 1
    assert full.err.splitlines()[-1] == (
        f"Error: {disk / 'out' / FILE} cannot be written: database or disk is full; make room on its disk and run the "
        "same command again, which goes on from the finished rows"
    )
    num_done = len(read_rows(disk / "out"))
    assert 0 < num_done < len(read_rows(Path("whole")))
    (disk / "ballast").unlink()
    resumed = run(*flags, "--output", disk / "out")
    assert resumed.code == 0
    assert re.search(rf"120 examples at 12 points.*, {num_done // 12} are done", resumed.err)
    assert read_rows(disk / "out") == read_rows(Path("whole"))
    (disk / "out" / "summary.json").unlink()
    (disk / "ballast").write_bytes(b"x" * (shutil.disk_usage(disk).free - 40_000))
    full = run(*flags, "--output", disk / "out")
    assert full.code == 2
    assert "cannot be written: No space left on device; " in full.err.splitlines()[-1]


# -- the batch size that fits -----------------------------------------------------------------------------------------


def test_a_resumed_run_keeps_the_batch_size_that_was_found(
    members: list[str], run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    sizes: list[int] = []
    answer = TextAnswerer.answer

    def largest(self: TextAnswerer, document: Any, points: Any) -> int:
        asked.append(document.name)
        return 5

    def interrupted(self: TextAnswerer, batches: Any, points: Any) -> Any:
        for batch in batches:
            sizes.append(len(batch))
            yield from answer(self, [batch], points)
            if len(sizes) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(TextAnswerer, "largest_batch", largest)
    monkeypatch.setattr(TextAnswerer, "answer", interrupted)
    flags = [*command(members, 23), "--batch-size", "auto"]
    assert run(*flags).code == 130
    assert len(read_rows(Path("sweep"))) == 10 * 12
    assert run(*flags).code == 0
    assert sizes == [5, 5, 5, 5, 3]
    assert len(asked) == 1
    assert json.loads(Path("sweep/summary.json").read_text())["settings"]["batch size"] == "auto"


def test_the_batch_size_that_fits_is_found_by_lm_eval(members: list[str], run: Any) -> None:
    flags = command(members, 12)
    assert run(*flags, "--batch-size", "auto", "--output", "auto").code == 0
    assert run(*flags, "--batch-size", 8, "--output", "eight").code == 0
    one, other = (read_rows(Path(name)) for name in ("auto", "eight"))
    assert [row["values"] for row in one] == [row["values"] for row in other]
