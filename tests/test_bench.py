"""Figures of a benchmark: each method's are lm-eval's of the same model, the paired statistics scipy's of the rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from bench_cases import ALL, Ran, recipe, run_bench, save_bench_models, values_of, write_recipe
from peft import PeftModel
from scipy import stats
from sweep_cases import load_task
from task_cases import run_lm_eval, write_tasks
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ensembler import EnsembleForCausalLM
from ensembler.evaluation.bench.methods import plan_runs
from ensembler.evaluation.bench.recipe_file import read_recipe
from ensembler.evaluation.statistics import holm


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return save_bench_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks") / "tasks")


def plain(models: dict[str, Any], method: str, alpha: float | None) -> PreTrainedModel:
    """The model of a method, made without the benchmark: by transformers, PEFT's merge, or as an ensemble."""
    if method in ("source_pt", "target_pt", "direct"):
        return AutoModelForCausalLM.from_pretrained(models[method])
    if method in ("source_ft", "patch"):
        base = AutoModelForCausalLM.from_pretrained(models["source_pt" if method == "source_ft" else "target_pt"])
        return PeftModel.from_pretrained(base, models["patch"]).merge_and_unload()
    target = "patch" if method == "patch+base-change" else "target_pt"
    members = {role: plain(models, role, None) for role in ("source_ft", "source_pt")}
    members["target_pt"] = plain(models, target, None)
    rule = "eft" if method == "eft" else "base-change"
    return EnsembleForCausalLM.from_members(rule=rule, alpha=alpha, members=members)


