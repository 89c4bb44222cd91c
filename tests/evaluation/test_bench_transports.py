"""Transports of a patch as methods of a benchmark: their models, their figures, and what is wrong before it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from helpers.bench_cases import recipe, save_bench_models, save_patch, write_recipe
from helpers.commands import Run
from helpers.patch_cases import weights
from helpers.task_cases import write_tasks

from ensembler.errors import ConfigError
from ensembler.evaluation.figures import TRANSPORTED
from ensembler.evaluation.methods import compared_pairs, plan_runs
from ensembler.evaluation.recipe_file import read_recipe
from ensembler.evaluation.transported import add_transported, check_transported
from ensembler.patch.apply import apply_plan
from ensembler.patch.formats import read_patch
from ensembler.patch.patch_plan import plan_patches
from ensembler.patch.transports.transport import Sources, carried


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return save_bench_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def content(models: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A recipe of all transports beside the patch."""
    tasks = write_tasks(tmp_path / "tasks")
    (tmp_path / "examples.jsonl").write_text('{"prompt": "ask abc say", "answer": "de"}\n', "utf-8")
    (tmp_path / "texts.jsonl").write_text('{"text": "the cat sat on the mat"}\n', "utf-8")
    files = {"transport_data": "examples.jsonl", "transport_texts": "texts.jsonl"}
    return recipe(models, tasks / "choice.yaml", methods=["target_pt", "patch", *TRANSPORTED], **files)


def test_transports_are_methods(content: dict[str, Any], models: dict[str, Any], run: Run, tmp_path: Path) -> None:
    path, out = write_recipe(tmp_path / "recipe.yaml", content), tmp_path / "results"
    dry = run("bench", path, "--output", out, "--dry-run")
    assert (dry.code, out.exists()) == (0, False), dry.err
    result = run("bench", path, "--output", out, "--json", "--require", "patch:orthogonal >= patch - 101")
    assert result.code == 0, result.err
    (task,) = json.loads((out / "summary.json").read_text("utf-8"))["tasks"]
    figures = {method["method"]: method for method in task["methods"]}
    assert list(figures) == ["target_pt", "patch", *TRANSPORTED]
    assert all(figure["error"] is None for figure in figures.values())
    made = {path.name.rpartition("-")[0]: path for path in (out / "patched").iterdir() if path.suffix != ".lora"}
    assert made.keys() == {method.replace(":", "-") for method in TRANSPORTED}
    plan = plan_patches([read_patch(Path(models["patch"]))], Path(models["target_pt"]))
    apply_plan(carried(plan, "orthogonal", Sources(old=Path(models["source_pt"]))), tmp_path / "by_hand")
    expected = weights(tmp_path / "by_hand")
    assert all((weight == expected[name]).all() for name, weight in weights(made["patch-orthogonal"]).items())
    times = {path: path.stat().st_mtime_ns for path in (out / "patched").rglob("*")}
    assert run("bench", path, "--output", out, "--json").code == 0  # goes on: nothing is written again
    assert {path: path.stat().st_mtime_ns for path in (out / "patched").rglob("*")} == times


def test_a_model_alone_gives_the_same_figures(content: dict[str, Any], run: Run, tmp_path: Path) -> None:
    """A transported patch is answered for by its own folder, as a target by itself would be."""
    content = {**content, "methods": ["patch:orthogonal"]}
    path = write_recipe(tmp_path / "recipe.yaml", content)
    made = add_transported(read_recipe(path), tmp_path / "patched")
    (folder,) = (tmp_path / "patched").iterdir()
    assert made.experiments[0].models["patch:orthogonal"].model == str(folder)
    by_itself = {**content, "methods": ["direct"], "models": {**content["models"], "direct": str(folder)}}
    other = write_recipe(tmp_path / "other.yaml", by_itself)
    values = []
    for each in (path, other):
        out = tmp_path / f"results-{each.stem}"
        assert run("bench", each, "--output", out).code == 0
        (task,) = json.loads((out / "summary.json").read_text("utf-8"))["tasks"]
        values.append(task["methods"][0]["test"])
    assert values[0] == values[1]


def test_each_seed_of_training_has_its_own_patched_target(content: dict[str, Any], tmp_path: Path) -> None:
    models = {role: model for role, model in content["models"].items() if role in ("source_pt", "target_pt")}
    other = save_patch(Path(models["source_pt"]), tmp_path / "patch-1", seed=1)
    seeds = [{"patch": content["models"]["patch"]}, {"patch": str(other)}]
    methods = ["target_pt", "patch:orthogonal"]
    given = read_recipe(
        write_recipe(tmp_path / "seeds.yaml", {**content, "models": models, "seeds": seeds, "methods": methods})
    )
    (experiment,) = add_transported(given, tmp_path / "patched").experiments
    folders = [one.models["patch:orthogonal"].model for one in experiment.by_seed]
    assert len(set(folders)) == 2
    runs = {run.name.partition(".")[2]: run.config.members for run in plan_runs(experiment)}
    assert [runs[f"patch:orthogonal.seed{seed}"]["target_pt"].model for seed in (0, 1)] == folders


def test_transports_are_compared_with_the_patch() -> None:
    pairs = compared_pairs(["source_ft", "patch", *TRANSPORTED])
    assert {(method, "patch") for method in TRANSPORTED} <= set(pairs)
    assert ("patch:orthogonal", "source_ft") in pairs


def test_faults_are_told_before_anything_is_written(content: dict[str, Any], tmp_path: Path) -> None:
    lacking = {key: value for key, value in content.items() if key != "transport_data"}
    with pytest.raises(ConfigError, match="patch:sign-mask needs transport_data"):
        check_transported(read_recipe(write_recipe(tmp_path / "lacking.yaml", lacking)))
    without = {**content, "models": {role: model for role, model in content["models"].items() if role != "source_pt"}}
    del without["models"]["source_ft"]
    with pytest.raises(ConfigError, match="patch:orthogonal needs the model 'source_pt'"):
        read_recipe(write_recipe(tmp_path / "without.yaml", without))
    with pytest.raises(ConfigError, match="unknown method 'patch:ortho'"):
        read_recipe(write_recipe(tmp_path / "unknown.yaml", {**content, "methods": ["patch:ortho"]}))
