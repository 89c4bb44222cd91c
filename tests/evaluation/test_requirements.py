"""Conditions on the figures of a benchmark: `ensembler bench --require`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from click.testing import CliRunner
from helpers.bench_cases import recipe, save_bench_models, write_recipe
from helpers.task_cases import write_tasks

from ensembler import EnsembleForCausalLM
from ensembler.cli.main import cli
from ensembler.evaluation.results_file import FILE


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
