"""Resample the rows of a metric, seeded, and estimate standard errors of means.

Rows may come in clusters: documents that share a passage or a subject, and so are right or wrong together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensembler.errors import ConfigError
from ensembler.extras import require

NUM_RESAMPLES = 10_000
_ROUNDING = 1e-12  # of the largest value: a smaller standard error is one of 0
_AT_ONCE = 20  # resamples in memory

Numbers = NDArray[np.float64]
Groups = NDArray[np.int64]
Rows = Sequence[Any] | NDArray[Any]
Aggregate = Callable[[list[Any]], float]
"""Makes one number of rows, in any order, as the aggregation functions of lm-eval do; called once for each resample."""


def resampled_means(values: Numbers, seed: int, num_resamples: int = NUM_RESAMPLES) -> Numbers:
    """Return the means of resamples of `values` (n,), (num_resamples,)."""
    generator, shape = np.random.default_rng(seed), (_AT_ONCE, len(values))
    draws = (generator.integers(len(values), size=shape) for _ in range(-(-num_resamples // _AT_ONCE)))
    return np.concatenate([values[drawn].mean(axis=-1) for drawn in draws])[:num_resamples]


def resampled_aggregates(
    aggregate: Aggregate,
    methods: Sequence[Rows],
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
    groups: Groups | None = None,
) -> tuple[Numbers, Numbers]:
    """Return the aggregate of each method's rows, (methods,), and of resamples of them, (methods, num_resamples).

    Row i of all methods belongs to the same example; a resample draws examples, or whole clusters of them where
    `groups` (rows,) numbers the cluster of each row. Raises ConfigError for no rows.
    """
    num = len(methods[0])
    if not num:
        raise ConfigError("no rows; expected one or more")
    members = None if groups is None else np.split(np.argsort(groups, kind="stable"), np.bincount(groups).cumsum()[:-1])
    num_units = num if members is None else len(members)
    generator = np.random.default_rng(seed)
    whole = [list(rows) for rows in methods]
    found = np.empty((len(methods), num_resamples))
    for column in range(num_resamples):
        drawn = generator.integers(num_units, size=num_units)
        indices = (drawn if members is None else np.concatenate([members[unit] for unit in drawn])).tolist()
        found[:, column] = [aggregate([rows[index] for index in indices]) for rows in whole]
    return np.array([float(aggregate(rows)) for rows in whole]), found


def number_clusters(clusters: Sequence[Hashable] | None, num_rows: int) -> Groups | None:
    """Return the number of each row's cluster, (num_rows,), counted from 0; None for None.

    Raises ConfigError unless there is one label per row, and two clusters or more.
    """
    if clusters is None:
        return None
    numbers: dict[Hashable, int] = {}
    groups = np.array([numbers.setdefault(label, len(numbers)) for label in clusters], dtype=np.int64)
    if len(groups) != num_rows:
        raise ConfigError(f"{len(groups)} cluster labels for {num_rows} rows; give one label per row")
    if len(numbers) < 2:
        raise ConfigError(f"all {num_rows} rows are of one cluster; expected two clusters or more, or none to be given")
    return groups


def num_units(num_rows: int, groups: Groups | None) -> int:
    """Return how many independent units rows are: clusters, or the rows themselves."""
    return num_rows if groups is None else int(groups.max()) + 1


def spread(found: Numbers) -> float:
    """Return the standard deviation of resamples, 0 of those alike but for rounding; NaN unless all are finite."""
    if not np.isfinite(found).all():
        return math.nan
    return _unless_rounding(float(found.std(ddof=1)), found)


def _unless_rounding(error: float, values: Numbers) -> float:
    return error if error > _ROUNDING * np.abs(values).max() else 0.0


def standard_error(values: Numbers, groups: Groups | None = None) -> float:
    """Return the standard error of the mean of `values` (n,); cluster-robust where `groups` (n,) numbers clusters.

    s / √n, 0 of rows that are alike but for rounding, NaN of one row. Of clusters: Liang and Zeger 1986, Biometrika
    73:13, with the correction G / (G − 1) for G clusters; recommended for evaluations by Miller 2024, arXiv 2411.00640.
    Clusters of one row each give s / √n.
    """
    if len(values) < 2:
        return math.nan
    if groups is None:
        error = float(values.std(ddof=1)) / math.sqrt(len(values))
    else:
        ols = require("statsmodels.regression.linear_model", "eval").OLS
        error = float(ols(values, np.ones(len(values))).fit(cov_type="cluster", cov_kwds={"groups": groups}).bse[0])
    return _unless_rounding(error, values)
