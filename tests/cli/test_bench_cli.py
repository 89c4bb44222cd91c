"""`ensembler bench`: what is written, resumed and refused; costs in their own processes; ranks; conditions."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from click.testing import CliRunner
from helpers.bench_cases import ALL, recipe, save_bench_models, write_recipe
from helpers.process_cases import fork, launch
from helpers.sweep_cases import read_rows
from helpers.task_cases import write_rows, write_tasks

from ensembler import EnsembleForCausalLM
from ensembler.cli.main import cli
from ensembler.errors import EnsemblerError, RunError
from ensembler.evaluation.decisions import detectable_by
from ensembler.evaluation.methods import compared_pairs
from ensembler.evaluation.results_file import FILE, TABLES, open_results
from ensembler.evaluation.summary import COST

SPEED = {"rounds": 2, "num_prompts": 1, "new_tokens": 3, "num_examples": 2}
FILES = {FILE, "summary.json", "curve.png", "methods.png", "report.html"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return save_bench_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks") / "tasks") / "choice.yaml"


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli, ["bench", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def told(printed: str) -> str:
    """Return the output without the progress."""
    return "\n".join(line for line in printed.splitlines() if not line.startswith(("examples:", "measurements:")))


def refused(*arguments: object) -> str:
    with pytest.raises(EnsemblerError) as found:
        CliRunner().invoke(cli, ["bench", *map(str, arguments)], catch_exceptions=False, standalone_mode=False)
    assert found.value.exit_code == 2
    assert "\n" not in str(found.value)
    return str(found.value)


def contents(folder: Path) -> dict[str, Any]:
    """All files of a folder; of the results all rows of their tables."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != FILE}
    if (folder / FILE).exists():
        with closing(sqlite3.connect(folder / FILE)) as connection:
            found |= {table: connection.execute(f"SELECT * FROM {table}").fetchall() for table in TABLES}
    return found


def summary(folder: str = "bench") -> dict[str, Any]:
    (task,) = json.loads(Path(folder, "summary.json").read_text())["tasks"]
    return dict(task)


def costs(folder: str = "bench") -> list[tuple[str, dict[str, Any]]]:
    with open_results(Path(folder)) as results:
        return results.notes(COST)


def test_everything_is_written_and_the_same_again(models: dict[str, Any], task: Path) -> None:
    write_recipe(Path("r.yaml"), recipe(models, task, description="Tiny <models>"))
    printed = run("r.yaml")
    assert {path.name for path in Path("bench").iterdir()} == FILES
    for name in ("source FT", "target PT", "base-change", "EFT", "the patch", "the directly tuned target"):
        assert name in printed
    for said in ("− source FT", "* no difference seen between", "not measured: speed and memory"):
        assert said in printed
    assert [method["method"] for method in summary()["methods"]] == list(ALL)
    page = Path("bench/report.html").read_text()
    assert "Tiny &lt;models&gt;" in page
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    before = contents(Path("bench"))
    assert told(run("r.yaml")) == told(printed)
    assert contents(Path("bench")) == before
    shown = CliRunner().invoke(cli, ["bench", "r.yaml", "--json"])
    assert json.loads(shown.stdout) == json.loads(Path("bench/summary.json").read_text())


def test_published_figures_stand_beside_the_measured(models: dict[str, Any], task: Path) -> None:
    figures = {"published": {"tiny_choice": {"patch": 61.5, "direct": {"acc": 62.5, "acc_norm": 0.4375}}}}
    costs = {"published_costs": {"patch": {"weight_bytes": 3 * 2**30, "first_token_seconds": 0.125}}}
    write_recipe(
        Path("r.yaml"), recipe(models, task, **figures, **costs, source="A paper, table 1", methods=["patch", "direct"])
    )
    printed = run("r.yaml")
    assert "A paper, table 1" in printed
    assert re.search(r"the patch .*61\.5", printed)
    assert re.search(r"the directly .*62\.5.*0\.438", printed)
    assert "acc_norm" in printed
    page = Path("bench/report.html").read_text()
    for shown in ("61.5", "62.5", "0.438", "published 125", "published 3.00 GiB"):
        assert shown in page


