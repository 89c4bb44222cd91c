"""`ensembler bench`: what is written, resumed and refused; costs in processes of their own; several processes."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from bench_cases import ALL, recipe, save_bench_models, write_recipe
from click.testing import CliRunner
from sweep_cases import start
from task_cases import write_tasks

from ensembler.cli.main import cli
from ensembler.errors import EnsemblerError, RunError

SPEED = {"rounds": 2, "num_prompts": 1, "new_tokens": 3, "num_examples": 2}
FILES = {"run.json", "rows.jsonl", "runs", "summary.json", "metrics.png", "report.html"}


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
    """What was printed but for the progress."""
    return "\n".join(line for line in printed.splitlines() if not line.startswith(("examples:", "measurements:")))


def refused(*arguments: object) -> str:
    with pytest.raises(EnsemblerError) as found:
        CliRunner().invoke(cli, ["bench", *map(str, arguments)], catch_exceptions=False, standalone_mode=False)
    assert found.value.exit_code == 2
    assert "\n" not in str(found.value)
    return str(found.value)


def visible(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_everything_is_written_and_the_same_again(models: dict[str, Any], task: Path) -> None:
    write_recipe(Path("r.yaml"), recipe(models, task, description="Tiny <models>"))
    printed = run("r.yaml")
    assert {path.name for path in Path("bench").iterdir() if path.suffix != ".lock"} == FILES
    for name in ("source FT", "target PT", "base-change", "EFT", "the patch", "the directly tuned target"):
        assert name in printed
    assert "− source FT" in printed
    assert "no difference seen between" in printed
    summary = json.loads(Path("bench/summary.json").read_text())
    assert [method["method"] for method in summary["tasks"][0]["methods"]] == list(ALL)
    page = Path("bench/report.html").read_text()
    assert "Tiny &lt;models&gt;" in page
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    before = visible(Path("bench"))
    assert told(run("r.yaml")) == told(printed)
    assert visible(Path("bench")) == before
    shown = CliRunner().invoke(cli, ["bench", "r.yaml", "--json"])
    assert json.loads(shown.stdout) == summary


def test_published_figures_stand_beside_the_measured(models: dict[str, Any], task: Path) -> None:
    figures = {"published": {"tiny_choice": {"patch": 61.5, "direct": {"acc": 62.5, "acc_norm": 0.4375}}}}
    costs = {"published_costs": {"patch": {"weight_bytes": 3 * 2**30, "first_token_seconds": 0.125}}}
    write_recipe(
        Path("r.yaml"), recipe(models, task, **figures, **costs, source="A paper, table 1", methods=["patch", "direct"])
    )
    printed = run("r.yaml")
    assert "A paper, table 1" in printed
    assert re.search(r"the patch .*61\.5", printed)
    assert re.search(r"the directly .*62\.5.*0\.4375", printed)
    assert "acc_norm" in printed
    page = Path("bench/report.html").read_text()
    for shown in ("61.5", "62.5", "0.4375", "published 125", "published 3.00 GiB"):
        assert shown in page


def test_costs_are_measured_by_turns_and_kept(models: dict[str, Any], task: Path) -> None:
    methods = ["base-change", "patch"]
    write_recipe(Path("r.yaml"), recipe(models, task, methods=methods, speed=SPEED))
    printed = run("r.yaml")
    rows = [json.loads(line) for line in Path("bench/rows.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["id"].startswith("cost/")]
    assert [row["id"].split("/")[2:] for row in rows] == [[m, str(n)] for n in range(2) for m in methods]
    for row in rows:
        assert "error" not in row
        for name in ("setup_seconds", "first_token_seconds", "tokens_per_second", "examples_per_second"):
            assert row[name] > 0
        assert row["peak_device_bytes"] is None
    bytes_of = {row["id"].split("/")[2]: row["weight_bytes"] for row in rows}
    size = Path(models["target_pt"], "model.safetensors").stat().st_size
    assert size * 0.9 < bytes_of["patch"] <= size
    assert bytes_of["base-change"] > 1.9 * bytes_of["patch"]
    assert "tokens/s" in printed
    assert {"speed.png", "memory.png"} <= {path.name for path in Path("bench").iterdir()}
    Path("bench/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    run("r.yaml")
    again = [json.loads(line) for line in Path("bench/rows.jsonl").read_text().splitlines()]
    again = [row for row in again if row["id"].startswith("cost/")]
    assert again[:3] == rows[:3]
    assert [row["id"] for row in again] == [row["id"] for row in rows]


def test_a_method_that_cannot_be_measured_says_why(models: dict[str, Any], task: Path, monkeypatch: Any) -> None:
    write_recipe(Path("r.yaml"), recipe(models, task, methods=["patch", "direct"], speed={**SPEED, "rounds": 1}))
    with monkeypatch.context() as broken:
        broken.setattr("ensembler.evaluation.bench.costs.sys.executable", "/bin/false")
        printed = run("r.yaml")
    summary = json.loads(Path("bench/summary.json").read_text())
    for method in summary["tasks"][0]["methods"]:
        assert "ended with 1" in method["error"]
        assert method["test"] is not None
    assert printed.count("ended with 1") >= 2
    run("r.yaml")  # what could not be measured is tried again
    summary = json.loads(Path("bench/summary.json").read_text())
    assert all(method["error"] is None and method["cost"] for method in summary["tasks"][0]["methods"])


def test_the_peak_is_not_that_of_the_process_that_asks(models: dict[str, Any], task: Path) -> None:
    held = torch.ones(300_000_000, dtype=torch.uint8)
    del held
    content = recipe(models, task, methods=["patch"], speed={**SPEED, "rounds": 1})
    write_recipe(Path("r.yaml"), content)
    run("r.yaml")
    summary = json.loads(Path("bench/summary.json").read_text())
    assert 0 < summary["tasks"][0]["methods"][0]["cost"]["peak_host_bytes"]["median"] < 250_000_000


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
    before = visible(Path("out"))
    write_recipe(Path("r.yaml"), recipe(models, task, seed=3))
    assert "seed is 0 there and 3 here" in refused("r.yaml", "--output", "out")
    write_recipe(Path("r.yaml"), recipe(models, task, methods=["patch"]))
    assert "there and" in refused("r.yaml", "--output", "out")
    Path("else").mkdir()
    Path("else/thesis.tex").write_text("42")
    assert "holds something else" in refused("r.yaml", "--output", "else")
    assert visible(Path("out")) == before
    assert visible(Path("else")) == {"thesis.tex": b"42"}


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
    assert not Path("bench").exists()


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
    assert not any(pair["same_examples"] for pair in pairs)
    summary = json.loads(Path("a/summary.json").read_text())
    assert pairs[1]["a"]["estimate"] == summary["tasks"][0]["methods"][1]["test"]["estimate"]
    same = [json.loads(line) for line in run("compare", "a", "a", "--json").splitlines()]
    assert all(pair["same_examples"] and pair["a"] == pair["b"] for pair in same)
    assert "the same" in run("compare", "a", "a")
    assert "no summary of a benchmark" in refused("compare", "a", "nowhere")


def test_an_interrupted_benchmark_goes_on(models: dict[str, Any], task: Path) -> None:
    write_recipe(Path("r.yaml"), recipe(models, task))
    process = start("bench", "r.yaml", "--output", "out")
    deadline = time.monotonic() + 120
    while not list(Path("out").glob("runs/*/rows.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode in (0, 130), said  # it may have been faster than the signal
    if process.returncode == 130:
        assert "interrupted" in said
    goes_on, whole = (told(run("r.yaml", "--output", name)).rsplit(f"{name}:", 1)[0] for name in ("out", "whole"))
    assert goes_on == whole


def test_two_processes_make_the_same_rows(models: dict[str, Any], task: Path) -> None:
    write_recipe(Path("r.yaml"), recipe(models, task, batch_size=2))
    process = start("bench", "r.yaml", "--output", "ranks", ranks=2)
    said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    run("r.yaml", "--output", "one")
    one, ranks = (json.loads(Path(name, "summary.json").read_text())["tasks"] for name in ("one", "ranks"))
    assert one == ranks
    assert not list(Path("ranks").rglob("rows.*.jsonl"))
