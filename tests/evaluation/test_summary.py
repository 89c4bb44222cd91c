"""What is chosen and reported: validation chooses, test reports, the statistics are those of scipy on the values."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from helpers.sweep_cases import (
    Ensemble,
    data_flags,
    figures_of,
    load_task,
    plan_of,
    rigged,
    save_ensemble,
    stored,
    study_of,
    swept,
    write_questions,
)
from helpers.task_cases import write_rows, write_tasks
from scipy.stats import binomtest

from ensembler.engine.grid import GridPoint
from ensembler.errors import ConfigError
from ensembler.evaluation.decisions import detectable_effect, equivalence
from ensembler.evaluation.documents import PROMPTS, REPEATED, TEST, VALIDATION, split_documents
from ensembler.evaluation.ensemble_plan import LOG_PROB, Plan, PlanOptions
from ensembler.evaluation.figures import TaskFigures, difference_table
from ensembler.evaluation.lm_eval_settings import PromptSettings
from ensembler.evaluation.methods import levels
from ensembler.evaluation.report import changed_in
from ensembler.evaluation.statistics import LEVEL, compare, holm, metric_interval
from ensembler.evaluation.summary import summarise
from ensembler.evaluation.task_files import make_task_from_file
from ensembler.evaluation.tasks import TextTask
from ensembler.evaluation.verdict import verdict
from ensembler.rules import RULES, get_rule


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory: pytest.TempPathFactory) -> Ensemble:
    return save_ensemble(tmp_path_factory.mktemp("members"))


def make_task(folder: Path, number: int = 60, **settings: Any) -> TextTask:
    path = write_questions(folder / "q.jsonl", number)
    flags = dict(zip(data_flags(path)[2::2], data_flags(path)[3::2], strict=True))
    names = {name.removeprefix("--"): value for name, value in flags.items()}
    return make_task_from_file(path, **names, **settings)


def planned(ensemble: Ensemble, *tasks: TextTask, **changes: Any) -> Plan:
    return plan_of(ensemble.checked, tasks, **{"validation": "20", **changes})


def draw(plan: Plan, seed: int = 3) -> dict[str, list[float]]:
    """For each document a value at each point, right more often at the later ones."""
    chance = random.Random(seed)
    return {
        document.name: [float(chance.random() < 0.3 + 0.07 * place) for place in range(len(plan.grid))]
        for document, _ in plan.documents()
    }


def figures_by(plan: Plan, folder: Path, values: Mapping[str, Sequence[float]]) -> TaskFigures:
    """The figures of one task from values by document."""

    def value(part: str, index: int, point: GridPoint) -> float:
        return values[plan.tasks[0].subsets[part][index].name][plan.grid.index(point)]

    return figures_of(plan, rigged(plan, folder, value))


def by_method(plan: Plan, figures: TaskFigures, values: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """The values of the test documents by method."""
    points = {
        one.method: levels(plan.rule).get(one.method) or GridPoint(one.rule, one.alpha or 0.0)
        for one in figures.methods
    }
    names = [document.name for document in plan.tasks[0].subsets[TEST]]
    return {key: [values[name][plan.grid.index(point)] for name in names] for key, point in points.items()}


def test_validation_chooses_and_test_reports(ensemble: Ensemble, tmp_path: Path) -> None:
    """On validation α = 1 is best, on test 0.5: the choice is 1, and its figure is that of the test documents."""
    plan = planned(ensemble, make_task(tmp_path), rules=("base-change",), alphas=(0.0, 0.5, 1.0, 1.5))
    right = {VALIDATION: {0.0: 4, 0.5: 8, 1.0: 12, 1.5: 2}, TEST: {0.0: 4, 0.5: 30, 1.0: 16, 1.5: 2}}
    results = rigged(plan, tmp_path / "out", lambda part, i, point: float(i < right[part][point.alpha]))
    figures = figures_of(plan, results)
    chosen = figures.chosen("base-change")
    assert chosen is not None
    assert chosen.selection is not None
    assert (chosen.label, chosen.alpha, chosen.chosen_by) == ("base-change α = 1", 1.0, "validation")
    assert (chosen.selection.best, chosen.selection.metric) == (1.0, 12 / 20)
    assert chosen.test == metric_interval([1] * 16 + [0] * 24)
    assert [point.test.estimate for point in figures.curve] == [0.1, 0.75, 0.4, 0.05]
    assert [point.validation for point in figures.curve] == [0.2, 0.4, 0.6, 0.1]
    assert (figures.num_validation, figures.num_test) == (20, 40)


@pytest.mark.parametrize(("rule_used", "expected"), [(False, 1.0), (True, 0.5)])
def test_the_one_standard_error_rule(rule_used: bool, expected: float, ensemble: Ensemble, tmp_path: Path) -> None:
    right = {0.0: 4, 0.5: 11, 1.0: 12, 1.5: 2}  # of 20; one standard error of 12 is 2.2
    changes = {"rules": ("base-change",), "alphas": tuple(right), "one_standard_error": rule_used}
    plan = planned(ensemble, make_task(tmp_path), **changes)
    results = rigged(plan, tmp_path / "out", lambda part, i, point: float(i < right[point.alpha]))
    assert figures_of(plan, results).method("base-change").alpha == expected


def test_comparisons_are_those_of_scipy_and_corrected_over_all(ensemble: Ensemble, tmp_path: Path) -> None:
    plan = planned(ensemble, make_task(tmp_path), margin=30.0)
    values = draw(plan)
    figures = figures_by(plan, tmp_path / "out", values)
    of = by_method(plan, figures, values)
    level = (1 - LEVEL) / len(figures.differences)
    assert len(figures.differences) > 3
    for each in figures.differences:
        pairs = list(zip(of[each.method], of[each.against], strict=True))
        only_a, only_b = sum(x > y for x, y in pairs), sum(x < y for x, y in pairs)
        expected = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
        assert each.comparison.p_value == pytest.approx(expected)
        assert each.comparison.test == "exact McNemar"
        assert each.detectable == detectable_effect(each.comparison, level=level)
        assert 0 < each.detectable < 1
    for method in figures.methods:
        assert method.test == metric_interval(of[method.method])
    p_values = [each.comparison.p_value for each in figures.differences]
    assert [each.p_holm for each in figures.differences] == holm(p_values)
    alike = [equivalence(of[each.method], of[each.against], 0.3) for each in figures.differences]
    assert [each.p_equivalent for each in figures.differences] == holm(alike)
    assert min(alike) < 0.05 < max(alike)


def test_p_values_of_several_tasks_are_corrected_together(ensemble: Ensemble, tmp_path: Path) -> None:
    tasks = [make_task(tmp_path, number, name=name) for name, number in (("one", 60), ("two", 50))]
    plan = planned(ensemble, *tasks, margin=5.0)
    chance = random.Random(1)
    results = rigged(plan, tmp_path / "out", lambda part, i, point: float(chance.random() < 0.3 + 0.3 * point.alpha))
    found = summarise([study_of(plan)], results)
    assert [task.task for task in found] == ["one", "two"]
    differences = [each for task in found for each in task.differences]
    assert [each.p_holm for each in differences] == holm([each.comparison.p_value for each in differences])
    level = (1 - LEVEL) / len(differences)
    assert all(each.detectable == detectable_effect(each.comparison, level=level) for each in differences)
    assert differences[0].p_holm > holm([each.comparison.p_value for each in found[0].differences])[0]


def test_equal_formulas_are_compared_once(ensemble: Ensemble, tmp_path: Path) -> None:
    """At α = 1 base-change is EFT; a chosen α = 0 is the member itself."""
    plan = planned(ensemble, make_task(tmp_path))
    assert plan.formula(GridPoint("base-change", 1.0)) == plan.formula(GridPoint("eft", 1.0))
    figures = figures_of(plan, rigged(plan, tmp_path / "one", lambda part, i, point: float(point.alpha == 1.0)))
    assert [figures.method(rule).alpha for rule in ("base-change", "eft")] == [1.0, 1.0]
    assert {(each.method, each.against) for each in figures.differences} == {
        ("base-change", "source_ft"),
        ("base-change", "target_pt"),
    }
    figures = figures_of(plan, rigged(plan, tmp_path / "zero", lambda part, i, point: float(point.alpha == 0.0)))
    labels = ["source FT", "target PT", "base-change α = 0", "base-change α = 1", "eft α = 0", "eft α = 1"]
    assert [method.label for method in figures.methods] == labels
    assert [(figures.label(each.method), figures.label(each.against)) for each in figures.differences] == [
        ("base-change α = 0", "target PT"),
        ("base-change α = 0", "base-change α = 1"),
        ("eft α = 0", "eft α = 1"),
    ]
    assert "base-change: alpha 0 was chosen on 20 validation documents" in verdict(figures)


def test_levels_are_the_anchors_of_rules_for_the_same_members() -> None:
    both = {"source_ft": GridPoint("base-change", 0.0), "target_pt": GridPoint("eft", 0.0)}
    assert levels(RULES["base-change"]) == levels(RULES["eft"]) == both
    assert levels(RULES["contrastive"]) == {}  # its cut-off is no part of the expert
    assert levels(RULES["realign"]) == {"reference": GridPoint("realign", 0.0)}
    linear = get_rule("linear", constant={"source_ft": 0.5, "target_pt": 0.5}, slope={"source_pt": -1.0})
    assert levels(linear) == both


def test_labels_are_not_needed_for_the_choice_by_prompts(ensemble: Ensemble, tmp_path: Path) -> None:
    """Labels turned round give the same choice; the perplexity is that of the prompts' own tokens."""
    plan, rows = swept(ensemble, make_task(tmp_path, 12), tmp_path / "out", select="perplexity")
    parts = plan.tasks[0].subsets
    assert (len(parts[PROMPTS]), parts[VALIDATION]) == (12, ())

    turned_round = {
        name: [
            one if LOG_PROB in one.values else one._replace(values={"acc": 1 - one.values["acc"]}) for one in of_points
        ]
        for name, of_points in rows.items()
    }
    plain, turned = (
        figures_of(plan, stored(plan, tmp_path / name, of)) for name, of in (("plain", rows), ("turned", turned_round))
    )
    for rule in plan.run.rules:
        chosen = plain.chosen(rule)
        assert chosen is not None
        assert chosen.selection is not None
        assert chosen.chosen_by == "prompt perplexity"
        assert chosen.selection == turned.method(rule).selection
        totals = {
            point.alpha: sum(
                rows[document.name][plan.grid.index(point)].values[LOG_PROB] for document in parts[PROMPTS]
            )
            for point in plan.points
            if point.rule == rule
        }
        assert chosen.alpha == max(totals, key=totals.__getitem__)
        num_tokens = sum(len(document.prompt) for document in parts[PROMPTS])  # one for each character
        assert chosen.selection.metric == pytest.approx(math.exp(-max(totals.values()) / num_tokens))
    assert plain.methods[0].test != turned.methods[0].test


