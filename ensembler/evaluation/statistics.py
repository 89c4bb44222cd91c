"""Estimate a metric from the rows of a test set: intervals, paired differences, tests, the choice of α.

Numbers in, numbers out: nothing here knows of models or tasks. A row is what a metric found for one example: 0 or 1
(accuracy), a number (a log-prob), or whatever an `aggregate` makes one number of (F1 of pairs). Numbers may be of
several seeds of training, (seeds, rows): intervals and tests then cover other seeds and other examples. All intervals
are of LEVEL; drawing is seeded, so the same rows give the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ensembler.errors import ConfigError
from ensembler.evaluation.resampling import (
    NUM_RESAMPLES,
    Aggregate,
    Groups,
    Numbers,
    Rows,
    num_units,
    number_clusters,
    resampled_aggregates,
    resampled_means,
    spread,
    standard_error,
)
from ensembler.extras import require

stats: Any = require("scipy.stats", "eval")

LEVEL = 0.95
_FEW = 50  # rows, below which the percentile bootstrap of a mean is too sure of itself


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval.

    `method` is 'Wilson', 't', 'bootstrap' or 'Newcombe'; of rows in clusters 'clustered t' or 'clustered bootstrap', of
    several seeds 'seeds × documents' or 'seeds × clusters'. The edges are infinite where there are too few rows for
    any, and NaN where the rows show no spread. `standard_error`: of a mean that of lm-eval, s / √n; NaN where one row
    is all there is. `degrees_of_freedom`: of Student's t; of a clustered bootstrap clusters − 1.
    """

    estimate: float
    low: float
    high: float
    standard_error: float
    num_rows: int
    method: str
    degrees_of_freedom: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Two methods on the same rows: metric(a) − metric(b), and p of 'the two are alike', two-sided.

    `test` is 'exact McNemar', 'paired bootstrap' or 'paired t'; of clusters 'clustered paired bootstrap' or 'clustered
    paired t', of seeds 'seeds × documents t' or 'seeds × clusters t'. Of McNemar's test, `only_a` and `only_b` count
    the rows that one of the two alone has right.
    """

    difference: Interval
    p_value: float
    test: str
    only_a: int | None = None
    only_b: int | None = None


@dataclass(frozen=True)
class Selection:
    """The α that was chosen, and its metric; `best` is the α whose metric is the best of the grid.

    `threshold` is the metric that was enough: that of `best`, less one standard error where that rule was used.
    """

    alpha: float
    metric: float
    best: float
    best_metric: float
    threshold: float


def metric_interval(
    rows: Rows,
    aggregate: Aggregate | None = None,
    *,
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval:
    """Return the metric with its interval: Wilson's for rows of 0 and 1, Student's t for other numbers.

    With an `aggregate`, its percentile bootstrap of `num_resamples`. `clusters` labels each row: rows of a cluster are
    not independent, so the standard error is cluster-robust, with t of clusters − 1 degrees of freedom, and a bootstrap
    draws clusters. Where all rows are 0, or all 1, the interval is Wilson's of as many rows as there are clusters. A
    bootstrap of fewer than six rows, or clusters, bounds nothing.

    Of two or three seeds that differ much the interval is somewhat too narrow: it covers about 90 % where the rows'
    share of the variance is small. Raises ConfigError for no rows, rows that are no finite numbers, or fewer than two
    clusters.
    """
    if aggregate is not None:
        groups = number_clusters(clusters, len(rows))
        (estimate,), (found,) = resampled_aggregates(aggregate, [rows], seed, num_resamples, groups)
        return _percentiles(float(estimate), found, len(rows), groups)
    table = row_numbers(rows)
    groups = number_clusters(clusters, table.shape[1])
    if seeds_matter(table):
        interval = crossed_interval(table, groups)
        return _within_unit(interval) if is_binary(table) else interval
    values = table.mean(axis=0)
    interval = mean_interval(values, groups)
    if not is_binary(values):
        return interval
    if groups is None:
        low, high = wilson(int(values.sum()), len(values))
        return replace(interval, low=low, high=high, method="Wilson", degrees_of_freedom=None)
    if values.min() < values.max():
        return _within_unit(interval)
    num = num_units(len(values), groups)
    low, high = wilson(num * int(values[0]), num)
    return replace(interval, low=low, high=high)


def mean_interval(values: Numbers, groups: Groups | None = None) -> Interval:
    """Return the mean of `values` (n,) with the interval by Student's t, over clusters that `groups` (n,) numbers.

    t and not the bootstrap: of many rows the two agree, of few the percentile bootstrap of a mean is too narrow. One
    row leaves the interval unbounded.
    """
    method, degrees = ("t", len(values) - 1) if groups is None else ("clustered t", int(groups.max()))
    return _t_interval(float(values.mean()), standard_error(values, groups), degrees, len(values), method)


def crossed_interval(table: Numbers, groups: Groups | None) -> Interval:
    """Return the mean of `table` (seeds, rows); degrees of freedom by Satterthwaite 1946, Biometrics Bulletin 2:110.

    The three terms are the mean squares of rows, seeds and rest, each divided by the number of values. With clusters,
    the first is the cluster-robust variance of the rows' means.
    """
    num_seeds, num_rows = table.shape
    num = num_units(num_rows, groups)
    mean, by_row, by_seed = table.mean(), table.mean(axis=0), table.mean(axis=1)
    residuals = table - by_row - by_seed[:, None] + mean
    rest = float((residuals**2).sum()) / ((num_rows - 1) * (num_seeds - 1)) / table.size
    seeds = float(by_seed.var(ddof=1)) / num_seeds
    rows = max(standard_error(by_row, groups) ** 2, rest)
    variance = rows + max(seeds - rest, 0.0)
    free = num - 1, num_seeds - 1, (num - 1) * (num_seeds - 1)
    total = sum(term**2 / degrees for term, degrees in zip((rows, seeds, rest), free, strict=True))
    degrees = variance**2 / total if total else 0.0
    method = "seeds × documents" if groups is None else "seeds × clusters"
    return _t_interval(float(mean), variance**0.5, max(degrees, min(free)), num_rows, method)


def seeds_matter(table: Numbers) -> bool:
    """Return whether `table` (seeds, rows) has several seeds and rows, and values that differ."""
    return 1 not in table.shape and table.min() < table.max()


def _t_interval(mean: float, error: float, degrees: float, num_rows: int, method: str) -> Interval:
    """Return the interval of a mean by Student's t of `degrees` of freedom: unbounded for 0, NaN for no error."""
    reach = float(stats.t.ppf((1 + LEVEL) / 2, degrees)) * (error or math.nan) if degrees > 0 else math.inf
    return Interval(mean, mean - reach, mean + reach, error, num_rows, method, degrees)


