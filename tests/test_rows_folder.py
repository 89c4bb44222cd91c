"""A folder of rows survives what happens to it: torn lines, half examples, other processes, other settings."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from ensembler.errors import OutputError
from ensembler.evaluation.rows_folder import RowsFolder

IDS = [f"t/test/{number}" for number in range(12)]


def folder(path: Path, rank: int = 0, **settings: Any) -> RowsFolder:
    return RowsFolder(path, {"format": 1, **settings}, rows_per_id=3, rank=rank)


def rows_of(name: str) -> list[dict[str, Any]]:
    return [{"id": name, "alpha": alpha, "value": len(name) * alpha} for alpha in range(3)]


def fill(one: RowsFolder, ids: list[str]) -> None:
    one.begin("command", [])
    with one:
        for name in ids:
            one.append(rows_of(name))


def whole(path: Path) -> bytes:
    fill(folder(path), IDS)
    assert folder(path).finish(IDS) == {name: rows_of(name) for name in IDS}
    return (path / "rows.jsonl").read_bytes()


def test_a_file_cut_anywhere_is_made_whole_again(tmp_path: Path) -> None:
    expected = whole(tmp_path / "whole")
    draw = random.Random(0)
    for number in range(200):
        path = tmp_path / str(number)
        fill(folder(path), [])
        (path / "rows.jsonl").write_bytes(expected[: draw.randrange(len(expected) + 1)])
        again = folder(path)
        missing = [name for name in IDS if name not in again.rows()]
        fill(again, missing)
        assert again.finish(IDS) == {name: rows_of(name) for name in IDS}
        assert (path / "rows.jsonl").read_bytes() == expected


def test_processes_write_apart_and_are_merged_in_order(tmp_path: Path) -> None:
    expected = whole(tmp_path / "whole")
    path = tmp_path / "several"
    for rank in (2, 0, 1):
        fill(folder(path, rank), IDS[rank::3])
        assert (folder(path).finish(IDS) is None) == (rank != 1)
    assert (path / "rows.jsonl").read_bytes() == expected
    assert not list(path.glob("rows.*.jsonl"))


def test_rows_that_two_processes_made_count_once(tmp_path: Path) -> None:
    for rank in (0, 1):
        fill(folder(tmp_path / "out", rank), IDS)
    assert folder(tmp_path / "out").finish(IDS) is not None
    assert (tmp_path / "out" / "rows.jsonl").read_bytes() == whole(tmp_path / "whole")


def test_one_claims_the_summary(tmp_path: Path) -> None:
    fill(folder(tmp_path / "out"), IDS)
    assert [folder(tmp_path / "out", rank).claim() for rank in range(3)] == [True, False, False]
    folder(tmp_path / "out").release()
    assert folder(tmp_path / "out").claim()


def test_a_file_that_is_written_to_is_not_opened_twice(tmp_path: Path) -> None:
    one, other = folder(tmp_path / "out"), folder(tmp_path / "out")
    one.begin("command", [])
    with one:
        with pytest.raises(OutputError, match="being written to by another process"), other:
            pass
        with folder(tmp_path / "out", rank=1):
            pass
    with other:
        pass


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    fill(folder(tmp_path / "out"), IDS[:2])
    file = tmp_path / "out" / "rows.jsonl"
    file.write_text(file.read_text().replace('"id"', '"dd"', 1))
    with pytest.raises(OutputError, match=r"rows\.jsonl:1 is no row of a run"):
        folder(tmp_path / "out").rows()


def test_other_settings_are_named_and_nothing_changes(tmp_path: Path) -> None:
    fill(folder(tmp_path / "out", alphas=[0, 1], tasks={"a": {"limit": 3}}), IDS[:2])
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(
        OutputError, match=r"alphas is \[0, 1\] there and \[0\] here; tasks a limit is 3 there and 4 here"
    ):
        folder(tmp_path / "out", alphas=[0], tasks={"a": {"limit": 4}})
    with pytest.raises(OutputError, match="format is 1 there and 2 here"):
        folder(tmp_path / "out", alphas=[0, 1], tasks={"a": {"limit": 3}}, format=2)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(OutputError, match="holds something else"):
        folder(tmp_path)
    with pytest.raises(OutputError, match="is no folder"):
        folder(tmp_path / "thesis.txt")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    with pytest.raises(OutputError, match="cannot be read"):
        folder(tmp_path / "broken")
    assert json.dumps(sorted(path.name for path in tmp_path.iterdir())) == '["broken", "thesis.txt"]'