def test_a_task_that_does_not_say_wants_the_highest(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    task.task._higher_is_better = {"acc": None}
    assert task.metrics[0].higher_is_better


@pytest.mark.parametrize("num", range(1, 30, 4))
def test_drawn_documents_and_the_rest_are_all_and_none_is_both(num: int, tmp_path: Path) -> None:
    task = make_task(tmp_path, 30)
    parts = split_documents(task, str(num), seed=num)
    assert len(parts[VALIDATION]) == num
    names = [document.name for document in (*parts[VALIDATION], *parts[TEST])]
    assert sorted(names) == sorted(document.name for document in task.documents())
    assert parts == split_documents(task, str(num), seed=num)


@pytest.mark.parametrize("num_fewshot", [None, 2])
def test_documents_that_are_there_twice_do_not_choose(num_fewshot: int | None, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "twice.jsonl", [{"question": f"{i}?", "label": "ab"[i % 2]} for i in range(10)] * 2)
    task = make_task_from_file(
        path, prompt="{question}", choices="a,b", answer="{label}", settings=PromptSettings(num_fewshot=num_fewshot)
    )
    parts = split_documents(task, "10")
    asked = [set(map(task.identity, parts[part])) for part in (VALIDATION, TEST)]
    assert not asked[0] & asked[1]
    assert len(parts[VALIDATION]) + len(parts[REPEATED]) == 10
    assert len(parts[REPEATED]) > 0


def test_validation_that_is_all_in_test_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "same.jsonl", [{"question": "x", "label": "a"}] * 6)
    task = make_task_from_file(path, prompt="{question}", choices="a,b", answer="{label}")
    with pytest.raises(ConfigError, match=r"all 2 validation examples .* are among those that are reported"):
        split_documents(task, "2")


