"""The results file survives what happens to it: killed and concurrent writers, full disks, other settings, damage."""

from __future__ import annotations

import json
import lzma
import random
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.store_cases import NUM, POINTS, SETTINGS, begun, check_whole, contents, document, fill, measured, start

from ensembler.errors import ConfigError, OutputError, RunError
from ensembler.evaluation import results_file
from ensembler.evaluation.results_file import FILE, Measured, open_results
from ensembler.evaluation.store import Store


def test_what_is_written_is_read(tmp_path: Path) -> None:
    from ensembler.engine.grid import GridPoint
    from ensembler.evaluation.documents import Document

    asked = Document("t", "test", 0, {}, "Q:\ud800?", ("Köln", "Bonn"), ("Köln", "Bonn"), "Köln")
    without = Document("t", "test", 1, {}, "", ())
    points = [GridPoint("eft", 0.0), GridPoint("base-change", 0.1)]
    rows = [Measured(answers, {"f1": [1, None]}, {"none": "ü"}) for answers in ([[-1.25, True]], [])]
    with Store(tmp_path / "a" / "b", SETTINGS) as store:
        store.begin("ensembler sweep demo")
        for run in ("second", "first"):
            store.begin_run(run, points, [(without, "validation"), (asked, "test")])
        store.add("first", [(asked.name, rows)])
        store.note("error", "first", {"reason": "none", "seconds": float("inf")})
        store.note("begun", "first", {})
        store.note("error", "second", {"reason": "lost"})
    with open_results(tmp_path / "a" / "b") as results:
        assert results.settings == SETTINGS
        assert results.command == "ensembler sweep demo"
        assert results.runs() == ["second", "first"]
        assert results.points("first") == [("eft", 0.0), ("base-change", 0.1)]
        assert results.documents("first") == [
            ("t/test/1", "t", "validation", "", [], None),
            ("t/test/0", "t", "test", "Q:\\ud800?", ["Köln", "Bonn"], "Köln"),
        ]
        assert results.done("first") == {"t/test/0"}
        assert results.done("second") == frozenset()
        assert list(results.rows("first")) == [("t/test/0", rows)]
        assert results.values("first", "f1") == {"t/test/0": [[1, None], [1, None]]}
        assert results.values("first", "acc") == results.values("third", "f1") == {}
        assert results.notes("error") == [
            ("first", {"reason": "none", "seconds": float("inf")}),
            ("second", {"reason": "lost"}),
        ]
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            results._connection.execute("DELETE FROM notes")


def test_rows_of_one_task(tmp_path: Path) -> None:
    with begun(tmp_path) as store:
        other = document(0)
        other.name, other.task = "u/test/0", "u"
        store.begin_run("sweep", POINTS, [(other, "test")])
        store.add("sweep", [(name, measured(0)) for name in ("t/test/0", "u/test/0")])
        assert [[name for name, _ in store.rows("sweep", task)] for task in ("t", "u", "v", None)] == [
            ["t/test/0"],
            ["u/test/0"],
            [],
            ["t/test/0", "u/test/0"],
        ]


def test_a_document_that_is_added_while_rows_are_read_has_all_its_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with begun(tmp_path) as store, open_results(tmp_path) as results:
        read, names = results._read, [name for name, *_ in results.documents("sweep")]

        def read_and_add(sql: str, *given: Any) -> list[Any]:
            found = read(sql, *given)
            if "document = ?" in sql:
                store.add("sweep", [(names[given[0] - 1], measured(given[0] - 1))])
            return found

        monkeypatch.setattr(results, "_read", read_and_add)
        assert list(results.rows("sweep")) == []
        assert dict(results.rows("sweep")) == {name: measured(index) for index, name in enumerate(names)}