@pytest.mark.parametrize("name", ["choice", "pairs", "generate"])
def test_every_method_is_what_lm_eval_finds(name: str, models: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    ran = run_bench(write_recipe(tmp_path / "r.yaml", recipe(models, folder / f"{name}.yaml")), tmp_path / "out")
    assert not ran.reported
    (found,) = ran.tasks
    assert [method.method for method in found.methods] == list(ALL)
    task = load_task(folder, name)
    tokenizer = AutoTokenizer.from_pretrained(models["source_pt"])
    for method in found.methods:
        assert (method.alpha is None) == (method.method not in ("base-change", "eft", "patch+base-change"))
        model = plain(models, method.method, method.alpha)
        expected = run_lm_eval(task, model, tokenizer)["results"][task.name]
        figures = {found.metric: method.test.estimate, **method.others}
        for key, value in figures.items():
            metric, _, filter_name = key.partition(",")
            assert value == pytest.approx(expected[f"{metric},{filter_name or 'none'}"], abs=1e-6), (method.method, key)


@pytest.fixture(scope="module")
def ran(models: dict[str, Any], folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ran, Path]:
    out = tmp_path_factory.mktemp("bench")
    rows = [{"question": f"{chr(97 + i % 26)} {i * 7 % 97}", "choices": ["a", "b"], "answer": i % 2} for i in range(90)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    own = out / "tasks"
    own.mkdir()
    (own / "questions.jsonl").write_text(text)
    (own / "train_questions.jsonl").write_text(text.replace('"question": "', '"question": "x'))
    (own / "choice.yaml").write_text((folder / "choice.yaml").read_text())
    return run_bench(write_recipe(out / "r.yaml", recipe(models, own / "choice.yaml")), out / "out"), out / "out"


def places(ran: Ran) -> dict[str, tuple[str, str, float]]:
    """Where the rows of each method are: run, rule, α."""
    alphas = {method.method: method.alpha for method in ran.tasks[0].methods}
    joint = {"source_ft": ("base-change", 0.0), "target_pt": ("eft", 0.0)}
    found = {name: (f"r.{name}", "linear", 0.0) for name in ("source_pt", "direct")}
    found |= {name: ("r.ensemble", *point) for name, point in joint.items()}
    found |= {name: ("r.ensemble", name, alphas[name]) for name in ("base-change", "eft")}
    found["patch"] = ("r.patched", "eft", 0.0)
    found["patch+base-change"] = ("r.patched", "base-change", alphas["patch+base-change"])
    return found


def test_paired_statistics_are_scipys_on_the_rows(ran: tuple[Ran, Path]) -> None:
    bench, out = ran
    values = {
        name: values_of(out, run, "test", rule, alpha, "acc") for name, (run, rule, alpha) in places(bench).items()
    }
    task = bench.tasks[0]
    assert {len(of) for of in values.values()} == {90}
    p_values = []
    for each in task.differences:
        a, b = values[each.method], values[each.against]
        only_a = sum(1 for x, y in zip(a, b, strict=True) if x > y)
        only_b = sum(1 for x, y in zip(a, b, strict=True) if x < y)
        expected = stats.binomtest(only_a, only_a + only_b, 0.5).pvalue if only_a + only_b else 1.0
        assert each.comparison.difference.estimate == pytest.approx((sum(a) - sum(b)) / 90)
        assert each.comparison.p_value == pytest.approx(expected)
        p_values.append(expected)
    assert any(p < 1 for p in p_values)
    assert [each.p_holm for each in task.differences] == pytest.approx(holm(p_values))
    for method in task.methods:
        wilson = stats.binomtest(int(sum(values[method.method])), 90).proportion_ci(0.95, method="wilson")
        assert (method.test.low, method.test.high) == pytest.approx((wilson.low, wilson.high))
    compared = {(each.method, each.against) for each in task.differences}
    assert {(name, "source_ft") for name in ALL if name != "source_ft"} <= compared
    assert ("patch", "target_pt") in compared


def test_alpha_is_what_the_validation_rows_choose(ran: tuple[Ran, Path]) -> None:
    bench, out = ran
    for name, run in (("base-change", "r.ensemble"), ("eft", "r.ensemble"), ("patch+base-change", "r.patched")):
        rule = "eft" if name == "eft" else "base-change"
        right = {alpha: sum(values_of(out, run, "train", rule, alpha, "acc")) for alpha in (0.2, 0.6, 1.0)}
        best = max(right.values())
        assert bench.method(name).alpha == min(alpha for alpha, num in right.items() if num == best)


def test_only_runs_that_choose_read_the_validation_examples(ran: tuple[Ran, Path]) -> None:
    sizes = {planned.run.name: len(planned.sweep.ids) for planned in ran[0].bench.runs}
    assert sizes["ensemble"] == sizes["patched"] == 180
    assert {sizes[name] for name in ("source_pt", "direct", "source_ft", "target_pt", "patch")} == {90}


def test_examples_drawn_for_validation_are_reported_by_no_method(
    models: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    path = write_recipe(tmp_path / "r.yaml", recipe(models, folder / "choice.yaml", validation=2))
    ran = run_bench(path, tmp_path / "out")
    (task,) = ran.tasks
    assert (task.num_validation, task.num_test) == (2, 3)
    reported = [{example.id for example in planned.sweep.tasks[0].parts.test} for planned in ran.bench.runs]
    assert all(ids == reported[0] for ids in reported)


def test_a_given_alpha_needs_no_validation(models: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    content = recipe(
        models,
        folder / "choice.yaml",
        validation=None,
        alpha={"base-change": 0.3, "eft": 0.7, "patch+base-change": 0.3},
    )
    ran = run_bench(write_recipe(tmp_path / "r.yaml", content), tmp_path / "out")
    assert [ran.method(name).alpha for name in ("base-change", "eft", "patch+base-change")] == [0.3, 0.7, 0.3]
    assert not any(method.is_chosen for method in ran.tasks[0].methods if method.alpha is not None)


def test_members_alone_stand_in_for_an_ensemble_that_fails(
    models: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three models may be too many for a device that holds one."""
    load = EnsembleForCausalLM.from_checked

    def too_large(checked: Any, **options: Any) -> EnsembleForCausalLM:
        if len(checked.config.members) > 2:
            raise RuntimeError("out of memory")
        return load(checked, **options)

    path = write_recipe(tmp_path / "r.yaml", recipe(models, folder / "choice.yaml"))
    whole = run_bench(path, tmp_path / "whole")
    monkeypatch.setattr(EnsembleForCausalLM, "from_checked", too_large)
    ran = run_bench(path, tmp_path / "out")
    assert ran.reported == dict.fromkeys(("r.ensemble", "r.patched"), "RuntimeError: out of memory")
    for name in ALL:
        failed = name in ("base-change", "eft", "patch+base-change")
        assert ran.method(name).error == ("RuntimeError: out of memory" if failed else None)
        assert ran.method(name).test == (None if failed else whole.method(name).test)
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert {row["run"]: row["error"] for row in rows} == ran.reported
    monkeypatch.undo()
    mended = run_bench(path, tmp_path / "out")  # the same command goes on, and what failed is tried again
    assert mended.tasks == whole.tasks


def test_what_is_planned_in_place_of_a_run_says_so(models: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    (experiment,) = read_recipe(write_recipe(tmp_path / "r.yaml", recipe(models, folder / "choice.yaml"))).experiments
    runs = {run.name: run for run in plan_runs(experiment)}
    assert {name: run.instead_of for name, run in runs.items()} == {
        "ensemble": None,
        "patched": None,
        "source_pt": None,
        "direct": None,
        "source_ft": "ensemble",
        "target_pt": "ensemble",
        "patch": "patched",
    }
    methods = [method.name for run in runs.values() if run.instead_of is None for method in run.methods]
    assert sorted(methods) == sorted(ALL)