def test_documents_that_alpha_changed_are_those_of_the_results(ensemble: Ensemble, tmp_path: Path) -> None:
    plan = planned(ensemble, make_task(tmp_path), rules=("base-change",))
    results = rigged(plan, tmp_path / "out", lambda part, i, point: float(point.alpha > 0 and i % 2))
    (found,) = changed_in([study_of(plan)], results, figures_of(plan, results))
    assert found["counts"].startswith("α changed 20 of 40 answers; by acc, 20 documents are better and 0 worse. 10 of")
    odd = {document.name: document.prompt for document in plan.tasks[0].subsets[TEST][1::2]}
    assert {one["name"]: one["prompt"] for one in found["examples"]}.items() <= odd.items()


def test_metrics_that_are_no_mean_go_by_the_bootstrap(ensemble: Ensemble, tmp_path: Path) -> None:
    rows = [{"t": f"a {i}", "x": "b c d"[: 1 + i % 5]} for i in range(60)]
    path = write_rows(tmp_path / "p.jsonl", rows)
    task = make_task_from_file(path, prompt="{t}", answer="{x}", metric="perplexity")
    plan = planned(ensemble, task, rules=("base-change",), margin=0.5)
    results = rigged(plan, tmp_path / "out", lambda part, i, point: [-3.0 - point.alpha - i % 3, 1 + i % 2])
    figures = figures_of(plan, results)
    assert figures.method("base-change").alpha == 0.0  # lower is better
    assert {each.comparison.test for each in figures.differences} == {"paired bootstrap"}
    assert all(each.p_equivalent is not None for each in figures.differences)
    assert all(method.test is not None and method.test.method == "bootstrap" for method in figures.methods)
    assert {point.test.method for point in figures.curve} == {"none: not a mean"}
    assert not figures.is_percent
    near = planned(ensemble, task, rules=("base-change",), one_standard_error=True)  # lm-eval has none of it
    better = figures_of(near, rigged(near, tmp_path / "near", lambda part, i, point: [-3.0 + point.alpha / 99, 1]))
    assert better.method("base-change").selection.best == 1.0
    assert better.method("base-change").alpha == 1.0  # all alike: the standard error is 0
    wide = rigged(near, tmp_path / "wide", lambda part, i, point: [-3.0 + point.alpha / 99 - i % 3, 1])
    assert figures_of(near, wide).method("base-change").alpha == 0.0
    impossible = figures_of(plan, rigged(plan, tmp_path / "not", lambda part, i, point: [-1e9, 1]))
    assert all(math.isnan(each.p_holm) for each in impossible.differences)