def test_costs_are_those_of_each_method_alone(models: dict[str, Any], task: Path) -> None:
    held = torch.ones(300_000_000, dtype=torch.uint8)  # the peak is not that of the process that asks
    del held
    methods = ["base-change", "patch"]
    write_recipe(Path("r.yaml"), recipe(models, task, methods=methods, speed={**SPEED, "rounds": 1}))
    printed = run("r.yaml")
    found = dict(costs())
    assert list(found) == ["r/base-change", "r/patch"]
    for content in found.values():
        assert "error" not in content
        for name in ("setup_seconds", "first_token_seconds", "tokens_per_second", "examples_per_second"):
            assert content[name] > 0
        assert content["peak_device_bytes"] is None
        assert 0 < content["peak_host_bytes"] < 250_000_000
    size = Path(models["target_pt"], "model.safetensors").stat().st_size
    assert size * 0.9 < found["r/patch"]["weight_bytes"] <= size
    assert found["r/base-change"]["weight_bytes"] > 1.9 * found["r/patch"]["weight_bytes"]
    assert "tokens/s" in printed
    assert {"speed.png", "memory.png"} <= {path.name for path in Path("bench").iterdir()}


def test_costs_are_measured_by_turns_and_kept(models: dict[str, Any], task: Path, monkeypatch: Any) -> None:
    speeds = iter(range(1, 9))
    measure = "ensembler.evaluation.costs._measure_apart"
    monkeypatch.setattr(measure, lambda load: {"tokens_per_second": float(next(speeds))})
    methods = ["base-change", "patch"]
    write_recipe(Path("r.yaml"), recipe(models, task, methods=methods, speed=SPEED))
    run("r.yaml")
    found = costs()
    assert [(name, content["round"]) for name, content in found] == [(f"r/{m}", n) for n in range(2) for m in methods]
    spread = {"median": 3.0, "low": 2.0, "high": 4.0, "num_rounds": 2}
    assert summary()["methods"][1]["cost"] == {"tokens_per_second": spread}
    with closing(sqlite3.connect(f"bench/{FILE}")) as connection, connection:
        connection.execute("DELETE FROM notes WHERE id = (SELECT max(id) FROM notes)")
    run("r.yaml")
    assert costs() == [*found[:3], (found[3][0], {**found[3][1], "tokens_per_second": 5.0})]
    write_recipe(Path("r.yaml"), recipe(models, task, methods=methods, speed={**SPEED, "rounds": 3}))  # one more
    run("r.yaml")
    assert [content["round"] for _, content in costs()] == [0, 0, 1, 1, 2, 2]


def test_costs_of_another_alpha_or_machine_are_measured_again(
    models: dict[str, Any], task: Path, monkeypatch: Any
) -> None:
    def measured(speed: float, device: str, num: int) -> dict[str, float]:
        monkeypatch.setattr("ensembler.evaluation.costs._measure_apart", lambda load: {"tokens_per_second": speed})
        monkeypatch.setattr(
            "ensembler.evaluation.costs.machine", lambda: {"device": device, "threads": 1, "torch": "2"}
        )
        run("r.yaml")
        assert len(costs()) == num
        return {one["method"]: one["cost"]["tokens_per_second"]["median"] for one in summary()["methods"]}

    write_recipe(Path("r.yaml"), recipe(models, task, methods=["base-change", "patch"], speed={**SPEED, "rounds": 1}))
    assert measured(1.0, "a", 2) == {"base-change": 1.0, "patch": 1.0}
    with closing(sqlite3.connect(f"bench/{FILE}")) as connection, connection:  # as if validation had chosen another
        connection.execute("UPDATE notes SET content = json_set(content, '$.alpha', 9) WHERE name = 'r/base-change'")
    assert measured(2.0, "a", 3) == {"base-change": 2.0, "patch": 1.0}
    assert measured(3.0, "b", 5) == {"base-change": 3.0, "patch": 3.0}
    assert measured(4.0, "b", 5) == {"base-change": 3.0, "patch": 3.0}


