"""Intervals and tests against published worked examples, scipy, coverage by simulation, and their symmetries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pytest

stats = pytest.importorskip("scipy.stats")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from ensembler.errors import ConfigError, MissingExtraError  # noqa: E402
from ensembler.evaluation.resampling import NUM_RESAMPLES  # noqa: E402
from ensembler.evaluation.statistics import (  # noqa: E402
    choose_alpha,
    compare,
    holm,
    mcnemar,
    mean_interval,
    metric_interval,
    wilson,
)


def f1(rows: Sequence[tuple[int, int]]) -> float:
    """F1 of (gold, predicted)."""
    both = sum(gold and predicted for gold, predicted in rows)
    return 2 * both / max(1, sum(gold + predicted for gold, predicted in rows))


def paired(both: int, only_a: int, only_b: int, neither: int) -> tuple[list[int], list[int]]:
    return (
        [1] * (both + only_a) + [0] * (only_b + neither),
        [1] * both + [0] * only_a + [1] * only_b + [0] * neither,
    )


# -- worked examples --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "rows", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson(right: int, rows: int, low: float, high: float) -> None:
    found = metric_interval([1] * right + [0] * (rows - right))
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
    assert found.estimate == right / rows
    assert found.standard_error == pytest.approx(math.sqrt(right / rows * (1 - right / rows) / (rows - 1)))


def test_mean() -> None:
    values = np.array([4.1, 3.9, 5.2, 4.4, 6.0, 4.8])
    found = mean_interval(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.standard_error == pytest.approx(stats.sem(values))
    assert found.method == metric_interval(values).method == "t"


def test_paired_proportions() -> None:
    """Airway hyper-responsiveness before and after, in Fagerland et al. 2014, Statistics in Medicine 33:2850."""
    found = compare(*paired(1, 1, 7, 12))
    assert (found.only_a, found.only_b) == (1, 7)
    assert found.difference.estimate == pytest.approx(-6 / 21)
    assert (found.difference.low, found.difference.high) == pytest.approx((-0.507, -0.026), abs=5e-4)
    assert found.p_value == pytest.approx(2 * (1 + 8) / 2**8)


def test_mcnemar() -> None:
    assert mcnemar(6, 16) == pytest.approx(2 * sum(math.comb(22, k) for k in range(7)) / 2**22)
    assert mcnemar(5, 5) == mcnemar(0, 0) == 1.0
    assert mcnemar(0, 10) == pytest.approx(2 / 2**10)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.03, math.nan, 0.01, math.nan]) == pytest.approx([0.03, math.nan, 0.02, math.nan], nan_ok=True)


def test_bootstraps_are_those_of_scipy() -> None:
    generator = np.random.default_rng(3)
    a, b = generator.exponential(size=(2, 80))
    found = compare(a, b)
    other = stats.bootstrap((a - b,), np.mean, n_resamples=50_000, method="percentile", rng=generator)
    interval = other.confidence_interval
    assert (found.difference.low, found.difference.high) == pytest.approx((interval.low, interval.high), abs=0.02)
    assert found.difference.standard_error == pytest.approx(other.standard_error, rel=0.05)
    assert found.p_value == pytest.approx(stats.ttest_rel(a, b).pvalue, abs=0.03)

    rows = [tuple(row) for row in generator.integers(0, 2, size=(60, 2)).tolist()]
    whole = metric_interval(rows, f1)

    def vectorised(gold: np.ndarray, predicted: np.ndarray, axis: int) -> np.ndarray:
        return 2 * (gold * predicted).sum(axis) / (gold + predicted).sum(axis)

    other = stats.bootstrap(
        tuple(np.array(rows).T), vectorised, paired=True, n_resamples=20_000, method="percentile", rng=generator
    )
    interval = other.confidence_interval
    assert whole.estimate == pytest.approx(f1(rows))
    assert (whole.low, whole.high) == pytest.approx((interval.low, interval.high), abs=0.02)


def test_metrics_that_are_no_means_are_compared() -> None:
    generator = np.random.default_rng(0)
    gold = generator.integers(0, 2, size=300)
    good, bad = (np.where(generator.random(300) < right, gold, 1 - gold) for right in (0.9, 0.7))
    a, b = ([*zip(gold.tolist(), predicted.tolist(), strict=True)] for predicted in (good, bad))
    found = compare(a, b, f1)
    assert found.difference.estimate == pytest.approx(f1(a) - f1(b))
    assert found.difference.low < found.difference.estimate < found.difference.high
    assert found.p_value == pytest.approx(2 / (NUM_RESAMPLES + 1))
    mirrored = compare(b, a, f1)
    assert mirrored.difference.estimate == -found.difference.estimate
    assert mirrored.difference.low == pytest.approx(-found.difference.high)
    assert mirrored.p_value == found.p_value
    assert compare(a, a, f1).p_value == 1.0


# -- coverage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chance", "rows"), [(0.9, 40), (0.5, 100), (0.03, 200)])
def test_an_accuracy_is_covered(chance: float, rows: int) -> None:
    counts = np.random.default_rng(1).binomial(rows, chance, size=2000)
    intervals = {k: metric_interval([1] * k + [0] * (rows - k)) for k in set(counts.tolist())}
    covered = np.mean([intervals[k].low <= chance <= intervals[k].high for k in counts.tolist()])
    assert 0.93 < covered < 0.98, covered


@pytest.mark.parametrize(("chances", "rows"), [((0.6, 0.15, 0.05, 0.2), 80), ((0.85, 0.05, 0.05, 0.05), 60)])
def test_a_paired_difference_is_covered(chances: tuple[float, ...], rows: int) -> None:
    tables = np.random.default_rng(2).multinomial(rows, chances, size=600).tolist()
    found = [compare(*paired(*table)) for table in tables]
    true = chances[1] - chances[2]
    covered = np.mean([one.difference.low <= true <= one.difference.high for one in found])
    assert 0.92 < covered < 0.985, covered
    if true == 0:
        assert np.mean([one.p_value <= 0.05 for one in found]) <= 0.05  # exact: never above the level, often below


@pytest.mark.parametrize("num_draws", [400, pytest.param(800, marks=pytest.mark.long)])
def test_a_mean_and_a_difference_of_means_are_covered(num_draws: int) -> None:
    drawn = np.random.default_rng(7).normal(1.5, 2.0, size=(num_draws, 60))
    for interval in (mean_interval, lambda values: compare(values, np.zeros(60)).difference):
        covered = np.mean([one.low <= 1.5 <= one.high for one in map(interval, drawn)])
        assert 0.92 < covered < 0.98, covered
    null = [compare(values, np.full(60, 1.5)).p_value for values in drawn]
    assert np.mean(np.array(null) <= 0.05) == pytest.approx(0.05, abs=0.03)


# -- properties -------------------------------------------------------------------------------------------------------

NUMBER = st.floats(-1e3, 1e3, allow_subnormal=False)
BINARY_PAIRS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=60)
PAIRS = st.lists(st.tuples(NUMBER, NUMBER), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(st.one_of(BINARY_PAIRS, PAIRS), st.randoms(use_true_random=False))
def test_order_and_side_do_not_matter(pairs: list[tuple[float, float]], chance: object) -> None:
    a, b = zip(*pairs, strict=True)
    found, mirrored = compare(a, b), compare(b, a)
    shuffled = list(pairs)
    chance.shuffle(shuffled)
    again = compare(*zip(*shuffled, strict=True))
    assert (again.p_value, again.only_a) == (found.p_value, found.only_a)
    assert asdict(again.difference) == pytest.approx(asdict(found.difference), nan_ok=True)
    assert 0 <= found.p_value <= 1
    assert mirrored.p_value == found.p_value
    assert (mirrored.only_a, mirrored.only_b) == (found.only_b, found.only_a)
    low, high = found.difference.low, found.difference.high
    assert (mirrored.difference.low, mirrored.difference.high) == pytest.approx((-high, -low), abs=1e-9, nan_ok=True)
    if math.isnan(low):  # all differences are alike
        assert math.isnan(high)
        return
    slack = 1e-9 * max(1.0, abs(low), abs(high))
    assert low - slack <= high
    if found.test == "exact McNemar":
        assert -1 - slack <= low <= found.difference.estimate <= high <= 1 + slack
    elif found.p_value <= 0.04:
        assert not low + slack < 0 < high - slack


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_never_lowers_a_p_value_nor_changes_their_order(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(raw <= one <= 1 for raw, one in zip(p_values, adjusted, strict=True))
    by_raw = [one for _, one in sorted(zip(p_values, adjusted, strict=True))]
    assert by_raw == sorted(by_raw)
    rejected = sum(one <= 0.05 for one in adjusted)
    assert rejected >= sum(raw * len(p_values) <= 0.05 for raw in p_values)  # never less than Bonferroni's


@given(st.lists(st.integers(0, 1), min_size=1, max_size=40))
def test_an_interval_holds_its_estimate(correct: list[int]) -> None:
    found = metric_interval(correct)
    assert 0 <= found.low <= found.estimate + 1e-12
    assert found.estimate - 1e-12 <= found.high <= 1
    assert found.num_rows == len(correct)


# -- choosing α -------------------------------------------------------------------------------------------------------

ALPHAS = [0.0, 0.5, 1.0, 1.5]


def test_the_best_alpha_and_the_smallest_that_is_as_good() -> None:
    metrics, errors = [0.60, 0.71, 0.74, 0.74], [0.02, 0.03, 0.04, 0.01]
    assert choose_alpha(ALPHAS, metrics).alpha == 1.0
    chosen = choose_alpha(ALPHAS, metrics, errors)
    assert (chosen.alpha, chosen.metric, chosen.best, chosen.best_metric) == (0.5, 0.71, 1.0, 0.74)
    assert chosen.threshold == pytest.approx(0.70)
    assert choose_alpha(ALPHAS, metrics, [0.0] * 4).alpha == 1.0


def test_lower_may_be_better_and_order_does_not_matter() -> None:
    perplexities, errors = [9.0, 7.2, 7.0, math.inf], [0.1, 0.3, 0.3, 0.3]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        given_ = [[values[i] for i in order] for values in (ALPHAS, perplexities, errors)]
        assert choose_alpha(*given_[:2], higher_is_better=False).alpha == 1.0
        assert choose_alpha(*given_, higher_is_better=False).alpha == 0.5
    assert choose_alpha([-1.0, 1.0, 0.5], [0.3, 0.3, 0.2]).alpha == -1.0
    assert choose_alpha([0.7], [0.3], [0.1]).alpha == 0.7


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compare([1, 0], [1]), "2 and 1 rows cannot be paired"),
        (lambda: metric_interval([]), "one number for each"),
        (lambda: metric_interval([], f1), "no rows"),
        (lambda: metric_interval([0.5, math.nan]), "row 1 is nan"),
        (lambda: choose_alpha([], []), "no alpha can be chosen"),
        (lambda: choose_alpha([0.0], [math.nan]), "no alpha can be chosen"),
    ],
)
def test_bad_rows(call: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def test_one_row_and_undefined_resamples_have_no_edges() -> None:
    assert mean_interval(np.array([0.5])).low == -math.inf
    found = compare([(1, 1), (0, 1)], [(1, 0), (0, 0)], lambda rows: math.nan if len(set(rows)) == 1 else f1(rows))
    assert math.isnan(found.p_value)
    assert not math.isfinite(found.difference.high)


# -- too little to say anything ---------------------------------------------------------------------------------------


def total(rows: Sequence[float]) -> float:
    """An aggregate of numbers that is no mean to `compare`."""
    return float(np.mean(rows))


@pytest.mark.parametrize("num", [1, 2, 3, 5, 6, 20, 60])
@pytest.mark.parametrize("kind", ["mean", "aggregate", "clustered mean", "clustered aggregate"])
def test_no_p_is_smaller_than_the_rows_allow(kind: str, num: int) -> None:
    """One method is better in each row, or cluster of three: the sign test of them is the most that can be said."""
    if kind.startswith("clustered") and num == 1:
        pytest.skip("one cluster is refused")
    generator = np.random.default_rng(num)
    for spread in (0.0, 0.3):
        each = 2 + spread * generator.random(num)
        clusters = np.repeat(np.arange(num), 3).tolist() if kind.startswith("clustered") else None
        a = (np.repeat(each, 3) if clusters else each).tolist()
        aggregate = total if kind.endswith("aggregate") else None
        found = compare(a, [0.0] * len(a), aggregate, clusters=clusters)
        own = metric_interval(a, aggregate, clusters=clusters)
        assert found.difference.estimate == pytest.approx(own.estimate)
        for interval in (found.difference, own):
            assert not interval.high - interval.low < 1e-12, (spread, interval)
        if spread == 0.0 or aggregate is not None:
            assert found.p_value >= min(1.0, 2 * 0.5**num)
        if num == 1:
            assert (found.p_value, own.low, own.high) == (1.0, -math.inf, math.inf)
            assert math.isnan(own.standard_error)
        if aggregate is not None and num < 6:
            assert (found.difference.low, found.difference.high) == (-math.inf, math.inf)
        if aggregate is not None and num >= 6 and spread:
            assert (found.p_value <= 0.05, found.difference.low > 0) == (True, True)


def test_rows_that_are_alike_but_for_rounding_have_no_standard_error() -> None:
    for value in (0.1, 0.2, 0.7, -3.3):
        for rows in ([value] * 3, [value] * 70, [[value] * 7, [value] * 7]):
            found = metric_interval(rows)
            assert (found.standard_error, math.isnan(found.low), math.isnan(found.high)) == (0.0, True, True)
            num = np.array(rows).shape[-1]
            p_value = compare(rows, np.zeros_like(rows)).p_value
            assert p_value == pytest.approx(2 * 0.5**num if num < 50 else 2 / (NUM_RESAMPLES + 1))
        assert metric_interval([value] * 40, total).standard_error == 0.0


def test_clusters_that_are_all_right_are_not_certain() -> None:
    clusters = [0, 0, 1, 1, 2, 2]
    found = compare([1] * 6, [0] * 6, clusters=clusters).difference
    assert (found.low, found.high) == pytest.approx((1 - wilson(0, 3)[1], 1.0))
    assert compare([0] * 6, [1] * 6, clusters=clusters).difference.low == -1.0


def test_scipy_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib
    import sys

    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    monkeypatch.delitem(sys.modules, "ensembler.evaluation.statistics")
    with pytest.raises(MissingExtraError, match=r"pip install .*\[eval\]"):
        importlib.import_module("ensembler.evaluation.statistics")