def test_a_share_is_told_in_percent_whatever_values_are_found(ensemble: Ensemble, tmp_path: Path) -> None:
    plan = planned(ensemble, make_task(tmp_path), margin=30.0)
    values = {name: [value / 2 + 0.25 for value in of_points] for name, of_points in draw(plan).items()}
    figures = figures_by(plan, tmp_path / "out", values)
    assert figures.is_percent
    of = by_method(plan, figures, values)
    alike = [equivalence(of[each.method], of[each.against], 0.3) for each in figures.differences]
    assert [each.p_equivalent for each in figures.differences] == holm(alike)


@pytest.mark.parametrize(("metric", "margin", "limit"), [("brier_score", 2.0, 1), ("acc", 150.0, 100)])
def test_a_margin_that_no_methods_differ_by_is_not_tested(
    metric: str, margin: float, limit: int, ensemble: Ensemble, passages: TextTask, tmp_path: Path
) -> None:
    """Its unit is the metric's own: 2 of a metric between 0 and 1 would find all methods alike."""
    plan = planned(ensemble, passages, validation="train", metric=metric, margin=margin)
    chance = random.Random(2)

    def value(part: str, index: int, point: GridPoint) -> Any:
        drawn = chance.random()
        return float(drawn < 0.5) if metric == "acc" else [index % 2, [drawn, 1 - drawn]]

    figures = figures_of(plan, rigged(plan, tmp_path / "out", value))
    assert figures.margin is None
    assert all(each.p_equivalent is None for each in figures.differences)
    (said,) = figures.not_measured
    unit = "points" if metric == "acc" else "the unit of brier_score"
    assert said.startswith(f"which methods are alike: the margin of {margin:g} is in {unit}, ")
    assert said.endswith(f"; give a margin below {limit}")
    narrow = planned(ensemble, passages, validation="train", metric=metric, margin=0.5 * limit)
    figures = figures_of(narrow, rigged(narrow, tmp_path / "narrow", value))
    assert (figures.margin, figures.not_measured) == (0.5 * limit, ())
    assert all(each.p_equivalent is not None for each in figures.differences)


