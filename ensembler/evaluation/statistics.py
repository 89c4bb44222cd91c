"""What can be said of a metric from the rows of a test set: intervals, paired differences, tests, the choice of α.

Numbers in, numbers out: nothing here knows of models or tasks. A row is what a metric found for one example: 0 or 1
(accuracy), a number (a log-prob), or whatever an `aggregate` makes one number of (F1 of pairs). All intervals are of
LEVEL; drawing is seeded, so the same rows give the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ensembler.errors import ConfigError
from ensembler.evaluation.bootstrap import (
    NUM_RESAMPLES,
    Aggregate,
    Numbers,
    Rows,
    resampled_aggregates,
    resampled_means,
)
from ensembler.extras import require

stats: Any = require("scipy.stats", "eval")

LEVEL = 0.95
WILSON, NEWCOMBE = "Wilson", "Newcombe"
_FEW = 50  # rows, below which the percentile bootstrap of a mean is too sure of itself


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval. `method` is 'Wilson', 't', 'bootstrap' or 'Newcombe'.

    `standard_error`: of a mean that of lm-eval, s / √n; NaN where one row is all there is.
    """

    estimate: float
    low: float
    high: float
    standard_error: float
    num_rows: int
    method: str

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON, where None is a number that is not finite."""
        return _finite(asdict(self))


@dataclass(frozen=True)
class Comparison:
    """Two methods on the same rows: metric(a) − metric(b), and p of 'the two are alike', two-sided.

    `test` is 'exact McNemar', 'paired bootstrap' or 'paired t'. Of McNemar's test, `only_a` and `only_b` count the rows
    that one of the two alone has right.
    """

    difference: Interval
    p_value: float
    test: str
    only_a: int | None = None
    only_b: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return {**_finite(asdict(self)), "difference": self.difference.to_dict()}


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

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return _finite(asdict(self))


def metric_interval(
    rows: Rows, aggregate: Aggregate | None = None, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> Interval:
    """Return the metric with its interval: Wilson's for rows of 0 and 1, Student's t for other numbers.

    With an `aggregate`, its percentile bootstrap of `num_resamples`.

    Raises ConfigError for no rows, or rows that are no finite numbers.
    """
    if aggregate is not None:
        return bootstrap_interval(rows, aggregate, seed=seed, num_resamples=num_resamples)
    values = _numbers(rows)
    return accuracy_interval(values) if _is_binary(values) else mean_interval(values)


def accuracy_interval(correct: ArrayLike) -> Interval:
    """Return the fraction of ones in `correct` (n,), 0 or 1, with Wilson's score interval (Wilson 1927)."""
    values = _numbers(correct)
    if not _is_binary(values):
        raise ConfigError("an accuracy was asked for of rows that are not all 0 or 1; use mean_interval")
    return Interval(float(values.mean()), *_wilson(values), _standard_error(values), len(values), WILSON)


def mean_interval(values: ArrayLike) -> Interval:
    """Return the mean of `values` (n,) with the interval by Student's t.

    t and not the bootstrap: of many rows the two agree, of few the percentile bootstrap of a mean is too narrow. One
    row leaves the interval unbounded.
    """
    values = _numbers(values)
    mean, error = float(values.mean()), _standard_error(values)
    reach = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * error if len(values) > 1 else math.inf
    return Interval(mean, mean - reach, mean + reach, error, len(values), "t")