def test_the_same_command_goes_on_and_may_ask_otherwise(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    with Store(tmp_path, SETTINGS) as store:
        assert not store._connection.in_transaction
        store.begin("another command")
        store.begin_run("sweep", POINTS, [(document(index), "validation") for index in (61, 1, 0)])
        assert store.done("sweep") == {f"t/test/{index}" for index in range(3)}
        store.add("sweep", [("t/test/61", measured(61)), ("t/test/0", measured(0, by=3))])
        assert store.command == "another command"
        assert store.points("sweep") == [(point.rule, point.alpha) for point in POINTS]
        parts = {name: part for name, _, part, *_ in store.documents("sweep") if part is not None}
        assert parts == {"t/test/0": "validation", "t/test/1": "validation", "t/test/61": "validation"}
    check_whole(tmp_path, {"t/test/61"})
    with open_results(tmp_path) as results:
        assert results.values("sweep", "by")["t/test/0"] == [0] * len(POINTS), "the first one counts"


def test_values_that_json_cannot_hold_are_named(tmp_path: Path) -> None:
    with begun(tmp_path) as store:
        row = [Measured([], {"acc": object()}, {})] * len(POINTS)
        with pytest.raises(RunError, match=r"t/test/1 has the value .* no row can hold"):
            store.add("sweep", [("t/test/0", measured(0)), ("t/test/1", row)])
        assert store.done("sweep") == frozenset()


def test_killed_at_any_moment_it_goes_on(tmp_path: Path) -> None:
    fill(tmp_path / "undisturbed")
    folder, draw, reported = tmp_path / "killed", random.Random(0), set()
    for _ in range(20):
        process = start("write", folder, 0)
        for _ in range(draw.randrange(6)):
            reported.add(process.stdout.readline().strip())
        time.sleep(draw.random() * 0.01)
        process.kill()
        reported.update(process.communicate()[0].split())
        reported -= {"begun", "first", "later", ""}
        if (folder / FILE).exists() and reported:
            check_whole(folder, reported)
    fill(folder)
    assert contents(folder) == contents(tmp_path / "undisturbed")


def test_a_half_written_transaction_is_taken_back(tmp_path: Path) -> None:
    fill(tmp_path / "out")
    before = contents(tmp_path / "out")
    assert start("torn", tmp_path / "out", 0).wait() == -signal.SIGKILL
    file, journal = tmp_path / "out" / FILE, tmp_path / "out" / f"{FILE}-journal"
    assert journal.stat().st_size > 0
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    (tmp_path / "copy" / journal.name).unlink()
    damaged = sqlite3.connect(tmp_path / "copy" / FILE)
    assert damaged.execute("SELECT count(*) FROM measurements WHERE metric_values = '{}'").fetchone() != (0,)
    damaged.close()
    check_whole(tmp_path / "out", {f"t/test/{index}" for index in range(NUM)})
    assert not journal.exists()
    assert contents(tmp_path / "out") == before
    assert file.stat().st_size > 0


def test_several_processes_write_at_once(tmp_path: Path) -> None:
    processes = [start("write", tmp_path / "out", by) for by in range(4)]
    said = [process.communicate()[0].split() for process in processes]
    assert sum("first" in each for each in said) == 1
    assert sum("later" in each for each in said) == 3
    names = {f"t/test/{index}" for index in range(NUM)}
    check_whole(tmp_path / "out", names)
    with open_results(tmp_path / "out") as results:
        assert all(len(set(by)) == 1 for by in results.values("sweep", "by").values())
        assert len(results.command) > 0
    assert [len(contents(tmp_path / "out")[table]) for table in ("documents", "points", "answers", "measurements")] == [
        NUM,
        len(POINTS),
        NUM * len(POINTS) * 4,
        NUM * len(POINTS),
    ]


def test_one_claims_until_it_is_released(tmp_path: Path) -> None:
    with begun(tmp_path) as one, begun(tmp_path) as other:
        assert [one.claim("summary"), other.claim("summary"), one.claim("page"), one.claim("summary")] == [
            True,
            False,
            True,
            False,
        ]
        other.release("summary")
        assert other.claim("summary")


def test_a_file_that_another_process_keeps_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_file, "RANK_TIMEOUT", 0.1)
    with begun(tmp_path) as store:
        lock = sqlite3.connect(tmp_path / FILE, isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        with pytest.raises(RunError, match=r"results\.sqlite cannot be written: database is locked; end the process"):
            store.add("sweep", [("t/test/0", measured(0))])
        lock.execute("ROLLBACK")
        store.add("sweep", [("t/test/0", measured(0))])
        assert store.done("sweep") == {"t/test/0"}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 kB."""
    (tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path / "disk")]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a disk cannot be mounted here")
    yield tmp_path / "disk"
    subprocess.run(["umount", "--lazy", str(tmp_path / "disk")], check=True)


def test_a_full_disk_ends_it_and_room_lets_it_go_on(disk: Path, tmp_path: Path) -> None:
    (disk / "ballast").write_bytes(b"x" * 100_000)
    folder, done = disk / "out", set()
    with begun(folder) as store:
        with pytest.raises(RunError) as caught:  # noqa: PT012
            for index in range(NUM):
                store.add("sweep", [(f"t/test/{index}", measured(index))])
                done.add(f"t/test/{index}")
        assert str(caught.value) == (
            f"{folder / FILE} cannot be written: database or disk is full; make room on its disk, and go on with "
            "the same command, without --overwrite"
        )
        assert store.done("sweep") == done
    assert 0 < len(done) < NUM
    check_whole(folder, done)
    with pytest.raises(OutputError, match=r"other/results\.sqlite cannot be written: .*; make room"):
        begun(disk / "other")
    shutil.rmtree(disk / "other")
    (disk / "ballast").unlink()
    fill(folder)
    fill(tmp_path / "undisturbed")
    assert contents(folder) == contents(tmp_path / "undisturbed")


def test_a_disk_that_fails_ends_it_in_one_sentence(tmp_path: Path) -> None:
    *done, error = start("limited", tmp_path / "out", 0).communicate()[0].splitlines()
    assert error.startswith(f"{tmp_path / 'out' / FILE} cannot be written: disk I/O error; make room on its disk, and")
    assert 1 < len(done) < NUM
    check_whole(tmp_path / "out", set(done) - {"begun"})
    fill(tmp_path / "out")
    fill(tmp_path / "undisturbed")
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_a_read_only_disk_is_read_and_refused(disk: Path) -> None:
    fill(disk / "out", range(2))
    fill(disk / "torn", range(20))
    start("torn", disk / "torn", 0).wait()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    check_whole(disk / "out", {"t/test/0", "t/test/1"})
    with pytest.raises(OutputError, match="may not be written to; give --output another folder"):
        Store(disk / "out", SETTINGS)
    with pytest.raises(OutputError, match="may not be written to; give --output another folder"):
        Store(disk / "new" / "one", SETTINGS)
    with pytest.raises(OutputError, match=r"cannot be read: .*; allow writing to it and its folder"):
        check_whole(disk / "torn", set())


def test_other_settings_are_named_and_nothing_changes(tmp_path: Path) -> None:
    fill(tmp_path, range(2))
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(
        OutputError,
        match=r"the results of another run: --alpha is \[0\.0, 0\.5, 1\.0\] there and \[0\.5\] here; --limit is 3 "
        r"there and 4 here\. Run the same command to go on with it, give --output another folder, or add --overwrite",
    ):
        Store(tmp_path, {**SETTINGS, "alphas": [0.5], "tasks": {"t": {"limit": 4}}})
    with pytest.raises(
        OutputError, match=r"a is none there and 1 here; .* c is none there and 1 here \(and 2 more\)\."
    ):
        Store(tmp_path, {**SETTINGS, **dict.fromkeys("abcde", 1)})
    Store(tmp_path, SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert (tmp_path / FILE).read_bytes() == before


def test_differences_are_named_as_the_user_knows_them(tmp_path: Path) -> None:
    members = {"source_ft": {"dtype": None, "fingerprint": "1"}, "target_pt": {"config": "1", "fingerprint": "1"}}
    task = {"limit": 3, "config": "1", "documents": "1", "tokens": "1"}
    plan = {"versions": {"torch": "1"}, "ensemble": {"members": members}, "batch size": 8, "tasks": {"t": task}}

    def differences(there: Any, here: Any, folder: str) -> str:
        with Store(tmp_path / folder, there) as store:
            store.begin("command")
            store.begin_run("sweep", POINTS, [(document(0), "test")])
            store.add("sweep", [("t/test/0", measured(0))])
        with pytest.raises(OutputError) as caught:
            Store(tmp_path / folder, here)
        return str(caught.value).partition("another run: ")[2].partition(". Run")[0]

    of_bench = {"runs": {"one": plan}, "speed": {}}
    assert differences(plan, of_bench, "sweep") == "it is a sweep, and this is a benchmark"
    assert differences(of_bench, plan, "bench") == "it is a benchmark, and this is a sweep"
    for number, (change, said) in enumerate(
        {
            '{"tasks": {"t": {"limit": 4, "documents": "2", "tokens": "2"}}}': "--limit is 3 there and 4 here",
            '{"tasks": {"t": {"documents": "2", "tokens": "2"}}}': "the documents or prompts of t changed",
            '{"tasks": {"u": {"limit": 3}}}': 'tasks is ["t"] there and ["t", "u"] here',
            '{"ensemble": {"members": {"target_pt": {"fingerprint": "2"}}}}': "the weights of target_pt changed",
            '{"ensemble": {"members": {"source_ft": {"dtype": "x"}}}}': 'dtype of source_ft is none there and "x" here',
            '{"ensemble": {"rule": "eft"}}': 'ensemble rule is none there and "eft" here',
            '{"versions": {"torch": "2"}}': 'the version of torch is "1" there and "2" here',
        }.items()
    ):
        changed = merged(plan, json.loads(change))
        assert differences(plan, changed, f"sweep {number}") == said
        runs = {"one": changed, "two": changed}
        assert differences({"runs": {"one": plan, "two": plan}}, {"runs": runs}, f"bench {number}") in (
            said.replace("--", ""),
            f"one: {said}; two: {said}",
        )
    assert differences(plan, {**plan, "batch size": "auto"}, "auto") == '--batch-size is 8 there and "auto" here'


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """`one` with what `other` has in its place, mapping by mapping."""
    return one | {
        key: merged(one.get(key, {}), each) if isinstance(each, dict) else each for key, each in other.items()
    }


def test_without_rows_other_settings_begin_anew(tmp_path: Path) -> None:
    with begun(tmp_path) as early:
        early.note("error", "sweep", {})
        with begun(tmp_path, alphas=[0.5]) as late:
            assert late.settings == {**SETTINGS, "alphas": [0.5]}
            assert late.notes("error") == []
            with pytest.raises(RunError, match=r"results\.sqlite was begun anew by another process"):
                early.add("sweep", [("t/test/0", measured(0))])
            late.add("sweep", [("t/test/0", measured(0))])
    with pytest.raises(OutputError, match="holds the results of another run"):
        Store(tmp_path, SETTINGS)
    one, other = (Store(tmp_path / "race", {**SETTINGS, "alphas": [alpha]}) for alpha in (0, 1))
    one.begin("one")
    one.begin_run("sweep", POINTS, [(document(0), "test")])
    one.add("sweep", [("t/test/0", measured(0))])
    with pytest.raises(OutputError, match=r"--alpha is \[0\] there and \[1\] here"):
        other.begin("other")


def test_overwriting_begins_anew_and_removes_the_report(tmp_path: Path) -> None:
    fill(tmp_path)
    other = {**SETTINGS, "alphas": [0.5]}
    for name in ("summary.json", "report.html", "curve.png", "thesis.txt"):
        (tmp_path / name).write_text("x")
    with Store(tmp_path, other, overwrite=True) as store:
        check_whole(tmp_path, {f"t/test/{index}" for index in range(NUM)})  # nothing is removed before `begin`
        store.begin("another command")
        assert {path.name for path in tmp_path.iterdir()} == {FILE, "thesis.txt"}
        assert (store.settings, store.command, store.runs()) == (other, "another command", [])
        store.begin_run("sweep", POINTS, [(document(0), "test")])
        store.add("sweep", [("t/test/0", measured(0))])
    with begun(tmp_path, alphas=[0.5]) as again:
        assert again.done("sweep") == {"t/test/0"}


def test_overwriting_that_fails_leaves_the_rows(tmp_path: Path) -> None:
    fill(tmp_path, range(2))
    before = contents(tmp_path)
    (tmp_path / "report.html").mkdir()  # which cannot be removed as a file
    with Store(tmp_path, {"alphas": [0.5]}, overwrite=True) as store, pytest.raises(OutputError, match=r"report\.html"):
        store.begin("another command")
    assert contents(tmp_path) == before


def test_of_several_processes_none_overwrites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, range(2))
    monkeypatch.setattr("ensembler.evaluation.store.num_ranks", lambda: 2)
    with pytest.raises(ConfigError, match=rf"was given to 2 processes; remove {tmp_path}, and start them without it"):
        Store(tmp_path, SETTINGS, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_results_folder_is_left_alone(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(OutputError, match="holds something else than results; give --output another folder"):
        Store(tmp_path, SETTINGS, overwrite=overwrite)
    with pytest.raises(OutputError, match="is no folder; give --output the name of a new one"):
        Store(tmp_path / "thesis.txt", SETTINGS)
    with pytest.raises(OutputError, match="cannot be made: Not a directory; give --output another folder"):
        Store(tmp_path / "thesis.txt" / "out", SETTINGS).begin("command")
    with pytest.raises(OutputError, match=r"holds no results\.sqlite; give a folder"):
        open_results(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_of_another_kind_or_version_is_refused(tmp_path: Path, overwrite: bool) -> None:
    other = sqlite3.connect(tmp_path / FILE)
    other.execute("CREATE TABLE cars (name TEXT)")
    other.commit()
    other.close()
    with pytest.raises(OutputError, match=r"results\.sqlite holds something else than results"):
        Store(tmp_path, SETTINGS, overwrite=overwrite)
    (tmp_path / FILE).unlink()
    fill(tmp_path, range(1))
    newer = sqlite3.connect(tmp_path / FILE)
    newer.execute("PRAGMA user_version = 7")
    newer.close()
    for open_it in (lambda: Store(tmp_path, SETTINGS, overwrite=overwrite), lambda: open_results(tmp_path)):
        with pytest.raises(OutputError, match="holds results of format 7, and this version reads 1; give another fold"):
            open_it()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    fill(tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    for content in (b"not a database at all" * 300, whole[: len(whole) // 2], whole[:100]):
        (tmp_path / FILE).write_bytes(content)
        with pytest.raises(
            OutputError, match=r"results\.sqlite cannot be (read|written): .*; put an undamaged copy in"
        ):
            check_whole(tmp_path, set())
    (tmp_path / FILE).write_bytes(whole.replace(b'{"acc": 1.0', b'{"acc= 1.0'.ljust(11)))
    with pytest.raises(OutputError, match=r"cannot be read: .*; put an undamaged copy in its place"):
        check_whole(tmp_path, set())
    (tmp_path / FILE).write_bytes(b"")  # a process that was killed before it wrote anything
    with pytest.raises(OutputError, match="holds no results yet"):
        open_results(tmp_path)
    fill(tmp_path)
    check_whole(tmp_path, {"t/test/0"})


def test_a_compressed_file_is_read(tmp_path: Path) -> None:
    fill(tmp_path / "out")
    (tmp_path / "kept").mkdir()
    kept = tmp_path / "kept" / f"{FILE}.xz"
    kept.write_bytes(lzma.compress((tmp_path / "out" / FILE).read_bytes()))
    for place in (kept, kept.parent):
        check_whole(place, {f"t/test/{index}" for index in range(NUM)})
    for damaged in (kept.read_bytes()[:-20], b"no xz"):
        kept.write_bytes(damaged)
        with pytest.raises(OutputError, match=r"results\.sqlite\.xz cannot be read: .*; put an undamaged copy in"):
            open_results(kept)
    (kept.parent / "report.html").touch()
    with pytest.raises(OutputError, match=r"sqlite\.xz holds compressed results; unpack it .*or give --output"):
        Store(kept.parent, SETTINGS)
    assert {path.name for path in kept.parent.iterdir()} == {kept.name, "report.html"}
    shutil.copy(tmp_path / "out" / FILE, kept.parent)
    Store(kept.parent, SETTINGS).begin("goes on with what was unpacked")
