"""`ensembler sweep`: what is written, refused and gone on with; no row is lost by kills, and none is there twice."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from click.testing import CliRunner
from helpers.process_cases import fork, launch
from helpers.sweep_cases import column, data_flags, read_rows, save_ensemble, start, write_questions
from helpers.task_cases import write_rows, write_tasks

from ensembler.cli.main import cli
from ensembler.errors import EnsemblerError
from ensembler.evaluation.results_file import FILE, TABLES, open_results
from ensembler.evaluation.text_answers import TextAnswerer
from ensembler.folder import read, set_point

FILES = {FILE, "summary.json", "curve.png", "methods.png", "report.html"}


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
    assert "\n" not in str(found.value)
    assert not Path("sweep").exists()
    return str(found.value)


def questions(tmp_path: Path, number: int = 30) -> list[str]:
    return data_flags(write_questions(tmp_path / "questions.jsonl", number))


def contents(folder: Path) -> dict[str, Any]:
    """All files of a folder; of the results all rows of their tables."""
    with closing(sqlite3.connect(folder / FILE)) as connection:
        tables = {table: connection.execute(f"SELECT * FROM {table}").fetchall() for table in TABLES}
    return tables | {path.name: path.read_bytes() for path in folder.iterdir() if path.name != FILE}


def summary(folder: str = "sweep") -> dict[str, Any]:
    (task,) = json.loads(Path(folder, "summary.json").read_text())["tasks"]
    return dict(task)


def test_everything_is_written_and_the_same_again(members: list[str], tmp_path: Path) -> None:
    flags = [*members, *questions(tmp_path), "--rule", "base-change,eft", "--alpha", "0:1:0.5", "--validation", 10]
    printed = run(*flags)
    assert "20 test documents; 10 others chose alpha" in printed
    assert {path.name for path in Path("sweep").iterdir()} == FILES
    rows = read_rows(Path("sweep"))
    assert len(rows) == 30 * 6
    assert len({(row["id"], row["rule"], row["alpha"]) for row in rows}) == len(rows)
    assert [row["part"] for row in rows] == ["validation"] * 60 + ["test"] * 120
    tested = [row for row in rows if row["part"] == "test"]
    for method in summary()["methods"]:
        right = column(tested, "test", method["rule"], method["alpha"] or 0.0, "acc")
        assert method["test"]["estimate"] == sum(right) / 20
    page = Path("sweep/report.html").read_text()
    assert str(tmp_path) not in page.replace(json.loads(Path("sweep/summary.json").read_text())["command"], "")
    before = contents(Path("sweep"))
    again = run(*flags)
    table = re.compile(r"method.*", re.DOTALL)
    assert table.findall(again) == table.findall(printed)
    assert contents(Path("sweep")) == before


def test_another_choice_goes_on_from_the_same_rows(tmp_path: Path, members: list[str]) -> None:
    """Only what chooses needs new rows: of another split, of prompts."""
    task = write_tasks(tmp_path / "tasks") / "choice.yaml"
    flags = [*members, "--task", task, "--alpha", "0,0.5,1"]
    assert "no alpha will be chosen" in run(*flags)
    rows = {(row["id"], row["rule"], row["alpha"]): row["answers"] for row in read_rows(Path("sweep"))}

    def going_on(*changes: object) -> dict[str, Any]:
        run(*flags, *changes)
        found = {(row["id"], row["rule"], row["alpha"]): row["answers"] for row in read_rows(Path("sweep"))}
        assert rows.items() <= found.items()
        rows.update(found)
        return summary()

    def chosen_by(task: dict[str, Any]) -> str:
        (found,) = {method["chosen_by"] for method in task["methods"]} - {None}
        return str(found)

    plain = going_on()
    num_rows = len(rows)
    drawn = going_on("--validation", 2)
    assert (chosen_by(drawn), drawn["num_test"]) == ("validation", 3)
    assert going_on("--validation", 2, "--one-standard-error")["num_test"] == 3
    other = going_on("--validation", 2, "--metric", "acc_norm", "--cluster", "answer", "--margin", 5)
    assert (other["metric"], other["cluster"], other["margin"]) == ("acc_norm", "answer", 5)
    assert len(rows) == num_rows
    split = going_on("--validation", "train")
    assert (chosen_by(split), split["num_validation"], split["num_test"]) == ("validation", 2, 5)
    assert chosen_by(going_on("--select", "perplexity")) == "prompt perplexity"
    assert len(rows) > num_rows
    assert going_on() == plain
    train = tmp_path / "tasks" / "train_questions.jsonl"
    train.write_text((tmp_path / "tasks" / "questions.jsonl").read_text().replace("abc", "xyz"))
    with pytest.raises(EnsemblerError, match=r"has rows of another tiny_choice/train/0; give --output another folder"):
        going_on("--validation", "train")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--alpha", "0,1"], ": --alpha is [0.0, 0.5, 1.0] there and [0.0, 1.0] here"),
        (["--seed", 3], ": --seed is 0 there and 3 here"),
        (["--batch-size", 2], ": --batch-size is 8 there and 2 here"),
        (["--batch-size", "auto"], ': --batch-size is 8 there and "auto" here'),
        (["--rule", "eft"], '; --rule is ["base-change"] there and ["eft"] here'),
        (["--limit", 9], "another run: --limit is none there and 9 here. Run"),
        (["--num-fewshot", 1], "another run: --num-fewshot is 0 there and 1 here. Run"),
        (["--system-instruction", "Hi"], 'another run: --system-instruction is none there and "Hi" here. Run'),
    ],
)
def test_another_command_on_the_folder_is_refused_by_its_difference(
    changed: list[Any], said: str, members: list[str], tmp_path: Path
) -> None:
    flags, alphas = [*members, *questions(tmp_path, 12), "--output", "out"], ["--alpha", "0,0.5,1"]
    run(*flags, *alphas)
    before = contents(Path("out"))
    message = refused(*flags, *([] if "--alpha" in changed else alphas), *changed)
    assert said in message
    assert message.endswith("to go on with it, give --output another folder, or add --overwrite to begin again")
    assert contents(Path("out")) == before


def test_overwriting_begins_anew_with_other_settings(members: list[str], tmp_path: Path) -> None:
    flags = [*members, *questions(tmp_path, 12), "--output", "out"]
    run(*flags, "--alpha", "0,0.5,1", "--rule", "eft")
    run(*flags, "--alpha", "0,1", "--overwrite")
    assert {path.name for path in Path("out").iterdir()} == FILES
    assert 0.5 not in {row["alpha"] for row in read_rows(Path("out"))}
    before = contents(Path("out"))
    run(*flags, "--alpha", "0,1")  # goes on
    assert contents(Path("out"))["measurements"] == before["measurements"]


def test_changed_documents_members_and_versions_are_noticed(members: list[str], tmp_path: Path) -> None:
    flags = [*members, *questions(tmp_path, 12), "--alpha", "0,1", "--output", "out"]
    run(*flags)
    (tmp_path / "questions.jsonl").write_text((tmp_path / "questions.jsonl").read_text().replace("a 0?", "b 0?"))
    assert "another run: the documents or prompts of questions changed. Run" in refused(*flags)
    questions(tmp_path, 12)
    run(*flags)
    config = Path(members[1]) / "config.json"
    content = config.read_text()
    config.write_text(content.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.5'))
    assert config.read_text() != content
    try:
        assert "another run: the config.json of source_ft changed. Run" in refused(*flags)
    finally:
        config.write_text(content)
    with closing(sqlite3.connect(f"out/{FILE}")) as connection, connection:
        connection.execute("UPDATE settings SET value = json_set(value, '$.ensembler', '0.0.1') WHERE key = 'versions'")
    assert 'another run: the version of ensembler is "0.0.1" there' in refused(*flags)


def test_weight_files_that_were_touched_are_noticed_unless_their_bytes_count(
    members: list[str], tmp_path: Path
) -> None:
    flags = [*members, *questions(tmp_path, 12), "--alpha", "0,1", "--output"]
    run(*flags, "times")
    run(*flags, "bytes", "--verify-weights")
    weights = Path(members[1]) / "model.safetensors"
    before = weights.stat()
    os.utime(weights, ns=(1, 1))
    try:
        changed = "another run: the sizes or times of the weight files of source_ft changed. Run"
        assert changed in refused(*flags, "times")
        run(*flags, "bytes", "--verify-weights")
    finally:
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    run(*flags, "times")
    without, with_it = "without --verify-weights (leave it out). Run", "with --verify-weights (add it). Run"
    assert f"another run: it was begun {without}" in refused(*flags, "times", "--verify-weights")
    assert f"another run: it was begun {with_it}" in refused(*flags, "bytes")


@pytest.mark.parametrize("num_rows", [1, 2])
def test_next_to_no_rows_show_nothing(num_rows: int, members: list[str], tmp_path: Path) -> None:
    """No interval without a width, no p below that of the sign test, and numbers that JSON and the page can hold."""
    rows = [{"q": f"{number} abc", "a": "de fg"} for number in range(num_rows)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    flags = [*members, "--data", data, "--prompt", "{q}", "--answer", "{a}", "--alpha", "0,1"]
    for metric in ("perplexity", "exact_match"):
        printed = run(*flags, "--metric", metric, "--margin", 0.5, "--output", metric)
        assert "nan" not in printed
        task = summary(metric)
        for interval in (*(method["test"] for method in task["methods"]), *(point["test"] for point in task["curve"])):
            assert interval["low"] is None or interval["high"] - interval["low"] > 0.1
        assert all(each["comparison"]["p_value"] >= 2 * 0.5**num_rows for each in task["differences"])
        assert Path(metric, "report.html").read_text().count("nan") == 0


def test_flexible_number_from_a_command_line_of_its_own(tmp_path: Path, members: list[str]) -> None:
    """In a process that has loaded nothing else: lm-eval registers its filters when they are imported."""
    data = write_rows(tmp_path / "sums.jsonl", [{"q": f"{i} + 4 =", "a": f"so it is {i + 4}."} for i in range(3)])
    flags = ["--prompt", "{q}", "--answer", "{a}", "--metric", "flexible_number", "--gen-kwargs", "max_gen_toks=2"]
    command = [sys.executable, "-m", "ensembler", "sweep", *members, "--data", str(data), *flags, "--alpha", "0,1"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 0, found.stderr
    assert summary()["metric"] == "exact_match"


def test_a_run_without_rows_does_not_block_its_folder(
    members: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*members, *questions(tmp_path, 12), "--alpha", "0,1"]
    with monkeypatch.context() as broken:
        broken.setattr(TextAnswerer, "answer", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(*flags)
    assert read_rows(Path("sweep")) == []
    run(*flags, "--batch-size", 3)
    assert json.loads(Path("sweep/summary.json").read_text())["settings"]["batch size"] == 3


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
        (["DATA", "--alpha", "0:1"], "alpha is '0:1'; expected a number, or a grid: 0,0.5,1 or 0:1.5:0.1"),
        (["DATA", "--alpha", "1:0:0.1"], "an empty grid; expected first:last:step"),
        (["DATA", "--alpha", "0,nan"], "alpha is '0,nan'; expected a number, or a grid"),
        (["DATA", "--alpha", "0,0.5,0.5"], "--alpha 0,0.5,0.5 names a number twice"),
        (["DATA", "--alpha", "-1,0"], "not negative"),
        (["DATA", "--rule", "base-chnage"], "unknown rule 'base-chnage'"),
        (["DATA", "--rule", "base-change,contrastive"], "leave this rule out"),
        (["DATA", "--validation", "12"], "leaves none to choose from or to report"),
        (["DATA", "--validation", "0"], "leaves none"),
        (["DATA", "--validation", "test"], "is the one that is reported"),
        (["DATA", "--validation", "10%"], "has no split '10%'"),
        (["DATA", "--one-standard-error"], "needs validation examples"),
        (["DATA", "--validation", "5", "--select", "perplexity"], "give one of the two"),
        (["DATA", "--cluster", "passage"], "q/test/0 has no field 'passage' to cluster by; its fields are"),
        (["DATA", "--margin", "0"], "a margin of 0 leaves no room; give a number above 0"),
        (["DATA", "--batch-size", "0"], "--batch-size is '0'; expected a number from 1, or auto"),
        (["DATA", "--batch-size", "many"], "--batch-size is 'many'; expected a number from 1, or auto"),
        (
            ["DATA", "--log", "wandb"],
            "--log wandb needs its library, which is not installed; install it with: pip install wandb",
        ),
        (["DATA", "--log", "tensorboard"], "--log tensorboard needs its library, which is not installed"),
        (["DATA", "--output", "q.jsonl"], "is no folder"),
        (["DATA", "--output", "."], "holds something else"),
        (["DATA", "--output", "/proc/nowhere"], "cannot be made"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    flags: list[str], said: str, members: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ensembler.evaluation.results_export.find_spec", lambda name: None)
    data = data_flags(write_questions(tmp_path / "q.jsonl", 12))
    given = [part for flag in flags for part in (data if flag == "DATA" else [flag])]
    assert said in refused(*members, *given)
    assert {path.name for path in tmp_path.iterdir()} <= {"q.jsonl", "cache"}


def test_a_choice_that_is_empty_is_named(members: list[str], tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"q": "a", "c": ["x", "y"], "l": 0}\n{"q": "b", "c": ["x", " "], "l": 0}\n')
    flags = ["--data", "q.jsonl", "--prompt", "{q}", "--choices", "{c}", "--answer", "{l}"]
    assert "q.jsonl:2: choice 1 is empty" in refused(*members, *flags)


def test_contexts_that_are_cut_are_told(tmp_path: Path) -> None:
    short = save_ensemble(tmp_path / "short", source_pt={"family": "llama", "max_position_embeddings": 24})
    rows = [{"question": "once upon a time " * (1 + i % 3) + str(i), "label": "ab"[i % 2]} for i in range(8)]
    printed = run(*short.flags, *data_flags(write_rows(tmp_path / "q.jsonl", rows)), "--alpha", "0,1")
    (said,) = (note for note in summary()["notes"] if "cut" in note)
    assert re.fullmatch(r"\d+ requests cut on the left to fit into the shortest context", said)
    assert said in printed


def test_one_alpha_is_allowed_and_said(members: list[str], tmp_path: Path) -> None:
    printed = run(*members, *questions(tmp_path, 12), "--alpha", "0.5")
    assert "one alpha, 0.5: there is nothing to choose" in printed
    assert "base-change: its alpha was the only one given, so there was nothing to choose" in printed
    assert {method["label"]: method["chosen_by"] for method in summary()["methods"]} == {
        "source FT": None,
        "target PT": None,
        "base-change α = 0.5": "given",
        "base-change α = 1": None,
    }


def test_clusters_and_a_margin_are_told(members: list[str], tmp_path: Path) -> None:
    rows = [{"question": f"q {i}", "label": "ab"[i % 2], "passage": {"number": i // 4}} for i in range(40)]
    flags = data_flags(write_rows(tmp_path / "q.jsonl", rows))
    printed = run(*members, *flags, "--alpha", "1", "--cluster", "passage", "--margin", 60)
    assert "40 test documents in 10 groups by passage, on which intervals and tests rest" in printed
    (task,) = json.loads(Path("sweep/summary.json").read_text())["tasks"]
    assert {each["comparison"]["test"] for each in task["differences"]} == {"clustered paired t"}
    assert all(each["p_equivalent"] is not None for each in task["differences"])
    assert "is as good as" in printed
    assert "to within 60 points, p = " in printed
    assert "corrected over all comparisons shown, p of alike over all tests of that." in printed
    assert summary()["num_clusters"] == 10


@pytest.fixture
def folder(members: list[str], tmp_path: Path) -> Path:
    """The folder of an ensemble at α = 0.9 of base-change, with a key that a sweep does not change."""
    result = CliRunner().invoke(cli, ["create", str(tmp_path / "ensemble"), *members, "--alpha", "0.9"])
    assert result.exit_code == 0, result.output
    return tmp_path / "ensemble"


def test_the_chosen_alpha_is_written_into_the_folder(folder: Path, tmp_path: Path) -> None:
    before = json.loads((folder / "config.json").read_text())
    flags = [folder, *questions(tmp_path), "--rule", "eft", "--alpha", "0,0.5,1", "--validation", 10, "--write-alpha"]
    printed = run(*flags)
    (chosen,) = (method["alpha"] for method in summary()["methods"] if method["chosen_by"] == "validation")
    assert f"ensemble: rule eft at alpha {chosen:g} is written into config.json" in printed
    assert json.loads((folder / "config.json").read_text()) == before | {"rule": "eft", "alpha": chosen}
    assert read(folder).get_rule().name == "eft"
    run(*flags)
    assert {path.name for path in folder.iterdir()} >= {"config.json"}
    assert not [path for path in folder.iterdir() if "partial" in path.name]


def test_the_numbers_of_another_rule_do_not_stay_in_the_folder(members: list[str], tmp_path: Path) -> None:
    numbers = ["--constant", "source_ft=1", "--slope", "target_pt=1", "--slope", "source_pt=-1"]
    CliRunner().invoke(cli, ["create", str(tmp_path / "linear"), *members, "--rule", "linear", *numbers])
    set_point(tmp_path / "linear", "linear", 0.25)
    assert (read(tmp_path / "linear").alpha, read(tmp_path / "linear").constant) == (0.25, {"source_ft": 1.0})
    set_point(tmp_path / "linear", "eft", 0.75)
    changed = read(tmp_path / "linear")
    assert (changed.rule, changed.alpha, changed.constant, changed.slope) == ("eft", 0.75, None, None)


def test_an_alpha_that_is_not_recommended_is_written_with_a_word(folder: Path, tmp_path: Path) -> None:
    """Members that know nothing: nothing is better than source FT."""
    printed = run(folder, *questions(tmp_path), "--alpha", "0.5", "--write-alpha")
    assert "Recommendation for questions: keep source FT as it is" in printed
    assert "base-change at alpha 0.5 is written into config.json; the recommendation is another: source FT" in printed
    assert json.loads((folder / "config.json").read_text())["alpha"] == 0.5


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["FOLDER", "DATA", "--alpha", "0,1"], "and nothing chooses alpha; add --validation or --select perplexity"),
        (["MEMBERS", "DATA", "--validation", 5], "without a folder to write into; name the folder of an ensemble"),
        (["demo", "--validation", "validation"], "without a folder to write into"),
        (
            ["FOLDER", "DATA", "--validation", 5, "--rule", "base-change,eft"],
            "with 2 rules, and a folder has one alpha",
        ),
        (["FOLDER", "TASKS", "--validation", 2], "with 2 tasks, and a folder has one alpha; give one of them"),
        (
            ["FOLDER", "DATA", "--validation", 5, "--outside", "neutral"],
            "with --outside, which the folder does not have",
        ),
    ],
)
def test_an_alpha_that_has_no_folder_is_refused(
    flags: list[object], said: str, folder: Path, members: list[str], tmp_path: Path
) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    given = {"FOLDER": [folder], "MEMBERS": members, "DATA": questions(tmp_path)}
    given["TASKS"] = ["--task", tasks / "choice.yaml", "--task", tasks / "generate.yaml"]
    before = (folder / "config.json").read_bytes()
    message = refused(*(part for flag in flags for part in given.get(str(flag), [flag])), "--write-alpha")
    assert said in message
    assert (folder / "config.json").read_bytes() == before


def command(members: list[str], number: int, *more: object, batch_size: int | str = 2) -> list[str]:
    """A sweep of so many questions."""
    flags = data_flags(write_questions(Path("questions.jsonl"), number))
    return ["sweep", *members, *flags, "--alpha", "0:1:0.1", "--batch-size", str(batch_size), *map(str, more)]


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
        f"Error: {disk / 'out' / FILE} cannot be written: database or disk is full; make room on its disk, and go on "
        "with the same command, without --overwrite"
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
    flags = command(members, 23, batch_size="auto")
    assert run(*flags).code == 130
    assert len(read_rows(Path("sweep"))) == 10 * 12
    assert run(*flags).code == 0
    assert sizes == [5, 5, 5, 5, 3]
    assert len(asked) == 1
    assert json.loads(Path("sweep/summary.json").read_text())["settings"]["batch size"] == "auto"


def test_the_batch_size_that_fits_is_found_by_lm_eval(members: list[str], run: Any) -> None:
    for batch_size, name in (("auto", "auto"), (8, "eight")):
        assert run(*command(members, 12, batch_size=batch_size), "--output", name).code == 0
    one, other = (read_rows(Path(name)) for name in ("auto", "eight"))
    assert [row["values"] for row in one] == [row["values"] for row in other]
