"""Metrics of methods that were trained with several seeds: documents and seeds are both drawn at random.

Values are arrays (seeds, documents): one number per document from each seed's model, all on the same documents. The
model is that of crossed random effects without replication, document + seed + rest, its variance components estimated
from mean squares, negative ones set to 0 (Searle, Casella and McCulloch 1992, Variance Components, chapter 4).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ensembler.errors import ConfigError
from ensembler.evaluation.decisions import at_least_by_chance, equivalence, equivalence_by_t
from ensembler.evaluation.resampling import NUM_RESAMPLES, num_units, number_clusters, standard_error
from ensembler.evaluation.statistics import (
    Comparison,
    Interval,
    check_paired,
    compare,
    is_binary,
    metric_interval,
    t_interval,
    t_p_value,
    within_unit,
)

Table = NDArray[np.float64]


def seeded_interval(values: ArrayLike, *, clusters: Sequence[Hashable] | None = None) -> Interval:
    """Return the mean of `values` (seeds, documents) with an interval that covers other seeds and other documents.

    One seed gives `metric_interval`. Of two or three seeds that differ much the interval is somewhat too narrow: it
    covers about 90 % where the documents' share of the variance is small. `clusters` labels each document.

    Raises ConfigError for values of another shape, or that are no finite numbers, or fewer than two clusters.
    """
    table = _table(values)
    if _has_no_spread(table):
        return metric_interval(table.mean(axis=0), clusters=clusters)
    interval = _crossed(table, clusters)
    return within_unit(interval) if is_binary(table) else interval


def compare_seeded(
    a: ArrayLike,
    b: ArrayLike,
    *,
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> Comparison:
    """Return metric(a) − metric(b) with interval and p, from values (seeds, documents) on the same documents.

    A method without training has one seed, which is compared with every seed of the other; one seed of both gives
    `compare`, which `seed` and `num_resamples` are for. Raises ConfigError as `seeded_interval`, and for numbers of
    seeds or documents that do not fit.
    """
    x, y = _paired(a, b)
    if _has_no_spread(x - y):
        means = x.mean(axis=0), y.mean(axis=0)
        return compare(*means, clusters=clusters, seed=seed, num_resamples=num_resamples)
    interval = _crossed(x - y, clusters)
    return Comparison(interval, t_p_value(interval), f"{interval.method} t")


def equivalence_seeded(
    a: ArrayLike, b: ArrayLike, margin: float, *, clusters: Sequence[Hashable] | None = None
) -> float:
    """Return p of the tests of `equivalence` of values (seeds, documents), by t. Raises as `compare_seeded`."""
    x, y = _paired(a, b)
    if _has_no_spread(x - y):
        return equivalence(x.mean(axis=0), y.mean(axis=0), margin, clusters=clusters)
    p_value = equivalence_by_t(_crossed(x - y, clusters), margin)
    num = num_units(x.shape[1], number_clusters(clusters, x.shape[1]))
    return at_least_by_chance(p_value, np.concatenate([x, y]), margin, num)


def _crossed(table: Table, clusters: Sequence[Hashable] | None) -> Interval:
    """Return the interval of the grand mean, its degrees of freedom by Satterthwaite 1946, Biometrics Bulletin 2:110.

    The three terms are the mean squares of documents, seeds and rest, each divided by the number of values. With
    clusters, the first is the cluster-robust variance of the documents' means.
    """
    num_seeds, num_documents = table.shape
    groups = number_clusters(clusters, num_documents)
    mean, by_document, by_seed = table.mean(), table.mean(axis=0), table.mean(axis=1)
    num = num_units(num_documents, groups)
    free = num - 1, num_seeds - 1, (num - 1) * (num_seeds - 1)
    residuals = table - by_document - by_seed[:, None] + mean
    rest = float((residuals**2).sum()) / ((num_documents - 1) * (num_seeds - 1)) / table.size
    seeds = float(by_seed.var(ddof=1)) / num_seeds
    documents = (
        float(by_document.var(ddof=1)) / num_documents if groups is None else standard_error(by_document, groups) ** 2
    )
    documents = max(documents, rest)
    variance = documents + max(seeds - rest, 0.0)
    total = sum(term**2 / degrees for term, degrees in zip((documents, seeds, rest), free, strict=True))
    degrees = variance**2 / total if total else 0.0
    method = "seeds × documents" if groups is None else "seeds × clusters"
    return t_interval(float(mean), variance**0.5, max(degrees, min(free)), num_documents, method)


def _has_no_spread(table: Table) -> bool:
    """Return whether seeds cannot matter: there is one, or one document, or all values are alike."""
    return 1 in table.shape or table.min() == table.max()


def _paired(a: ArrayLike, b: ArrayLike) -> tuple[Table, Table]:
    x, y = _table(a), _table(b)
    check_paired(x[0], y[0])
    if len(x) != len(y) and 1 not in (len(x), len(y)):
        raise ConfigError(f"methods with {len(x)} and {len(y)} seeds; expected as many of both, or one of either")
    return x, y


def _table(values: ArrayLike) -> Table:
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or not table.size or not np.isfinite(table).all():
        raise ConfigError(f"values of shape {table.shape}; expected finite numbers of shape (seeds, documents)")
    return table
