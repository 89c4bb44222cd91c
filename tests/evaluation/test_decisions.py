"""Detectable differences and equivalence: against statsmodels, simulated power and size, and exact corner cases."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest

stats = pytest.importorskip("scipy.stats")
pytest.importorskip("statsmodels")

from statsmodels.stats.power import tt_solve_power  # noqa: E402
from statsmodels.stats.weightstats import ttost_paired  # noqa: E402

from ensembler.errors import ConfigError  # noqa: E402
from ensembler.evaluation.decisions import detectable_by, detectable_effect, equivalence  # noqa: E402
from ensembler.evaluation.statistics import compare, mcnemar  # noqa: E402

p_of = functools.cache(mcnemar)  # drawn tables come again and again


def paired(only_a: int, only_b: int, rows: int) -> tuple[list[int], list[int]]:
    alike = [1] * (rows - only_a - only_b)
    return [1] * only_a + [0] * only_b + alike, [0] * only_a + [1] * only_b + alike


def power_of_mcnemar(rows: int, disagreement: float, difference: float, level: float = 0.05) -> float:
    """Return the share of 20 000 drawn tables that McNemar's exact test finds significant."""
    chances = (disagreement + difference) / 2, (disagreement - difference) / 2, 1 - disagreement
    tables, counts = np.unique(
        np.random.default_rng(0).multinomial(rows, chances, size=20_000), axis=0, return_counts=True
    )
    found = [p_of(int(only_a), int(only_b)) <= level for only_a, only_b, _ in tables]
    return float(np.average(found, weights=counts))


# -- the smallest difference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "disagreement"), [(100, 0.1), (100, 0.3), (500, 0.05), (1000, 0.2), (2000, 0.02)])
@pytest.mark.parametrize("power", [0.8, 0.9])
def test_planned_differences_are_shown_as_often_as_promised(rows: int, disagreement: float, power: float) -> None:
    found = detectable_by(rows, disagreement, power=power)
    assert power_of_mcnemar(rows, disagreement, found) == pytest.approx(power, abs=0.01)
    corrected = detectable_by(rows, disagreement, level=0.01, power=power)
    assert corrected > found
    if corrected < math.inf:
        assert power_of_mcnemar(rows, disagreement, corrected, 0.01) == pytest.approx(power, abs=0.01)


def test_of_many_rows_it_is_that_of_the_normal_formula() -> None:
    effect = tt_solve_power(nobs=20_000, alpha=0.05, power=0.8)
    for disagreement in (0.1, 0.4):
        expected = effect * math.sqrt(disagreement / (1 + effect**2))  # δ = effect · √(d − δ²)
        assert detectable_by(20_000, disagreement) == pytest.approx(expected, rel=0.01)


def test_differences_that_no_rows_show() -> None:
    assert detectable_by(5, 1.0) == detectable_by(100, 0.0) == detectable_by(100, 0.05) == math.inf
    assert detectable_effect(compare(*paired(0, 0, 5))) == math.inf
    for rows in (6, 20, 300):  # six rows in favour of one method are significant, five are not
        found = detectable_effect(compare(*paired(0, 0, rows)))
        assert stats.binom.sf(5, rows, found) == pytest.approx(0.8)
    assert detectable_effect(compare(*paired(1, 0, 300))) == pytest.approx(found)


