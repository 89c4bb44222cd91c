"""The smallest difference that a comparison would find, and tests of whether two methods are alike."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
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
)
from ensembler.evaluation.statistics import (
    Comparison,
    Interval,
    check_paired,
    crossed_interval,
    is_binary,
    least_p,
    mean_interval,
    paired_numbers,
    seeds_matter,
    wilson,
)
from ensembler.extras import require

stats: Any = require("scipy.stats", "eval")
optimize: Any = require("scipy.optimize", "eval")


def detectable_effect(comparison: Comparison, *, level: float = 0.05, power: float = 0.8) -> float:
    """Return the smallest true difference that these rows would have shown with probability `power` at `level`.

    For McNemar's test it is computed from the exact power of the test, which falls as methods disagree more: with the
    upper limit of Wilson's interval of the disagreement, since that of few rows may be found too small, or the
    difference itself where that is larger; inf for so few rows that the test never rejects. For other tests it is that
    of a t test with the comparison's standard error and degrees of freedom; NaN where the standard error is 0, inf for
    one row, or for a bootstrap of too few.
    """
    _check(level, power)
    interval = comparison.difference
    if comparison.only_a is not None and comparison.only_b is not None:
        disagreement = wilson(comparison.only_a + comparison.only_b, interval.num_rows)[1]
        return _smallest_shown(interval.num_rows, disagreement, level, power)
    degrees = interval.num_rows - 1 if interval.degrees_of_freedom is None else interval.degrees_of_freedom
    if degrees == 0 or (interval.method.endswith("bootstrap") and least_p(degrees + 1) > level):
        return math.inf
    if not 0 < interval.standard_error < math.inf:
        return math.nan
    # The power is averaged over quantiles of the estimated standard error. statsmodels' solve_power returns where it
    # begins for few degrees of freedom and a low level, and scipy's noncentral t is NaN there or takes minutes.
    critical = float(stats.t.isf(level / 2, degrees))
    found = critical * np.sqrt(stats.chi2.ppf((np.arange(2000) + 0.5) / 2000, degrees) / degrees)
    mean = optimize.brentq(lambda mean: power - stats.norm.cdf(mean - found).mean(), 0, found.max() + 40)
    return interval.standard_error * float(mean)


def detectable_by(num_rows: int, disagreement: float, *, level: float = 0.05, power: float = 0.8) -> float:
    """Return the smallest difference of two right-or-wrong methods that `num_rows` rows show with `power` at `level`.

    Two methods that disagree on a share `disagreement` of rows differ by that share at most; inf where the rows do not
    show even that difference. Exact for McNemar's exact test. Raises ConfigError for numbers out of range.
    """
    _check(level, power)
    if num_rows < 1 or not 0 <= disagreement <= 1:
        raise ConfigError(f"{num_rows} rows that disagree on {disagreement}; expected 1 or more, and a share of 0 to 1")
    smallest = _smallest_shown(num_rows, disagreement, level, power)
    return smallest if smallest <= disagreement else math.inf


def equivalence(
    a: Rows,
    b: Rows,
    margin: float,
    aggregate: Aggregate | None = None,
    *,
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> float:
    """Return p of the two one-sided tests that |metric(a) − metric(b)| < `margin` (Schuirmann 1987).

    Rows of 0 and 1 are tested by the score test of Tango (1998, Statistics in Medicine 17:891), since t finds too much
    where few rows differ; other numbers, and clusters, by t on the (cluster-robust) standard error; an `aggregate` by
    the share of paired bootstrap resamples at or beyond the margin.

    Of rows between 0 and 1, p is at least (1 − margin)^n for n rows or clusters, the probability that none of n differs
    when a share `margin` of all rows does. NaN where all differences are alike, and within the margin, and rows have
    other values; and for an aggregate that no resample changes. Of one, p is at least 0.5^n.

    Raises ConfigError as `compare`, and for a margin that is not above 0, or not below 1 for rows of 0 and 1.
    """
    if not margin > 0:
        raise ConfigError(f"an equivalence margin of {margin}; expected a number above 0")
    if aggregate is not None:
        check_paired(a, b)
        groups = number_clusters(clusters, len(a))
        of_a, of_b = resampled_aggregates(aggregate, [a, b], seed, num_resamples, groups)[1]
        found = of_a - of_b
        if not np.isfinite(found).all() or found.min() == found.max():
            return math.nan
        p_value = (max(int((found >= margin).sum()), int((found <= -margin).sum())) + 1) / (len(found) + 1)
        return max(p_value, 0.5 ** num_units(len(a), groups))
    x, y = paired_numbers(a, b)
    groups = number_clusters(clusters, x.shape[1])
    if seeds_matter(x - y):
        p_value = _equivalence_by_t(crossed_interval(x - y, groups), margin)
    else:
        x, y = x.mean(axis=0), y.mean(axis=0)
        p_value = _equivalence_of_means(x, y, margin, groups)
    values, num = np.append(x, y), num_units(x.shape[-1], groups)
    if values.min() < 0 or values.max() > 1:
        return p_value
    return float(np.nanmax([p_value, max(0.0, 1 - margin) ** num]))


def _equivalence_of_means(x: Numbers, y: Numbers, margin: float, groups: Groups | None) -> float:
    are_binary = is_binary(x) and is_binary(y)
    if are_binary and margin >= 1:
        raise ConfigError(
            f"an equivalence margin of {margin} for rows of 0 and 1; expected a share: 0.01 is one percent"
        )
    if groups is not None or not are_binary:
        return _equivalence_by_t(mean_interval(x - y, groups), margin)
    only_a, only_b = int((x > y).sum()), int((x < y).sum())
    return max(_tango(only_a, only_b, len(x), margin), _tango(only_b, only_a, len(x), margin))


def _equivalence_by_t(difference: Interval, margin: float) -> float:
    """Return NaN within the margin, and 1 beyond, where there is no standard error."""
    if not difference.standard_error > 0:
        return math.nan if abs(difference.estimate) < margin else 1.0
    reach = margin - abs(difference.estimate)
    return float(stats.t.sf(reach / difference.standard_error, difference.degrees_of_freedom))


def _tango(only_a: int, only_b: int, num_rows: int, margin: float) -> float:
    """Return p of 'a is better by `margin` or more'; `rate_b` is the most likely rate of only_b under it."""
    slope = (2 * num_rows - only_a + only_b) * margin - only_a - only_b
    rate_b = (math.sqrt(slope**2 + 8 * num_rows * only_b * margin * (1 - margin)) - slope) / (4 * num_rows)
    error = math.sqrt(num_rows * (2 * rate_b + margin * (1 - margin)))
    return float(stats.norm.cdf((only_a - only_b - num_rows * margin) / error))


def _smallest_shown(num_rows: int, disagreement: float, level: float, power: float) -> float:
    """Return the smallest difference that is shown. The disagreement is taken to be no smaller than the difference."""

    def lacking(difference: float) -> float:
        return power - _mcnemar_power(num_rows, max(disagreement, difference), difference, level)

    return float(optimize.brentq(lacking, 1e-12, 1.0)) if lacking(1.0) < 0 else math.inf


def _mcnemar_power(num_rows: int, disagreement: float, difference: float, level: float) -> float:
    """Return the probability that McNemar's exact test rejects, over the number of rows on which the methods disagree.

    Of those rows, the better method alone is right on a share of (1 + difference / disagreement) / 2. The test rejects
    if one of the two is right on at most `most` of them; -1 where it never does.
    """
    binom = stats.binom
    fewest, largest = binom.ppf([1e-9, 1 - 1e-9], num_rows, disagreement)
    discordant = np.arange(fewest, largest + 1)
    most = binom.ppf(level / 2, discordant, 0.5)
    most -= binom.cdf(most, discordant, 0.5) > level / 2
    better = (1 + difference / disagreement) / 2
    rejects = binom.cdf(most, discordant, better) + binom.cdf(most, discordant, 1 - better)
    return float((binom.pmf(discordant, num_rows, disagreement) * rejects).sum())


def _check(level: float, power: float) -> None:
    if not 0 < level < power < 1:
        raise ConfigError(f"a level of {level} with a power of {power}; expected 0 < level < power < 1")
