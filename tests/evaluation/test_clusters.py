"""Rows in clusters: standard errors against the formula, coverage by simulation, and corner cases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pytest

stats = pytest.importorskip("scipy.stats")
pytest.importorskip("statsmodels")

from ensembler.errors import ConfigError  # noqa: E402
from ensembler.evaluation.statistics import compare, mean_interval, metric_interval  # noqa: E402


def f1(rows: Sequence[tuple[int, int]]) -> float:
    """F1 of (gold, predicted)."""
    both = sum(gold and predicted for gold, predicted in rows)
    return 2 * both / max(1, sum(gold + predicted for gold, predicted in rows))


def test_methods_that_agree_everywhere_are_not_shown_to_be_equal() -> None:
    """The interval is that of a share of clusters of which none differs."""
    rows, labels = [0, 1, 1, 0, 1, 1, 0, 0], list("aabbccdd")
    found = compare(rows, rows, clusters=labels)
    reach = stats.binomtest(0, 4).proportion_ci(0.95, method="wilson").high
    difference = found.difference
    assert (difference.estimate, difference.low, difference.high) == pytest.approx((0, -reach, reach))
    assert found.p_value == 1.0


def test_standard_errors_are_those_of_the_formula() -> None:
    generator = np.random.default_rng(0)
    for _ in range(100):
        num, num_clusters = int(generator.integers(8, 60)), int(generator.integers(2, 8))
        labels = np.concatenate([np.arange(num_clusters), generator.integers(num_clusters, size=num - num_clusters)])
        a, b = generator.normal(size=(2, num))
        sums = np.array([(a - a.mean())[labels == label].sum() for label in range(num_clusters)])
        error = math.sqrt(num_clusters / (num_clusters - 1) * (sums**2).sum()) / num
        found = metric_interval(a, clusters=[f"passage {label}" for label in labels])
        assert found.standard_error == pytest.approx(error)
        reach = stats.t.ppf(0.975, num_clusters - 1) * error
        assert (found.low, found.high) == pytest.approx((a.mean() - reach, a.mean() + reach))
        assert (found.method, found.degrees_of_freedom) == ("clustered t", num_clusters - 1)
        compared, difference = compare(a, b, clusters=labels), metric_interval(a - b, clusters=labels)
        assert asdict(compared.difference) == pytest.approx(asdict(difference))
        t = difference.estimate / difference.standard_error
        assert compared.p_value == pytest.approx(2 * stats.t.sf(abs(t), num_clusters - 1))
        assert compare(b, a, clusters=labels).p_value == pytest.approx(compared.p_value)
        assert compared.test == "clustered paired t"


def test_clusters_of_one_row_change_nothing() -> None:
    generator = np.random.default_rng(1)
    for num in (2, 3, 10, 80):
        a, b = generator.normal(size=(2, num))
        found, plain = metric_interval(a, clusters=range(num)), mean_interval(a)
        assert (found.low, found.high) == pytest.approx((plain.low, plain.high))
        assert found.standard_error == pytest.approx(stats.sem(a))
        assert compare(a, b, clusters=range(num)).p_value == pytest.approx(stats.ttest_rel(a, b).pvalue)
    a, b = ([*map(tuple, generator.integers(0, 2, size=(40, 2)).tolist())] for _ in range(2))
    found, plain = compare(a, b, f1, clusters=range(40), num_resamples=200), compare(a, b, f1, num_resamples=200)
    assert (found.p_value, found.difference.low) == (plain.p_value, plain.difference.low)
    assert found.test == "clustered paired bootstrap"
    assert found.difference.method == "clustered bootstrap"


def test_a_bootstrap_draws_clusters() -> None:
    generator = np.random.default_rng(2)
    labels = np.repeat(np.arange(40), 5)[generator.permutation(200)]
    values = generator.normal(size=40)[labels] + generator.normal(size=200)
    by_t = metric_interval(values, clusters=labels)
    drawn = metric_interval(values.tolist(), np.mean, clusters=labels, num_resamples=4000)
    assert drawn.standard_error == pytest.approx(by_t.standard_error, rel=0.06)
    assert drawn.standard_error > 1.5 * stats.sem(values)
    assert drawn.degrees_of_freedom == 39


@pytest.mark.parametrize("is_binary", [False, True])
def test_a_mean_is_covered_where_rows_depend_on_one_another(is_binary: bool) -> None:
    generator = np.random.default_rng(3)
    sizes = generator.integers(1, 12, size=30)
    labels = np.repeat(np.arange(30), sizes)
    covered, plain, rejected = [], [], []
    for _ in range(600):
        shared, own = generator.normal(size=30)[labels], generator.normal(size=len(labels))
        values = ((shared + own) > 0).astype(float) if is_binary else shared + own
        true, other = (0.5, 1 - values) if is_binary else (0.0, np.zeros(len(labels)))
        found, blind = metric_interval(values, clusters=labels), metric_interval(values)
        covered.append(found.low <= true <= found.high)
        plain.append(blind.low <= true <= blind.high)
        rejected.append(compare(values, other, clusters=labels).p_value <= 0.05)
    assert 0.92 < np.mean(covered) < 0.975, np.mean(covered)
    assert np.mean(plain) < 0.85, np.mean(plain)
    assert np.mean(rejected) == pytest.approx(0.05, abs=0.03)


def test_rows_that_are_all_alike() -> None:
    labels = ["a", "a", "b", "c", "c", "d"]
    found = metric_interval([1] * 6, clusters=labels)
    wilson = metric_interval([1] * 4)  # as many as there are clusters
    assert (found.low, found.high, found.standard_error) == (wilson.low, wilson.high, 0.0)
    assert compare([1] * 6, [1] * 6, clusters=labels).p_value == 1.0
    assert compare([0.3] * 6, [0.1] * 6, clusters=labels).p_value == pytest.approx(2 / 2**4)
    balanced = compare([1, 0, 1, 0], [0, 1, 0, 1], clusters="aabb")
    assert (balanced.difference.estimate, balanced.p_value) == (0.0, 1.0)
    few = metric_interval([1, 1, 1, 0], clusters="aabb")
    assert (few.low, few.high) == (0.0, 1.0)  # t of one degree of freedom, cut to what a share can be


@pytest.mark.parametrize(
    ("clusters", "message"), [(["a", "b"], "2 cluster labels for 3 rows"), ("aaa", "all 3 rows are of one cluster")]
)
def test_bad_clusters(clusters: Sequence[str], message: str) -> None:
    for aggregate in (None, np.mean):
        with pytest.raises(ConfigError, match=message):
            metric_interval([1, 0, 1], aggregate, clusters=clusters)
        with pytest.raises(ConfigError, match=message):
            compare([1, 0, 1], [1, 1, 1], aggregate, clusters=clusters)
