"""Resamples of the rows of a test set, seeded: what a metric might have been on other examples of the same kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensembler.errors import ConfigError

NUM_RESAMPLES = 10_000
_DRAWN_AT_ONCE = 1 << 22  # indices in memory: 32 MB

Numbers = NDArray[np.float64]
Groups = NDArray[np.int64]
Rows = Sequence[Any] | NDArray[Any]
Aggregate = Callable[[list[Any]], float]
"""Makes one number of rows, in any order, as the aggregation functions of lm-eval do; called once for each resample."""


def resampled_means(values: Numbers, seed: int) -> Numbers:
    """Return the means of NUM_RESAMPLES resamples of `values` (n,), (NUM_RESAMPLES,)."""
    generator, num = np.random.default_rng(seed), len(values)
    at_once = max(1, _DRAWN_AT_ONCE // num)
    return np.concatenate(
        [
            values[generator.integers(num, size=(min(at_once, NUM_RESAMPLES - start), num))].mean(axis=-1)
            for start in range(0, NUM_RESAMPLES, at_once)
        ]
    )


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