def _t_p_value(interval: Interval) -> float:
    """Return the two-sided p of 'the mean is 0' of an interval by t; of a standard error of 0 that of the sign test."""
    degrees = interval.degrees_of_freedom or 0.0
    if interval.standard_error > 0:
        return float(2 * stats.t.sf(abs(interval.estimate) / interval.standard_error, degrees))
    return least_p(degrees + 1) if interval.estimate else 1.0


def least_p(num_units: float) -> float:
    """Return the two-sided p of the sign test where all of `num_units` rows, or clusters, favour one method.

    Rows that are all there is can say no more: one gives p = 1, and fewer than six never one of 5 %.
    """
    return min(1.0, 2 * math.pow(0.5, num_units))


def wilson(num_right: int, num_rows: int) -> tuple[float, float]:
    """Return the limits of a share by Wilson 1927, JASA 22:209."""
    found = stats.binomtest(num_right, num_rows).proportion_ci(LEVEL, method="wilson")
    return float(found.low), float(found.high)


def _within_unit(interval: Interval) -> Interval:
    """Return an interval of a share, cut to 0 and 1."""
    return replace(interval, low=max(0.0, interval.low), high=min(1.0, interval.high))


def compare(
    a: Rows,
    b: Rows,
    aggregate: Aggregate | None = None,
    *,
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> Comparison:
    """Return metric(a) − metric(b) with interval and p; row i of `a` and of `b` belongs to the same example.

    A method without training has one seed, which is compared with every seed of the other.

    Rows of 0 and 1: exact McNemar test, and Newcombe's interval. Other numbers: paired bootstrap, below 50 rows the
    paired t test instead, since there the bootstrap finds too much. An `aggregate`: paired bootstrap. With `clusters`
    (see `metric_interval`): t on the cluster-robust standard error of the paired differences, or the paired bootstrap
    over clusters; the other tests need independent rows. Raises ConfigError for no rows, unequal numbers of them or of
    seeds, rows that are no finite numbers, or fewer than two clusters.
    """
    if aggregate is not None:
        check_paired(a, b)
        groups = number_clusters(clusters, len(a))
        (of_a, of_b), found = resampled_aggregates(aggregate, [a, b], seed, num_resamples, groups)
        return _compared(float(of_a - of_b), found[0] - found[1], len(a), groups)
    x, y = paired_numbers(a, b)
    groups = number_clusters(clusters, x.shape[1])
    if seeds_matter(x - y):
        interval = crossed_interval(x - y, groups)
        return Comparison(interval, _t_p_value(interval), f"{interval.method} t")
    x, y = x.mean(axis=0), y.mean(axis=0)
    if groups is not None:
        interval = mean_interval(x - y, groups)
        if is_binary(x) and is_binary(y) and not np.ptp(x - y):  # Wilson's limit of a share of clusters that differ
            reach, mean = wilson(0, num_units(len(x), groups))[1], interval.estimate
            interval = replace(interval, low=max(-1.0, mean - reach), high=min(1.0, mean + reach))
        return Comparison(interval, _t_p_value(interval), "clustered paired t")
    return _paired_binary(x, y) if is_binary(x) and is_binary(y) else _paired_means(x - y, seed, num_resamples)


def check_paired(a: Rows, b: Rows) -> None:
    """Raise ConfigError unless both methods have as many rows."""
    if len(a) != len(b):
        raise ConfigError(f"methods with {len(a)} and {len(b)} rows cannot be paired; give both on the same examples")


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the two-sided p of the exact test of McNemar (1947), from the rows that one method alone has right."""
    discordant = only_a + only_b
    return float(stats.binomtest(only_a, discordant, 0.5).pvalue) if discordant else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p values of several comparisons, corrected by Holm's step-down procedure (Holm 1979), in their order.

    Those of at most 0.05 are significant with a family-wise error of 5 %. NaN stays NaN: what could not be tested is
    none of the comparisons.
    """
    known = np.array(p_values, dtype=np.float64)
    order = known.argsort()[: np.isfinite(known).sum()]  # NaN comes last
    adjusted = np.full(len(known), math.nan)
    adjusted[order] = np.maximum.accumulate(np.arange(len(order), 0, -1) * known[order]).clip(max=1.0)
    return adjusted.tolist()


def choose_alpha(
    alphas: Sequence[float],
    metrics: Sequence[float],
    standard_errors: Sequence[float] | None = None,
    *,
    higher_is_better: bool = True,
) -> Selection:
    """Return the best α; with `standard_errors`, by the one-standard-error rule (Breiman et al. 1984).

    That is the α nearest to 0, and so to the anchor, whose metric is within one standard error of the best. Of equal
    metrics the α nearest to 0 is the best. Raises ConfigError for an empty grid, or a metric or standard error that is
    NaN: of one row there is none.
    """
    if any(math.isnan(error) for error in standard_errors or ()):
        raise ConfigError("one row, or infinite values, have no standard error; do without the one-standard-error rule")
    if not alphas or any(math.isnan(metric) for metric in metrics):
        raise ConfigError(f"no alpha can be chosen of {len(alphas)} with the metrics {list(metrics)}; expected numbers")
    sign = 1.0 if higher_is_better else -1.0
    by_distance = sorted(range(len(alphas)), key=lambda index: (abs(alphas[index]), alphas[index]))
    best = max(by_distance, key=lambda index: sign * metrics[index])  # the first of equals
    threshold = metrics[best] - (0.0 if standard_errors is None else sign * standard_errors[best])
    chosen = next(index for index in by_distance if sign * metrics[index] >= sign * threshold)
    return Selection(*map(float, (alphas[chosen], metrics[chosen], alphas[best], metrics[best], threshold)))


def is_binary(values: Numbers) -> bool:
    """Return whether all numbers are 0 or 1."""
    return bool(((values == 0) | (values == 1)).all())


def row_numbers(values: Any) -> Numbers:
    """Return rows as an array (seeds, n). Raises ConfigError for none, or for one that is no finite number."""
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim not in (1, 2) or not numbers.size:
        raise ConfigError(f"rows of shape {numbers.shape}; expected one number for each of one row or more, and seed")
    numbers = numbers.reshape(-1, numbers.shape[-1])
    for seed, index in np.argwhere(~np.isfinite(numbers)):
        raise ConfigError(f"row {index} is {numbers[seed, index]}; expected a finite number")
    return numbers


def paired_numbers(a: Any, b: Any) -> tuple[Numbers, Numbers]:
    """Return the rows of two methods, as many of both (seeds, n), or of one seed of either (1, n)."""
    x, y = row_numbers(a), row_numbers(b)
    check_paired(x[0], y[0])
    if len(x) != len(y) and 1 not in (len(x), len(y)):
        raise ConfigError(f"methods with {len(x)} and {len(y)} seeds; expected as many of both, or one of either")
    return x, y


def _paired_binary(a: Numbers, b: Numbers) -> Comparison:
    """With Newcombe's interval (1998, Statistics in Medicine 17:2635, method 10): Wilson's of both, correlated."""
    both, only_a, only_b = int((a * b).sum()), int((a * (1 - b)).sum()), int(((1 - a) * b).sum())
    n, neither = len(a), len(a) - both - only_a - only_b
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    covariance = float(both * neither - only_a * only_b)
    covariance = max(covariance - n / 2, 0.0) if covariance > 0 else covariance
    phi = covariance / math.sqrt(margins) if margins else 0.0
    (p, low_a, high_a), (q, low_b, high_b) = ((float(x.mean()), *wilson(int(x.sum()), n)) for x in (a, b))

    def reach(down: float, up: float) -> float:
        return math.sqrt(max(down**2 - 2 * phi * down * up + up**2, 0.0))

    low, high = p - q - reach(p - low_a, high_b - q), p - q + reach(high_a - p, q - low_b)
    difference = Interval(p - q, low, high, standard_error(a - b), n, "Newcombe")
    return Comparison(difference, mcnemar(only_a, only_b), "exact McNemar", only_a, only_b)


def _paired_means(differences: Numbers, seed: int, num_resamples: int) -> Comparison:
    """Rows are put in an order and a sign of their own: neither their order nor which method is `a` changes a digit.

    Of differences that are all alike t is undefined: then p is that of the sign test, and 1 where they are 0.
    """
    ordered, mirrored = np.sort(differences), np.sort(-differences)
    sign, values = (1.0, ordered) if ordered.tolist() >= mirrored.tolist() else (-1.0, mirrored)
    mean = sign * float(values.mean())
    if len(values) >= _FEW:
        return _compared(mean, sign * resampled_means(values, seed, num_resamples), len(values))
    interval = _t_interval(mean, standard_error(values), len(values) - 1, len(values), "t")
    p_value = stats.ttest_1samp(values, 0.0).pvalue if interval.standard_error > 0 else _t_p_value(interval)
    return Comparison(interval, float(p_value), "paired t")


def _compared(difference: float, found: Numbers, num_rows: int, groups: Groups | None = None) -> Comparison:
    """p is the level at which the percentile interval begins to hold 0, so that the two never disagree.

    It is at least that of the sign test: resamples of few rows are alike, however many are drawn.
    """
    beyond = min(int((found <= 0).sum()), int((found >= 0).sum()))
    p_value = max(min(1.0, 2 * (beyond + 1) / (len(found) + 1)), least_p(num_units(num_rows, groups)))
    p_value = p_value if np.isfinite(found).all() else math.nan
    test = "paired bootstrap" if groups is None else "clustered paired bootstrap"
    return Comparison(_percentiles(difference, found, num_rows, groups), p_value, test)


def _percentiles(estimate: float, found: Numbers, num_rows: int, groups: Groups | None) -> Interval:
    """NaN edges where a resample gave no finite number, or all gave one number."""
    method, degrees = ("bootstrap", None) if groups is None else ("clustered bootstrap", int(groups.max()))
    units = num_units(num_rows, groups)
    error = spread(found) if units > 1 else math.nan
    low, high = math.nan, math.nan
    if least_p(units) > 1 - LEVEL and np.isfinite(found).all():
        low, high = -math.inf, math.inf
    elif error > 0:
        low, high = (float(edge) for edge in np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    return Interval(estimate, low, high, error, num_rows, method, degrees)
