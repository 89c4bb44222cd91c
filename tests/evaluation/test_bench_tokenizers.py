"""A benchmark whose target has another tokenizer than the source pair: a run for each rule, figures as elsewhere."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from helpers.bench_cases import Ran, recipe, run_bench, save_patch, write_recipe
from helpers.sweep_cases import load_task, plan_of, read_rows, run_plan
from helpers.task_cases import run_lm_eval, write_tasks
from helpers.text_cases import save_text_members
from transformers import AutoModelForCausalLM, AutoTokenizer

from ensembler import EnsembleConfig
from ensembler.engine.grid import GridPoint
from ensembler.evaluation.figures import COSTS
from ensembler.evaluation.measure import Load, measure
from ensembler.preflight import check_ensemble

MEMBERS = ("source_ft", "source_pt", "target_pt")
RULES = ("base-change", "eft")
ALPHAS = (0.2, 0.6, 1.0)
SETTINGS = {"text_tolerance": 0.01, "text_candidates": 70}
SPEED = {"rounds": 1, "num_prompts": 1, "new_tokens": 3, "num_examples": 2}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("texts")
    save_text_members(home)
    save_patch(home / "source_pt", home / "patch")
    write_tasks(home / "tasks")
    return home


@pytest.fixture(scope="module")
def models(home: Path) -> dict[str, str]:
    return {role: str(home / role) for role in MEMBERS}


@pytest.fixture(scope="module")
def timed() -> list[Load]:
    """Collect the loads whose costs were measured."""
    return []


@pytest.fixture(scope="module")
def ran(home: Path, models: dict[str, str], timed: list[Load]) -> Ran:
    """The benchmark, with costs that this process measures."""

    def measured(load: Load) -> dict[str, float | None]:
        timed.append(load)
        return measure(load)

    content = recipe({**models, "patch": str(home / "patch")}, home / "tasks/choice.yaml", speed=SPEED, **SETTINGS)
    path = write_recipe(home / "r.yaml", content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", home / "cache")
        patch.setattr("ensembler.evaluation.costs._measure_apart", measured)
        return run_bench(path, home / "out", costs=True)


def test_each_rule_has_its_run_and_its_curve(ran: Ran) -> None:
    assert not ran.reported
    (study,) = ran.bench.studies
    assert [plan.name for plan in study.plans] == [f"r.{name}" for name in (*RULES, "patched", *MEMBERS, "patch")]
    assert [method.method for method in ran.tasks[0].methods] == [*MEMBERS, *RULES, "patch", "patch+base-change"]
    assert [(point.rule, point.alpha) for point in ran.tasks[0].curve] == [
        (rule, alpha) for rule in RULES for alpha in ALPHAS
    ]
    levels = {name: run["ensemble"]["vocabulary"] for name, run in ran.bench.settings["runs"].items()}
    assert levels == {
        plan.name: "text" if plan.name in ("r.base-change", "r.eft", "r.patched") else "identical"
        for plan in study.plans
    }
    assert SETTINGS.items() <= ran.bench.settings["runs"]["r.eft"]["ensemble"].items()
    compared = {(each.method, each.against) for each in ran.tasks[0].differences}
    assert {RULES, ("eft", "source_ft"), ("eft", "patch"), ("patch+base-change", "base-change")} <= compared


@pytest.mark.parametrize("role", MEMBERS)
def test_members_are_what_lm_eval_finds(role: str, ran: Ran, home: Path, models: dict[str, str]) -> None:
    task = load_task(home / "tasks", "choice")
    model, tokenizer = (kind.from_pretrained(models[role]) for kind in (AutoModelForCausalLM, AutoTokenizer))
    expected = run_lm_eval(task, model, tokenizer)["results"][task.name]
    figure = ran.method(role)
    assert figure.test is not None
    assert {"acc": figure.test.estimate, **figure.others} == pytest.approx(
        {key: expected[f"{key},none"] for key in ("acc", "acc_norm", "brier_score")}, abs=1e-6
    )


@pytest.mark.parametrize("rule", RULES)
def test_ensembles_are_those_of_a_sweep(
    rule: str, ran: Ran, home: Path, models: dict[str, str], tmp_path: Path
) -> None:
    checked = check_ensemble(EnsembleConfig(rule=rule, members=dict(models), **SETTINGS))
    assert checked.contract.is_text
    plan = plan_of(checked, [load_task(home / "tasks", "choice")], rules=[rule], alphas=ALPHAS)
    swept = run_plan(plan, tmp_path / "swept")
    points = [GridPoint(rule, alpha) for alpha in (*ALPHAS, 0.0)]
    rows = [row for row in read_rows(home / "out", f"r.{rule}") if "/test/" in row["id"]]
    assert len(rows) == len(swept) * len(points)
    for row in rows:
        one = swept[row["id"]][plan.grid.index(GridPoint(row["rule"], row["alpha"]))]
        assert flat(row["answers"]) == pytest.approx(flat(one.answers), abs=1e-4), (row["id"], row["alpha"])
    chosen = ran.method(rule)
    at = plan.grid.index(GridPoint(rule, chosen.alpha or 0.0))
    assert chosen.test is not None
    assert chosen.test.estimate == pytest.approx(
        sum(measured[at].values["acc"] for measured in swept.values()) / len(swept)
    )


def flat(answers: list[Any]) -> list[float]:
    return [float(log_prob) for log_prob, _ in answers]


def test_costs_are_of_the_same_methods(ran: Ran, timed: list[Load]) -> None:
    together = [load.config for load in timed if not load.alone]
    assert together
    assert all(SETTINGS.items() <= config.items() for config in together)
    for method in ran.tasks[0].methods:
        assert method.error is None
        assert {"tokens_per_second", "examples_per_second", "weight_bytes"} <= method.cost.keys() <= set(COSTS), asdict(
            method
        )
    alone, eft = (ran.method(key).cost["weight_bytes"].median for key in ("source_ft", "eft"))
    assert eft > 2 * alone
