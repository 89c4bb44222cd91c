"""`ensembler sweep`: what is refused, what an interruption costs, several processes, what is written."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from click.testing import CliRunner
from sweep_cases import data_flags, read_rows, save_ensemble, start, write_questions

from ensembler.cli.main import cli
from ensembler.errors import EnsemblerError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return save_ensemble(tmp_path_factory.mktemp("members")).flags


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli, ["sweep", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def refused(*arguments: object) -> str:
    with pytest.raises(EnsemblerError) as found:
        CliRunner().invoke(cli, ["sweep", *map(str, arguments)], catch_exceptions=False, standalone_mode=False)
    assert found.value.exit_code == 2
    assert not Path("sweep").exists()
    return str(found.value)


def questions(tmp_path: Path, number: int = 30) -> list[str]:
    return data_flags(write_questions(tmp_path / "questions.jsonl", number))


def test_everything_is_written_and_the_same_again(members: list[str], tmp_path: Path) -> None:
    flags = [*members, *questions(tmp_path), "--rules", "base-change,eft", "--alphas", "0:1:0.5", "--validation", 10]
    printed = run(*flags)
    assert "20 test examples; 10 validation examples" in printed
    assert {path.name for path in Path("sweep").iterdir() if path.suffix not in (".lock",)} == {
        "run.json", "examples.jsonl", "rows.jsonl", "summary.json", "sweep.png", "report.html"
    }  # fmt: skip
    rows = read_rows(Path("sweep"))
    assert len(rows) == 30 * 6
    assert len({(row["id"], row["rule"], row["alpha"]) for row in rows}) == len(rows)
    examples = [json.loads(line) for line in Path("sweep/examples.jsonl").read_text().splitlines()]
    assert [example["part"] for example in examples] == ["validation"] * 10 + ["test"] * 20
    summary = json.loads(Path("sweep/summary.json").read_text())
    assert {choice["by"] for choice in summary["tasks"][0]["choices"]} == {"validation"}
    assert str(tmp_path) not in Path("sweep/report.html").read_text().replace(summary["command"], "")
    before = {path.name: path.read_bytes() for path in Path("sweep").iterdir()}
    again = run(*flags)
    table = re.compile(r"method.*", re.DOTALL)
    assert table.findall(again) == table.findall(printed)
    assert {path.name: path.read_bytes() for path in Path("sweep").iterdir()} == before


def test_another_choice_goes_on_from_the_same_rows(members: list[str], tmp_path: Path) -> None:
    flags = [*members, *questions(tmp_path), "--alphas", "0,0.5,1"]
    assert "no alpha will be chosen" in run(*flags)
    rows = sorted(Path("sweep/rows.jsonl").read_text().splitlines())
    assert "alpha" in run(*flags, "--validation", 10)
    assert sorted(Path("sweep/rows.jsonl").read_text().splitlines()) == rows
    assert "without labels" in run(*flags, "--select", "perplexity")
    assert set(rows) < set(Path("sweep/rows.jsonl").read_text().splitlines())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--alphas", "0,1"], "alphas is [0.0, 0.5, 1.0] there and [0.0, 1.0] here"),
        (["--seed", 3], "seed is 0 there and 3 here"),
        (["--batch-size", 2], "batch size is 8 there and 2 here"),
        (["--rules", "eft"], 'rules is ["base-change"] there and ["eft"] here'),
        (["--limit", 9], "limit is null there and 9 here"),
    ],
)
def test_another_command_on_the_folder_is_refused_by_its_difference(
    changed: list[Any], said: str, members: list[str], tmp_path: Path
) -> None:
    flags = [*members, *questions(tmp_path, 12), "--alphas", "0,0.5,1", "--output", "out"]
    run(*flags)
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    assert said in refused(*flags, *changed)
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before


def test_changed_documents_members_and_versions_are_noticed(members: list[str], tmp_path: Path) -> None:
    flags = [*members, *questions(tmp_path, 12), "--alphas", "0,1", "--output", "out"]
    run(*flags)
    (tmp_path / "questions.jsonl").write_text((tmp_path / "questions.jsonl").read_text().replace("a 0?", "b 0?"))
    assert "documents is" in refused(*flags)
    questions(tmp_path, 12)
    run(*flags)
    config = Path(members[1]) / "config.json"
    content = config.read_text()
    config.write_text(content.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.5'))
    assert config.read_text() != content
    try:
        assert "members source_ft config is" in refused(*flags)
    finally:
        config.write_text(content)
    settings = json.loads(Path("out/run.json").read_text())
    settings["settings"]["versions"]["ensembler"] = "0.0.1"
    Path("out/run.json").write_text(json.dumps(settings))
    assert 'versions ensembler is "0.0.1" there' in refused(*flags)


def test_a_run_without_rows_does_not_block_its_folder(members: list[str], tmp_path: Path) -> None:
    flags = [*members, *questions(tmp_path, 12), "--alphas", "0,1", "--output", "out"]
    run(*flags)
    Path("out/rows.jsonl").write_text("")
    run(*flags, "--batch-size", 3)
    assert json.loads(Path("out/run.json").read_text())["settings"]["batch size"] == 3


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--task", "hellaswagg"], "did you mean hellaswag"),
        (["--task", "nowhere.yaml"], "nowhere.yaml does not exist"),
        ([], "no task was given"),
        (["--prompt", "{a}"], "--prompt was given without --data"),
        (["--data", "q.jsonl", "--answer", "{label}"], "--data was given without --prompt"),
        (["--data", "q.jsonl", "--task", "x"], "--task and --data were both given"),
        (["--data", "q.jsonl", "--prompt", "{questoin}", "--answer", "{label}", "--choices", "a,b"], "q.jsonl:1"),
        (["--data", "q.jsonl", "--prompt", "{question}", "--answer", "{label}", "--choices", "a,b,c,c"], "that differ"),
        (["DATA", "--metric", "perplexity"], "no choices: leave --choices out"),
        (["DATA", "--alphas", "0:1"], "no grid; expected FIRST:LAST:STEP"),
        (["DATA", "--alphas", "1:0:0.1"], "empty; expected FIRST:LAST:STEP"),
        (["DATA", "--alphas", "0,nan"], "no grid"),
        (["DATA", "--alphas", "0,0.5,0.5"], "0.5 is in the grid twice"),
        (["DATA", "--alphas", "-1,0"], "not negative"),
        (["DATA", "--rules", "base-chnage"], "unknown rule 'base-chnage'"),
        (["DATA", "--rules", "base-change,contrastive"], "leave this rule out"),
        (["DATA", "--validation", "12"], "leaves none to choose from or to report"),
        (["DATA", "--validation", "0"], "leaves none"),
        (["DATA", "--validation", "test"], "is the one that is reported"),
        (["DATA", "--validation", "10%"], "has no split '10%'"),
        (["DATA", "--one-standard-error"], "needs validation examples"),
        (["DATA", "--validation", "5", "--select", "perplexity"], "give one of the two"),
        (["DATA", "--output", "q.jsonl"], "is no folder"),
        (["DATA", "--output", "."], "holds something else"),
        (["DATA", "--output", "/proc/nowhere"], "cannot be made"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    flags: list[str], said: str, members: list[str], tmp_path: Path
) -> None:
    data = data_flags(write_questions(tmp_path / "q.jsonl", 12))
    given = [part for flag in flags for part in (data if flag == "DATA" else [flag])]
    message = refused(*members, *given)
    assert said in message
    assert "\n" not in message
    assert {path.name for path in tmp_path.iterdir()} <= {"q.jsonl", "cache"}


def test_a_choice_that_is_empty_is_named(members: list[str], tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"q": "a", "c": ["x", "y"], "l": 0}\n{"q": "b", "c": ["x", " "], "l": 0}\n')
    flags = ["--data", "q.jsonl", "--prompt", "{q}", "--choices", "{c}", "--answer", "{l}"]
    assert "q.jsonl:2: choice 1 is empty" in refused(*members, *flags)


def test_contexts_that_are_cut_are_told(tmp_path: Path) -> None:
    short = save_ensemble(tmp_path / "short", source_pt={"family": "llama", "max_position_embeddings": 24})
    rows = [{"question": "once upon a time " * (1 + i % 3) + str(i), "label": "ab"[i % 2]} for i in range(8)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    printed = run(*short.flags, *data_flags(tmp_path / "q.jsonl"), "--alphas", "0,1")
    (task,) = json.loads(Path("sweep/summary.json").read_text())["tasks"]
    assert task["num_truncated"] > 0
    assert f"{task['num_truncated']} requests cut on the left" in printed


def test_one_alpha_is_allowed_and_said(members: list[str], tmp_path: Path) -> None:
    printed = run(*members, *questions(tmp_path, 12), "--alphas", "0.5")
    assert "one alpha, 0.5: there is nothing to choose" in printed
    assert "base-change α = 0.5" in printed


def test_kills_at_any_moment_lose_no_row_and_make_none_twice(members: list[str], tmp_path: Path) -> None:
    flags = [*members, *questions(tmp_path, 120), "--alphas", "0:1:0.1", "--batch-size", 2]
    run(*flags, "--output", "whole")
    whole = Path("whole/rows.jsonl").read_bytes()
    draw = random.Random(0)
    for _ in range(3):
        process = start("sweep", *flags, "--output", "killed")
        target = draw.randrange(1, len(whole))
        while process.poll() is None and _size(Path("killed/rows.jsonl")) < target:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    interrupted = start("sweep", *flags, "--output", "killed")
    rows_there = _size(Path("killed/rows.jsonl"))
    while interrupted.poll() is None and _size(Path("killed/rows.jsonl")) <= rows_there < len(whole):
        time.sleep(0.005)
    interrupted.send_signal(signal.SIGINT)
    _, errors = interrupted.communicate()
    assert interrupted.returncode in (0, 130)
    assert interrupted.returncode == 0 or "interrupted" in errors.splitlines()[-1]
    run(*flags, "--output", "killed")
    assert Path("killed/rows.jsonl").read_bytes() == whole
    summaries = [json.loads(Path(name, "summary.json").read_text())["tasks"] for name in ("whole", "killed")]
    assert summaries[0] == summaries[1]


def test_processes_share_the_examples_and_a_lost_one_costs_its_own(members: list[str], tmp_path: Path) -> None:
    flags = [*members, *questions(tmp_path, 40), "--alphas", "0,1", "--batch-size", 3, "--validation", 10]
    run(*flags, "--output", "one")
    process = start("sweep", *flags, "--output", "two", "--json", ranks=2)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert json.loads(printed)["tasks"] == json.loads(Path("one/summary.json").read_text())["tasks"]  # said once
    assert Path("two/rows.jsonl").read_bytes() == Path("one/rows.jsonl").read_bytes()
    assert not list(Path("two").glob("rows.*.jsonl"))
    rows = Path("two/rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "two" / "rows.jsonl").write_text("".join(rows[:31]))  # one example is half there
    (tmp_path / "two" / "rows.1.jsonl").write_text("".join(rows[60:70]))
    run(*flags, "--output", "two")
    assert Path("two/rows.jsonl").read_bytes() == Path("one/rows.jsonl").read_bytes()


def _size(path: Path) -> int:
    return os.stat(path).st_size if path.exists() else 0
