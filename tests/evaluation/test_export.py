"""`ensembler export`: everything in a results file comes out, as JSON lines and as Parquet."""

from __future__ import annotations

import json
import lzma
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from ensembler.cli.export import export
from ensembler.errors import EnsemblerError
from ensembler.evaluation.results_file import FILE, Measured
from ensembler.evaluation.store import Store

POINTS = [SimpleNamespace(rule="eft", alpha=0.0), SimpleNamespace(rule="base-change", alpha=0.5)]
ROWS = [
    Measured([[-1.5, True], [float("-inf"), False]], {"acc": 1.0, "log_prob": float("-inf")}, {"none": "Köln"}),
    Measured([["a text", "\ud800"]], {"acc": 0.0, "f1": [1, 0]}, {}),
]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    asked = SimpleNamespace(name="t/test/0", task="t", prompt="Where?", choices=("Köln", "Bonn"), gold="Köln")
    other = SimpleNamespace(name="t/train/0", task="t", prompt="", choices=(), gold=None)
    with Store(tmp_path / "bench", {"alphas": [0.0, 0.5]}) as store:
        store.begin("ensembler bench recipe.yaml")
        for run in ("two", "one"):
            store.begin_run(run, POINTS, [(other, "validation"), (asked, "test")])
            store.add(run, [("t/test/0", ROWS)])
        store.note("error", "two", {"reason": "out of memory"})
        store.note("cost", "one", {"seconds": 1.5})
    return tmp_path / "bench"


def printed(*args: object) -> list[Any]:
    done = CliRunner().invoke(export, list(map(str, args)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return [json.loads(line, parse_constant=pytest.fail) for line in done.stdout.splitlines()]


def error(*args: object) -> str:
    with pytest.raises(EnsemblerError) as caught:
        CliRunner().invoke(export, list(map(str, args)), catch_exceptions=False)
    return str(caught.value)


def test_rows_are_printed(results: Path) -> None:
    rows = printed(results)
    assert [(row["run"], row["rule"], row["alpha"]) for row in rows] == [
        (run, point.rule, point.alpha) for run in ("two", "one") for point in POINTS
    ]
    assert rows[2] == {
        "run": "one",
        "task": "t",
        "document": "t/test/0",
        "part": "test",
        "rule": "eft",
        "alpha": 0.0,
        "values": {"acc": 1.0, "log_prob": {"float": "-inf"}},
        "predictions": {"none": "Köln"},
        "answers": [[-1.5, True], [{"float": "-inf"}, False]],
    }
    assert rows[3]["answers"] == [["a text", "\ud800"]]
    assert printed(results / FILE) == rows


def test_the_rest_is_printed(results: Path) -> None:
    documents = printed(results, "--what", "documents")
    assert [row["run"] for row in documents] == ["two", "two", "one", "one"]
    assert documents[1] == {
        "run": "two",
        "document": "t/test/0",
        "task": "t",
        "part": "test",
        "prompt": "Where?",
        "choices": ["Köln", "Bonn"],
        "gold": "Köln",
    }
    assert printed(results, "--what", "notes") == [
        {"kind": "error", "name": "two", "content": {"reason": "out of memory"}},
        {"kind": "cost", "name": "one", "content": {"seconds": 1.5}},
    ]
    assert printed(results, "--what", "settings") == [
        {"command": "ensembler bench recipe.yaml", "settings": {"alphas": [0.0, 0.5]}}
    ]


def test_compressed_results_are_printed(results: Path) -> None:
    rows = printed(results)
    (results / f"{FILE}.xz").write_bytes(lzma.compress((results / FILE).read_bytes()))
    (results / FILE).unlink()
    assert printed(results) == rows


def test_a_new_file_is_written_whole(results: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    assert printed(results, "--output", out) == []
    assert [json.loads(line) for line in out.read_text("utf-8").splitlines()] == printed(results)
    assert error(results, "--output", out) == f"{out} exists already; give --output another name, or add --overwrite"
    assert "No such file or directory; choose another place" in error(results, "--output", tmp_path / "no" / "rows")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench", "rows.jsonl"]


def test_the_results_are_not_written_over(results: Path) -> None:
    before = (results / FILE).read_bytes()
    said = error(results, "--output", results / FILE, "--overwrite")
    assert said == f"{results / FILE} is {results / FILE}, which this command reads; give --output another name"
    assert (results / FILE).read_bytes() == before


@pytest.mark.parametrize("what", ["rows", "documents", "notes", "settings"])
def test_parquet_holds_the_same(results: Path, tmp_path: Path, what: str) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    out = tmp_path / "table.parquet"
    assert printed(results, "--what", what, "--format", "parquet", "--output", out) == []
    nested = {"values", "predictions", "answers", "choices", "content", "settings"}
    rows = [
        {key: json.loads(value) if key in nested else value for key, value in row.items()}
        for row in parquet.read_table(out).to_pylist()
    ]
    assert rows == printed(results, "--what", what)


def test_a_document_that_is_not_at_all_points_is_told(results: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(results / FILE)) as damaged:
        damaged.execute("DELETE FROM measurements WHERE point = (SELECT max(id) FROM points)")
        damaged.commit()
    told = "results.sqlite is damaged: t/test/0 is not measured at all points; put an undamaged copy in its place"
    assert told in error(results)
    assert told in error(results, "--output", tmp_path / "rows.jsonl")


def test_what_is_no_text_is_told(results: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(results / FILE)) as damaged:
        damaged.execute("UPDATE answers SET answer = x'00' WHERE request = 0")
        damaged.commit()
    assert "results.sqlite cannot be read: Expecting value: " in error(results, "--output", tmp_path / "rows.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["bench"]


def test_an_empty_table_has_its_columns(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    with Store(tmp_path / "sweep", {}) as store:
        store.begin("command")
    assert printed(tmp_path / "sweep") == []
    printed(tmp_path / "sweep", "--format", "parquet", "--output", tmp_path / "rows.parquet")
    table = parquet.read_table(tmp_path / "rows.parquet")
    assert table.num_rows == 0
    assert table.column_names[:4] == ["run", "task", "document", "part"]


def test_mistakes_are_one_sentence(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert error(tmp_path / "no").endswith(
        "no holds no results.sqlite; give a folder that `ensembler sweep` or `ensembler bench` wrote"
    )
    assert error(results, "--format", "parquet") == (
        "parquet is a binary file and not for printing; give --output a file, or --format jsonl"
    )
    (tmp_path / "notes.txt").write_text("no results at all")
    assert "notes.txt cannot be read: file is not a database; put an undamaged copy" in error(tmp_path / "notes.txt")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pyarrow is not installed; install it with: pip install" in error(
        results, "--format", "parquet", "--output", tmp_path / "rows.parquet"
    )
    assert not (tmp_path / "rows.parquet").exists()