def test_a_method_that_cannot_be_measured_says_why(models: dict[str, Any], task: Path, monkeypatch: Any) -> None:
    write_recipe(Path("r.yaml"), recipe(models, task, methods=["patch", "direct"], speed={**SPEED, "rounds": 1}))
    with monkeypatch.context() as broken:
        broken.setattr("ensembler.evaluation.costs.sys.executable", "/bin/false")
        printed = run("r.yaml")
    for method in summary()["methods"]:
        assert "ended with 1" in method["error"]
        assert method["test"] is not None
    assert printed.count("could not be measured in every round: the process ended with 1") == 2
    monkeypatch.setattr("ensembler.evaluation.costs._measure_apart", lambda load: {"tokens_per_second": 2.5})
    run("r.yaml")  # what could not be measured is tried again
    for method in summary()["methods"]:
        assert method["error"] is None
        spread = {"median": 2.5, "low": 2.5, "high": 2.5, "num_rounds": 1}
        assert method["cost"] == {"tokens_per_second": spread}


def test_all_methods_failing_is_a_failure(models: dict[str, Any], task: Path, monkeypatch: Any) -> None:
    def broken(checked: Any, **options: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr("ensembler.modeling.EnsembleForCausalLM.from_checked", broken)
    write_recipe(Path("r.yaml"), recipe(models, task, methods=["patch"]))
    with pytest.raises(RunError, match="every method failed, the first with RuntimeError: no"):
        CliRunner().invoke(cli, ["bench", "r.yaml"], catch_exceptions=False, standalone_mode=False)
    assert Path("bench/report.html").exists()


def test_another_recipe_on_the_folder_is_refused_by_its_difference(models: dict[str, Any], task: Path) -> None:
    write_recipe(Path("r.yaml"), recipe(models, task))
    run("r.yaml", "--output", "out")
    before = contents(Path("out"))
    write_recipe(Path("r.yaml"), recipe(models, task, seed=3))
    assert "seed is 0 there and 3 here" in refused("r.yaml", "--output", "out")
    write_recipe(Path("r.yaml"), recipe(models, task, methods=["patch"]))
    assert "there and" in refused("r.yaml", "--output", "out")
    Path("else").mkdir()
    Path("else/thesis.tex").write_text("42")
    assert "holds something else" in refused("r.yaml", "--output", "else")
    assert contents(Path("out")) == before
    assert contents(Path("else")) == {"thesis.tex": b"42"}


def test_a_recipe_that_only_chooses_otherwise_goes_on(models: dict[str, Any], task: Path) -> None:
    write_recipe(Path("r.yaml"), recipe(models, task, methods=["base-change"]))
    run("r.yaml")
    rows = read_rows(Path("bench"), "r.ensemble")
    changes = {"validation": 2, "metric": "acc_norm", "cluster": "answer", "margin": 5, "source": "A paper"}
    write_recipe(Path("r.yaml"), recipe(models, task, methods=["base-change"], **changes))
    run("r.yaml")
    assert [row["answers"] for row in read_rows(Path("bench"), "r.ensemble")] == [row["answers"] for row in rows]
    assert (summary()["metric"], summary()["num_test"], summary()["margin"]) == ("acc_norm", 3, 5)


def test_a_dry_run_says_what_would_run_and_reads_no_weights(
    models: dict[str, Any], task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ensembler.engine.members.load_group", lambda *a, **k: pytest.fail("weights were read"))
    write_recipe(Path("r.yaml"), recipe(models, task))
    printed = run("r.yaml", "--dry-run")
    assert run("--dry-run", "r.yaml") == printed
    assert "r.ensemble: source_ft, target_pt, base-change, eft" in printed
    assert "vocabulary identical" in printed
    assert "alpha chosen of 3 on" in printed
    assert "KiB" in printed
    assert "not possible" not in printed
    members = {role: models[role] for role in ("source_ft", "source_pt", "direct")}
    write_recipe(Path("r.yaml"), recipe(members, task))
    assert (
        "r, not possible with its models: base-change (no target_pt), eft (no target_pt), patch (no target_pt, no "
        "patch), patch+base-change (no target_pt, no patch) Differences"
    ) in " ".join(run("r.yaml", "--dry-run").split())
    write_recipe(Path("r.yaml"), recipe(models, task, metric="brier_score"))
    assert "test examples: not told before the run of brier_score" in run("r.yaml", "--dry-run")
    write_recipe(Path("r.yaml"), recipe(models, task, cluster="answer"))
    assert "test examples: not told before the run of groups by answer" in run("r.yaml", "--dry-run")
    assert not Path("bench").exists()


def test_a_dry_run_says_which_differences_the_documents_can_show(models: dict[str, Any], task: Path) -> None:
    rows = [{"question": f"q {i}", "choices": ["a", "b"], "answer": i % 2} for i in range(300)]
    write_rows(Path("questions.jsonl"), rows)
    Path("many.yaml").write_text(task.read_text().replace("tiny_choice", "many"))
    write_rows(Path("train_questions.jsonl"), [{**row, "question": f"t {i}"} for i, row in enumerate(rows[:9])])
    write_recipe(Path("r.yaml"), recipe(models, Path("many.yaml"), tasks=["many.yaml", str(task)]))
    printed = run("r.yaml", "--dry-run")
    header = re.search(r"seen in 80 of 100 cases, with (\d+) comparisons in all:", printed)
    assert header is not None
    num = int(header[1])
    assert num == 2 * len(compared_pairs(ALL))  # of two tasks
    level = 0.05 / num
    five, ten, thirty = (f"{100 * detectable_by(300, share, level=level):.1f}" for share in (0.05, 0.1, 0.3))
    shown = f"{five} points if the two disagree on 5 %, {ten} if on 10 %, {thirty} if on 30 %"
    assert f"many, 300 test examples: {shown}" in printed
    assert "tiny_choice, 5 test examples: none if the two disagree on 30 % or less" in printed


def test_two_folders_side_by_side(models: dict[str, Any], task: Path) -> None:
    write_recipe(Path("r.yaml"), recipe(models, task, methods=["source_ft", "patch"]))
    run("r.yaml", "--output", "a")
    write_recipe(Path("r.yaml"), recipe(models, task, methods=["patch", "direct"], limit=3))
    run("r.yaml", "--output", "b")
    pairs = [json.loads(line) for line in run("compare", "a", "b", "--json").splitlines()]
    assert [(pair["method"], pair["a"] is None, pair["b"] is None) for pair in pairs] == [
        ("source_ft", False, True),
        ("patch", False, False),
        ("direct", True, False),
    ]
    assert not any(pair["same_documents"] for pair in pairs)
    assert pairs[1]["a"] == summary("a")["methods"][1]
    same = [json.loads(line) for line in run("compare", "a", "a", "--json").splitlines()]
    assert all(pair["same_documents"] and pair["a"] == pair["b"] for pair in same)
    assert "the same" in run("compare", "a", "a")
    assert "nowhere is no folder; give two folders" in refused("compare", "a", "nowhere")


def test_an_interrupted_benchmark_goes_on(models: dict[str, Any], task: Path) -> None:
    write_recipe(Path("r.yaml"), recipe(models, task))
    process = fork(["bench", "r.yaml", "--output", "out"])
    while process.is_alive() and not (Path("out", FILE).exists() and Path("out", FILE).stat().st_size > 60_000):
        time.sleep(0.002)
    os.kill(process.pid or 0, signal.SIGINT)
    process.join()
    said = Path("said").read_text()
    assert process.exitcode == 130, said
    assert said.splitlines()[-1] == "Error: interrupted; finished rows are kept; go on with the same command"
    goes_on, whole = (told(run("r.yaml", "--output", name)).rsplit(f"{name}:", 1)[0] for name in ("out", "whole"))
    assert goes_on == whole


def test_processes_of_a_launcher_make_the_same_rows(models: dict[str, Any], task: Path) -> None:
    write_recipe(Path("r.yaml"), recipe(models, task, batch_size=2))
    said = launch(["bench", "r.yaml", "--output", "ranks"], 2, [1, 0])
    assert [("p (Holm)" in said[rank]) for rank in (0, 1)] == [True, False]  # the last one says what came of it
    run("r.yaml", "--output", "one")
    assert summary("one") == summary("ranks")
    for name in ("r.ensemble", "r.patched", "r.source_pt", "r.direct"):
        assert read_rows(Path("one"), name) == read_rows(Path("ranks"), name)
    again = launch(["bench", "r.yaml", "--output", "ranks"], 2, [1, 0])  # what is finished is told once
    assert [("p (Holm)" in again[rank]) for rank in (0, 1)] == [True, False]


@pytest.fixture(scope="module")
def required(models: dict[str, Any], task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark that was run: two experiments, of which the second has other methods."""
    folder = tmp_path_factory.mktemp("required")
    experiments = [{"name": "one", "methods": ["source_ft", "patch"]}, {"name": "two", "methods": ["direct"]}]
    path = write_recipe(folder / "r.yaml", recipe(models, task, experiments=experiments))
    CliRunner().invoke(cli, ["bench", str(path), "--output", str(folder / "out")], catch_exceptions=False)
    return folder


def require(folder: Path, run: Any, *conditions: str) -> Any:
    flags = [part for condition in conditions for part in ("--require", condition)]
    return run("bench", folder / "r.yaml", "--output", folder / "out", *flags)


def test_conditions_that_hold_end_with_0(required: Path, run: Any) -> None:
    tasks = json.loads((required / "out" / "summary.json").read_text())["tasks"]
    source_ft, patch = (100 * method["test"]["estimate"] for method in tasks[0]["methods"])
    for condition in (
        f"patch >= source_ft - {abs(patch - source_ft):g}",
        f"source_ft<=patch+{abs(patch - source_ft):g}",
        f"patch >= {patch:g}",
        f" source_ft  <  {source_ft + 1:g} ",
        "patch > -.5",
        "patch > source_ft - 1e3",
        "patch >= 1e-9",
        "direct <= 100",
    ):
        done = require(required, run, condition)
        assert (done.code, "p (Holm)" in done.out) == (0, True), (condition, done.err)
        assert done.err.splitlines()[-1] == f"{condition} holds"


def test_conditions_that_do_not_hold_end_with_1(required: Path, run: Any) -> None:
    tasks = json.loads((required / "out" / "summary.json").read_text())["tasks"]
    source_ft, patch, direct = (100 * one["test"]["estimate"] for task in tasks for one in task["methods"])
    done = require(required, run, "patch >= 0", "patch >= source_ft + 101", "direct > 100")
    assert done.code == 1
    assert "p (Holm)" in done.out
    assert done.err.splitlines()[-1] == (
        f"Error: one, tiny_choice: patch >= source_ft + 101 does not hold, {patch:.4g} against {source_ft + 101:.4g}; "
        f"two, tiny_choice: direct > 100 does not hold, {direct:.4g} against 100"
    )


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("patch", "--require 'patch' is no condition; give one such as \"patch >= source_ft - 2\""),
        ("patch == source_ft", "is no condition"),
        ("patch >= 2 * source_ft", "has '2 * source_ft' on the right"),
        ("0 <= patch", "is no condition"),
        ("pach >= 3", "--require 'pach >= 3': no experiment has the method 'pach'; did you mean patch?"),
        ("patch > lots", "no experiment has the method 'lots'; expected one of source_ft, patch, direct"),
        ("direct >= patch", "is of methods of different experiments; they have source_ft, patch; direct"),
        (
            "patch >= source_ft -2 points",
            "has 'source_ft -2 points' on the right; expected a method, a method and + or - a number, or a number",
        ),
        ("patch >=", "has '' on the right"),
    ],
)
def test_what_is_no_condition_ends_with_2(condition: str, said: str, required: Path, run: Any) -> None:
    before = (required / "out" / FILE).read_bytes()
    done = require(required, run, condition)
    assert done.code == 2
    assert said in done.error
    assert (required / "out" / FILE).read_bytes() == before


def test_a_condition_on_a_method_that_failed_does_not_hold(
    models: dict[str, Any], task: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = EnsembleForCausalLM.from_checked

    def broken(checked: Any, **options: Any) -> EnsembleForCausalLM:
        if "direct" in checked.config.members:
            raise RuntimeError("no")
        return load(checked, **options)

    monkeypatch.setattr(EnsembleForCausalLM, "from_checked", broken)
    write_recipe(Path("r.yaml"), recipe(models, task, methods=["patch", "direct"]))
    done = run("bench", "r.yaml", "--require", "direct >= 0", "--require", "patch >= direct - 100")
    assert done.code == 1
    assert "r.direct failed, the others go on: RuntimeError: no" in done.err
    assert done.err.splitlines()[-1].count("does not hold") == 2