@pytest.mark.parametrize(("rows", "disagreement"), [(100, 0.3), (200, 0.2), (500, 0.1), (1000, 0.03)])
def test_few_rows_that_disagree_do_not_promise_too_much(rows: int, disagreement: float) -> None:
    """Whatever number of rows chance makes disagree: the difference that is named is shown as often as it is said."""
    drawn = np.random.default_rng(10).binomial(rows, disagreement, size=2000)
    counts, times = np.unique(drawn, return_counts=True)
    named = [detectable_effect(compare(*paired(num // 2, num - num // 2, rows))) for num in counts.tolist()]
    kept = [power_of_mcnemar(rows, max(disagreement, size), size) >= 0.79 for size in named]
    assert np.average(kept, weights=times) > 0.95
    many = detectable_effect(compare(*paired(1000, 1000, 20_000)))
    assert many == pytest.approx(detectable_by(20_000, 0.1), rel=0.05)


def test_other_numbers_are_those_of_a_t_test() -> None:
    generator = np.random.default_rng(2)
    for _ in range(30):
        rows, level, power = (
            int(generator.integers(10, 400)),
            generator.uniform(0.01, 0.1),
            generator.uniform(0.5, 0.95),
        )
        a, b = generator.normal(size=(2, rows))
        compared = compare(a, b)
        effect = tt_solve_power(nobs=rows, alpha=level, power=power) * math.sqrt(rows)
        found = detectable_effect(compared, level=level, power=power)
        assert found == pytest.approx(compared.difference.standard_error * effect, rel=2e-3)


@pytest.mark.parametrize(("num_clusters", "level"), [(2, 0.05), (2, 0.001), (4, 0.05), (10, 0.01)])
def test_few_clusters(num_clusters: int, level: float) -> None:
    generator = np.random.default_rng(3)
    labels = np.arange(5 * num_clusters) % num_clusters
    compared = compare(*generator.normal(size=(2, len(labels))), clusters=labels)
    effect = detectable_effect(compared, level=level) / compared.difference.standard_error
    degrees = num_clusters - 1
    t = (effect + generator.normal(size=200_000)) / np.sqrt(generator.chisquare(degrees, size=200_000) / degrees)
    assert np.mean(np.abs(t) > stats.t.isf(level / 2, degrees)) == pytest.approx(0.8, abs=0.005)


def test_seeds_and_no_standard_error() -> None:
    generator = np.random.default_rng(4)
    a, b = generator.normal(size=(2, 3, 50)) + generator.normal(size=(2, 3, 1))
    seeded = compare(a, b)
    assert detectable_effect(seeded) > 3 * seeded.difference.standard_error  # two to four degrees of freedom
    assert math.isnan(detectable_effect(compare([0.5, 0.25], [0.5, 0.25])))
    assert detectable_effect(compare([0.5], [0.25])) == math.inf
    assert math.isnan(detectable_effect(compare([1, 0], [1, 0], clusters="ab")))


# -- equivalence ------------------------------------------------------------------------------------------------------


def test_means_are_those_of_statsmodels() -> None:
    generator = np.random.default_rng(5)
    for _ in range(50):
        rows, margin = int(generator.integers(3, 80)), generator.uniform(0.05, 2)
        a, b = generator.normal(size=(2, rows))
        assert equivalence(a, b, margin) == pytest.approx(ttost_paired(a, b, -margin, margin)[0])
        assert equivalence(b, a, margin) == pytest.approx(equivalence(a, b, margin, clusters=range(rows)))


def test_right_or_wrong_is_the_score_test() -> None:
    """The most likely rates with a difference of the margin, searched for on a grid, give the same p."""
    generator = np.random.default_rng(6)
    for _ in range(30):
        rows, margin = int(generator.integers(60, 400)), generator.uniform(0.05, 0.3)
        only_a, only_b = generator.integers(0, 20, size=2).tolist()
        expected = (1 - margin) ** rows
        for better, worse in ((only_a, only_b), (only_b, only_a)):
            rates = np.linspace(1e-9, (1 - margin) / 2 - 1e-9, 200_001)
            rest = (rows - better - worse) * np.log(1 - margin - 2 * rates)
            rate = rates[np.argmax(better * np.log(rates + margin) + worse * np.log(rates) + rest)]
            error = math.sqrt((2 * rate + margin - margin**2) / rows)
            expected = max(expected, stats.norm.cdf(((better - worse) / rows - margin) / error))
        assert equivalence(*paired(only_a, only_b, rows), margin) == pytest.approx(expected, rel=1e-3)
    a, b = paired(200, 190, 4000)
    assert equivalence(a, b, 0.012) == pytest.approx(ttost_paired(np.array(a), np.array(b), -0.012, 0.012)[0], rel=0.1)


@pytest.mark.parametrize(("rows", "margin"), [(30, 0.1), (100, 0.05), (200, 0.05), (500, 0.02), (1000, 0.02)])
@pytest.mark.parametrize("more", [0.0, 0.02])
def test_methods_that_differ_by_the_margin_are_seldom_found_alike(rows: int, margin: float, more: float) -> None:
    drawn = np.random.default_rng(7).multinomial(rows, [margin + more, more, 1 - margin - 2 * more], size=4000)
    tables, counts = np.unique(drawn, axis=0, return_counts=True)
    found = [equivalence(*paired(int(only_a), int(only_b), rows), margin) <= 0.05 for only_a, only_b, _ in tables]
    assert np.average(found, weights=counts) < 0.06


def test_rows_that_do_not_differ() -> None:
    assert equivalence(*paired(0, 0, 10), 0.1) == pytest.approx(0.9**10)
    assert equivalence(*paired(0, 0, 1), 0.1) == pytest.approx(0.9)
    assert equivalence(*paired(0, 0, 12), 0.1, clusters="aaabbbcccddd") == pytest.approx(0.9**4)
    assert equivalence([0.5, 0.25], [0.5, 0.25], 0.1) == pytest.approx(0.81)
    assert math.isnan(equivalence([-3.0, -4.0], [-3.0, -4.0], 0.1))
    assert math.isnan(equivalence([0, 1, 1], [0, 1, 1], 0.1, np.mean, num_resamples=50))
    assert equivalence([0.5, 0.6, 0.7], [0.5, 0.61, 0.7], 0.3, np.mean) == 0.125  # three rows say no more
    assert detectable_effect(compare([0.5, 0.6, 0.7], [0.5, 0.61, 0.7], np.mean)) == math.inf
    assert detectable_effect(compare([0.5] * 7 + [1], [0.3] * 8, np.mean)) < math.inf
    assert equivalence([1] * 12, [0] * 12, 0.1, clusters="aaabbbcccddd") == 1.0
    assert equivalence([5.0, 6.0], [3.0, 4.0], 1.0) == 1.0


def test_clusters_and_aggregates() -> None:
    generator = np.random.default_rng(8)
    labels = np.repeat(np.arange(30), 4)
    a = generator.normal(size=30)[labels] + 0.5 * generator.normal(size=120)
    b = 0.5 * generator.normal(size=120)
    compared = compare(a, b, clusters=labels).difference
    t = (1.0 - abs(compared.estimate)) / compared.standard_error
    assert equivalence(a, b, 1.0, clusters=labels) == pytest.approx(stats.t.sf(t, 29))
    assert equivalence(a, b, 1.0, clusters=labels) > equivalence(a, b, 1.0)

    for clusters in (None, labels):
        interval = compare(a, b, clusters=clusters).difference
        margin = abs(interval.estimate) + 1.645 * interval.standard_error
        drawn = equivalence(a, b, margin, np.mean, clusters=clusters, num_resamples=2000)
        assert drawn == pytest.approx(0.05, abs=0.02)
    assert equivalence(a, b, 50.0, np.mean, num_resamples=99) == pytest.approx(1 / 100)
    assert equivalence(a, b, 1e-9, np.mean, num_resamples=99) > 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: equivalence([1], [1, 0], 0.1), "1 and 2 rows cannot be paired"),
        (lambda: equivalence([1], [1], 0.0), "margin of 0.0"),
        (lambda: equivalence([1], [1], math.nan), "margin of nan"),
        (lambda: equivalence([1, 0], [1, 1], 1), "0.01 is one percent"),
        (lambda: equivalence([1, 0], [1, 1], 0.1, clusters="aa"), "one cluster"),
        (lambda: detectable_by(0, 0.1), "0 rows that disagree on 0.1"),
        (lambda: detectable_by(10, 1.1), "disagree on 1.1"),
        (lambda: detectable_by(10, 0.1, power=1.0), "power of 1.0"),
    ],
)
def test_bad_numbers(call: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()