def test_documents_without_the_metric_are_counted(ensemble: Ensemble, tmp_path: Path) -> None:
    """Two methods are compared on the documents that both have; the tables say how many are left out."""
    plan = planned(ensemble, make_task(tmp_path))
    values = draw(plan)
    lost = [document.name for document in plan.tasks[0].subsets[TEST][:3]]
    holes = {
        name: [None if name in lost and place == 2 else value for place, value in enumerate(of)]
        for name, of in values.items()
    }
    figures = figures_by(plan, tmp_path / "out", holes)
    of = by_method(plan, figures, holes)
    counted = {each.comparison.difference.num_rows for each in figures.differences}
    assert counted == {37, 40}
    for each in figures.differences:
        pairs = [pair for pair in zip(of[each.method], of[each.against], strict=True) if None not in pair]
        assert each.comparison == compare(*zip(*pairs, strict=True))
    for method in figures.methods:
        assert method.test == metric_interval([value for value in of[method.method] if value is not None])
    assert {row.get("without acc") for row in difference_table(figures)} == {"", "3 documents"}


# -- clusters ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def passages(tmp_path: Path) -> TextTask:
    """60 questions on 12 passages, and 8 others on 4 for validation."""
    folder = write_tasks(tmp_path / "tasks")
    for file, number in (("questions", 60), ("train_questions", 8)):
        rows = [{"question": f"{file[:2]} {i}", "choices": ["a", "b"], "answer": i % 2} for i in range(number)]
        passages = [{**row, "passage": f"p{i % 12}", "one": 1} for i, row in enumerate(rows)]
        write_rows(folder / f"{file}.jsonl", passages)
    return load_task(folder, "choice")


def test_documents_of_one_cluster_count_together(passages: TextTask, ensemble: Ensemble, tmp_path: Path) -> None:
    """The statistics are those of the cluster-robust tests of the values; figures and choices stay as they are."""
    both = []
    for cluster in (None, "passage"):
        plan = planned(ensemble, passages, validation="train", cluster=cluster, margin=40.0)
        values = draw(plan)
        both.append(figures_by(plan, tmp_path / str(cluster), values))
    plain, clustered = both
    assert (plain.cluster, plain.num_clusters) == (None, None)
    assert (clustered.cluster, clustered.num_clusters) == ("passage", 12)
    of = by_method(plan, clustered, values)
    labels = [document.content["passage"] for document in plan.tasks[0].subsets[TEST]]
    for one, other in zip(plain.methods, clustered.methods, strict=True):
        assert other.test == metric_interval(of[other.method], clusters=labels)
        assert other.test.estimate == one.test.estimate
        assert (one.alpha, one.selection) == (other.alpha, other.selection)
    level = (1 - LEVEL) / len(clustered.differences)
    for each in clustered.differences:
        a, b = of[each.method], of[each.against]
        assert each.comparison == compare(a, b, clusters=labels)
        assert each.comparison.test == "clustered paired t"
        assert each.detectable == detectable_effect(each.comparison, level=level)
    alike = [equivalence(of[each.method], of[each.against], 0.4, clusters=labels) for each in clustered.differences]
    assert [each.p_equivalent for each in clustered.differences] == holm(alike)


def test_metrics_that_are_no_mean_are_drawn_by_cluster(ensemble: Ensemble, passages: TextTask, tmp_path: Path) -> None:
    plan = planned(ensemble, passages, validation="train", cluster="passage", metric="brier_score")
    chance = random.Random(2)
    results = rigged(plan, tmp_path / "out", lambda part, i, point: [i % 2, [p := chance.random(), 1 - p]])
    figures = figures_of(plan, results)
    assert {method.test.method for method in figures.methods if method.test is not None} == {"clustered bootstrap"}
    assert {each.comparison.test for each in figures.differences} == {"clustered paired bootstrap"}


def test_a_cluster_that_cannot_be_counted_by_is_refused(ensemble: Ensemble, passages: TextTask) -> None:
    with pytest.raises(
        ConfigError,
        match=r"^tiny_choice/test/0 has no field 'pasage' to cluster by; its fields are question, choices, answer, "
        r"passage, one$",
    ):
        planned(ensemble, passages, validation=None, cluster="pasage")
    with pytest.raises(ConfigError, match="all test documents of tiny_choice have one one; give a field"):
        planned(ensemble, passages, validation=None, cluster="one")


def test_a_margin_leaves_room() -> None:
    for margin in (0.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match=r"a margin of .* leaves no room; give a number above 0"):
            PlanOptions(margin=margin)