def bootstrap_interval(
    rows: Rows, aggregate: Aggregate, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> Interval:
    """Return aggregate(rows) with its percentile bootstrap interval. Raises ConfigError for no rows."""
    estimate, found = resampled_aggregates(aggregate, [rows], seed, num_resamples)
    return _percentiles(float(estimate[0]), found[0], len(rows))


def compare(
    a: Rows, b: Rows, aggregate: Aggregate | None = None, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> Comparison:
    """Return metric(a) − metric(b) with interval and p; row i of `a` and of `b` belongs to the same example.

    Rows of 0 and 1: exact McNemar test, and Newcombe's interval. Other numbers: paired bootstrap, below 50 rows the
    paired t test instead, since there the bootstrap finds too much. An `aggregate`: paired bootstrap of
    `num_resamples`. Raises ConfigError for no rows, unequal numbers of them, or rows that are no finite numbers.
    """
    if len(a) != len(b):
        raise ConfigError(f"methods with {len(a)} and {len(b)} rows cannot be paired; give both on the same examples")
    if aggregate is not None:
        (of_a, of_b), found = resampled_aggregates(aggregate, [a, b], seed, num_resamples)
        return _compared(float(of_a - of_b), found[0] - found[1], len(a))
    x, y = _numbers(a), _numbers(b)
    return _paired_binary(x, y) if _is_binary(x) and _is_binary(y) else _paired_means(x - y, seed)


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the two-sided p of the exact test of McNemar (1947), from the rows that one method alone has right."""
    discordant = only_a + only_b
    return float(stats.binomtest(only_a, discordant, 0.5).pvalue) if discordant else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p values of several comparisons, corrected by Holm's step-down procedure (Holm 1979), in their order.

    Those of at most 0.05 are significant with a family-wise error of 5 %. NaN, an undefined p, counts as 1.
    """
    known = [1.0 if math.isnan(p_value) else p_value for p_value in p_values]
    adjusted, largest = [0.0] * len(known), 0.0
    for place, index in enumerate(sorted(range(len(known)), key=known.__getitem__)):
        largest = max(largest, min(1.0, (len(known) - place) * known[index]))
        adjusted[index] = largest
    return adjusted


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
        raise ConfigError("the metric has no standard error on so few rows; choose without the one-standard-error rule")
    if not alphas or any(math.isnan(metric) for metric in metrics):
        raise ConfigError(f"no alpha can be chosen of {len(alphas)} with the metrics {list(metrics)}; expected numbers")
    sign = 1.0 if higher_is_better else -1.0
    by_distance = sorted(range(len(alphas)), key=lambda index: (abs(alphas[index]), alphas[index]))
    best = max(by_distance, key=lambda index: sign * metrics[index])  # the first of equals
    threshold = metrics[best] - (0.0 if standard_errors is None else sign * standard_errors[best])
    chosen = next(index for index in by_distance if sign * metrics[index] >= sign * threshold)
    return Selection(*map(float, (alphas[chosen], metrics[chosen], alphas[best], metrics[best], threshold)))


def _paired_binary(a: Numbers, b: Numbers) -> Comparison:
    """With Newcombe's interval (1998, Statistics in Medicine 17:2635, method 10): Wilson's of both, correlated."""
    both, only_a, only_b = int((a * b).sum()), int((a * (1 - b)).sum()), int(((1 - a) * b).sum())
    n, neither = len(a), len(a) - both - only_a - only_b
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    covariance = float(both * neither - only_a * only_b)
    covariance = max(covariance - n / 2, 0.0) if covariance > 0 else covariance
    phi = covariance / math.sqrt(margins) if margins else 0.0
    (p, low_a, high_a), (q, low_b, high_b) = ((float(x.mean()), *_wilson(x)) for x in (a, b))

    def reach(down: float, up: float) -> float:
        return math.sqrt(max(down**2 - 2 * phi * down * up + up**2, 0.0))

    low, high = p - q - reach(p - low_a, high_b - q), p - q + reach(high_a - p, q - low_b)
    difference = Interval(p - q, low, high, _standard_error(a - b), n, NEWCOMBE)
    return Comparison(difference, mcnemar(only_a, only_b), "exact McNemar", only_a, only_b)


def _paired_means(differences: Numbers, seed: int) -> Comparison:
    """Rows are put in an order and a sign of their own: neither their order nor which method is `a` changes a digit."""
    ordered, mirrored = np.sort(differences), np.sort(-differences)
    sign = 1.0 if ordered.tolist() >= mirrored.tolist() else -1.0
    values = ordered if sign > 0 else mirrored
    if len(values) < _FEW:
        return _paired_t(values, sign)
    return _compared(sign * float(values.mean()), sign * resampled_means(values, seed), len(values))


def _paired_t(values: Numbers, sign: float) -> Comparison:
    """Of differences that are all alike t is undefined: then p is that of the sign test, and 1 where they are 0."""
    interval = mean_interval(values)
    if len(values) > 1 and interval.standard_error > 0:
        p_value = float(stats.ttest_1samp(values, 0.0).pvalue)
    else:
        p_value = min(1.0, 2 * 0.5 ** len(values)) if values.any() else 1.0
    low, high = sorted((sign * interval.low, sign * interval.high))
    return Comparison(replace(interval, estimate=sign * interval.estimate, low=low, high=high), p_value, "paired t")


def _compared(difference: float, found: Numbers, num_rows: int) -> Comparison:
    """p is the level at which the percentile interval begins to hold 0, so that the two never disagree."""
    beyond = min(int((found <= 0).sum()), int((found >= 0).sum()))
    p_value = min(1.0, 2 * (beyond + 1) / (len(found) + 1)) if np.isfinite(found).all() else math.nan
    return Comparison(_percentiles(difference, found, num_rows), p_value, "paired bootstrap")


def _percentiles(estimate: float, found: Numbers, num_rows: int) -> Interval:
    """NaN edges where a resample gave no finite number."""
    if not np.isfinite(found).all():
        return Interval(estimate, math.nan, math.nan, math.nan, num_rows, "bootstrap")
    low, high = (float(edge) for edge in np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    return Interval(estimate, low, high, float(found.std(ddof=1)), num_rows, "bootstrap")


def _wilson(correct: Numbers) -> tuple[float, float]:
    found = stats.binomtest(int(correct.sum()), len(correct)).proportion_ci(LEVEL, method="wilson")
    return float(found.low), float(found.high)


def _standard_error(values: Numbers) -> float:
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _is_binary(values: Numbers) -> bool:
    return bool(((values == 0) | (values == 1)).all())


def _numbers(values: Any) -> Numbers:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not len(numbers):
        raise ConfigError(f"rows of shape {numbers.shape}; expected one number for each of one row or more")
    if not np.isfinite(numbers).all():
        index = int(np.flatnonzero(~np.isfinite(numbers))[0])
        raise ConfigError(f"row {index} is {numbers[index]}; expected a finite number")
    return numbers


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
