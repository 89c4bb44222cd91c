"""The statistics of a task: documents without its metric, many comparisons, and a metric that is no mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("statsmodels")

from ensembler.evaluation.documents import TEST, Document, Metric, PlannedTask
from ensembler.evaluation.statistics import compare, holm, metric_interval
from ensembler.evaluation.values import Statistics


class FakeTask:
    """A task whose metric is F1 of (gold, predicted), or a mean; it counts the calls of F1."""

    def __init__(self) -> None:
        self.num_calls = 0

    def aggregate(self, key: str, values: Sequence[Any]) -> float:
        if key != "f1":
            return float(np.mean(values))
        self.num_calls += 1
        both = sum(gold and predicted for gold, predicted in values)
        return 2 * both / max(1, sum(gold + predicted for gold, predicted in values))


def planned(num: int, metric: str) -> PlannedTask:
    documents = tuple(Document("t", "test", i, {"passage": i // 3}, "", ()) for i in range(num))
    task: Any = FakeTask()
    return PlannedTask(task, Metric(metric, metric, "", True, metric != "f1"), {TEST: documents})


def by_name(values: Sequence[Any]) -> dict[str, Any]:
    """Values by the documents' names; None of a document without the metric."""
    return {f"t/test/{index}": value for index, value in enumerate(values) if value is not None}


def pairs(num: int, right: float, seed: int) -> list[tuple[int, int]]:
    generator = np.random.default_rng(seed)
    gold = np.random.default_rng(0).integers(0, 2, size=num)
    return [*zip(gold.tolist(), np.where(generator.random(num) < right, gold, 1 - gold).tolist(), strict=True)]


# -- documents without the metric -------------------------------------------------------------------------------------


def test_pairs_are_of_the_documents_that_both_methods_have() -> None:
    generator = np.random.default_rng(1)
    a, b = generator.integers(0, 2, size=(2, 60)).tolist()
    a[3] = b[7] = b[8] = None
    kept = [index for index in range(60) if index not in (3, 7, 8)]
    both = [[values[index] for index in kept] for values in (a, b)]
    for cluster in (None, "passage"):
        statistics = Statistics(planned(60, "acc"), cluster)
        clusters = None if cluster is None else [index // 3 for index in kept]
        found = statistics.compare([by_name(a)], [by_name(b)])
        assert found == compare(*both, clusters=clusters)
        assert found.difference.num_rows == 57
        labels = None if cluster is None else [index // 3 for index in range(60) if index != 3]
        own = [value for value in a if value is not None]
        assert statistics.interval([by_name(a)]) == metric_interval(own, clusters=labels)
        assert 0 < statistics.p_equivalent([by_name(a)], [by_name(b)], 0.3) < 1
        seeds = statistics.compare([by_name(a), by_name(b)], [by_name(b)])
        assert (seeds.difference.num_rows, seeds.test.startswith("seeds")) == (57, True)


def test_nothing_is_said_where_no_documents_are_left() -> None:
    right, none = by_name([1, 0, 1, 1, 0, 1]), by_name([None] * 6)
    for metric in ("acc", "f1"):
        statistics = Statistics(planned(6, metric))
        found = statistics.compare([right], [none])
        assert math.isnan(found.p_value)
        assert found.test == f"none: no document has {metric}"
        assert math.isnan(statistics.interval([none]).estimate)
        assert math.isnan(statistics.quick_interval(none).estimate)
        assert math.isnan(statistics.p_equivalent([right], [none], 0.1))
    one_passage = by_name([1, 0, None, None, None, None])
    found = Statistics(planned(6, "acc"), "passage").compare([right], [one_passage])
    assert found.test == "none: all documents have one passage"


# -- many comparisons -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_comparisons", [10, 100])
def test_a_clear_difference_of_no_means_is_significant_among_many(num_comparisons: int) -> None:
    task = planned(80, "f1")
    statistics = Statistics(task, num_comparisons=num_comparisons)
    good, bad = ([by_name(pairs(80, right, seed))] for right, seed in ((0.97, 1), (0.55, 2)))
    found = statistics.compare(good, bad)
    assert holm([found.p_value] + [1.0] * (num_comparisons - 1))[0] <= 0.05
    assert found.difference.low > 0
    alike = [by_name(pairs(80, 0.97, 1)), by_name(pairs(80, 0.97, 3))]
    p_equivalent = statistics.p_equivalent(alike[:1], alike[1:], 0.9)
    assert holm([p_equivalent] + [1.0] * (num_comparisons - 1))[0] <= 0.05


def test_more_resamples_are_drawn_only_where_p_is_the_smallest() -> None:
    task = planned(60, "f1")
    counted: Any = task.task
    a, b = ([by_name(pairs(60, 0.8, seed))] for seed in (1, 2))
    assert Statistics(task, num_comparisons=100).compare(a, b).p_value > 0.01
    assert counted.num_calls == 2 * 1001


def test_a_clear_difference_of_means_is_significant_among_many() -> None:
    generator = np.random.default_rng(4)
    a, b = ([by_name((generator.normal(size=100) + mean).tolist())] for mean in (5.0, 0.0))
    found = Statistics(planned(100, "log_prob"), num_comparisons=1000).compare(a, b)
    assert found.test == "paired bootstrap"
    assert found.p_value * 1000 <= 0.05


# -- the unit ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "is_mean", "expected"),
    [
        *(
            (name, True, True)
            for name in ("acc", "acc_norm", "acc_top5", "exact_match", "pass@1", "em", "prompt_level_strict_acc")
        ),
        *((name, True, False) for name in ("f1", "log_prob", "bypass", "score", "bleu", "likelihood", "remove")),
        ("acc", False, False),
    ],
)
def test_shares_of_right_answers_are_known_by_their_names(name: str, is_mean: bool, expected: bool) -> None:
    assert Metric(f"{name},filter", name, "filter", True, is_mean).is_percent == expected
