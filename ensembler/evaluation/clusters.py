"""Rows that belong together: documents that share a passage or a subject, and so are right or wrong together."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np

from ensembler.errors import ConfigError
from ensembler.evaluation.bootstrap import Groups, Numbers
from ensembler.extras import require

_ROUNDING = 1e-12  # of the largest value: a smaller standard error is one of 0


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


def standard_error(values: Numbers, groups: Groups | None = None) -> float:
    """Return the standard error of the mean of `values` (n,); cluster-robust where `groups` (n,) numbers clusters.

    s / √n, NaN of one row. Of clusters: Liang and Zeger 1986, Biometrika 73:13, with the correction G / (G − 1) for G
    clusters; recommended for evaluations by Miller 2024, arXiv 2411.00640. Clusters of one row each give s / √n.
    """
    if groups is None:
        return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    ols = require("statsmodels.regression.linear_model", "eval").OLS
    fit = ols(values, np.ones(len(values))).fit(cov_type="cluster", cov_kwds={"groups": groups})
    error = float(fit.bse[0])
    return error if error > _ROUNDING * np.abs(values).max() else 0.0
