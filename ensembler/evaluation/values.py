"""The values that results hold for a task, and the statistics of them: estimates, intervals, comparisons, choices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress
from typing import Any, TypeVar

import numpy as np

from ensembler.engine.grid import GridPoint
from ensembler.evaluation.decisions import equivalence
from ensembler.evaluation.documents import PROMPTS, TEST, VALIDATION, PlannedTask
from ensembler.evaluation.ensemble_plan import LOG_PROB, Plan, PlanOptions
from ensembler.evaluation.resampling import NUM_RESAMPLES
from ensembler.evaluation.statistics import Comparison, Interval, Selection, choose_alpha, compare, metric_interval

_RESAMPLES = 1000  # of a bootstrap of the task's aggregation, which may take many milliseconds a call
_Found = TypeVar("_Found")

Values = dict[str, Any]
"""Of one metric at one point, by the name of the document; without those that lack the metric."""


class TaskValues:
    """The values of one task in one plan's results.

    `index` is the task's position among those of the plan; `read` is `Results.values`.
    """

    def __init__(self, plan: Plan, index: int, read: Callable[[str, str], dict[str, list[Any]]]) -> None:
        self.task: PlannedTask = plan.tasks[index]
        self._plan, self._read = plan, read
        self._columns = {point: column for column, point in enumerate(plan.grid)}

    def values(self, point: GridPoint, subset: str, key: str | None = None) -> Values:
        """Return what a metric (the task's own, if no other is named) found for each document of a subset."""
        known = self._read(self._plan.name, self.task.metric.key if key is None else key)
        column = self._columns[point]
        values = {one.name: known[one.name][column] for one in self.task.subsets[subset] if one.name in known}
        return {name: value for name, value in values.items() if value is not None}

    def estimate(self, point: GridPoint, subset: str, key: str | None = None) -> float:
        """Return a metric of all documents of a subset, by the task's own aggregation; NaN of none."""
        key = self.task.metric.key if key is None else key
        values = self.values(point, subset, key)
        return self.task.task.aggregate(key, [*values.values()]) if values else math.nan

    def others(self, point: GridPoint) -> dict[str, float]:
        """Return the task's other metrics on the test documents, by key."""
        keys = [metric.key for metric in self.task.task.metrics if metric.key != self.task.metric.key]
        return {key: self.estimate(point, TEST, key) for key in keys}

    def standard_error(self, point: GridPoint, subset: str) -> float | None:
        """Return lm-eval's standard error; None where it has none."""
        return self.task.task.standard_error(self.task.metric.key, [*self.values(point, subset).values()])

    def prompt_perplexity(self, point: GridPoint) -> float:
        """Return the perplexity of the prompts that choose α without labels."""
        exponent = -sum(self.values(point, PROMPTS, LOG_PROB).values()) / self.task.num_prompt_tokens
        return math.exp(exponent) if exponent < 700 else math.inf


@dataclass(frozen=True)
class Statistics:
    """Intervals, comparisons and tests of methods on a task's test documents. A method is its values for each seed.

    All are of the documents that have the metric in every seed, and in comparisons by both methods. `cluster`: the
    field of the documents whose values belong together; `seed`: of the bootstrap; `num_comparisons`: of Holm's family.
    """

    task: PlannedTask
    cluster: str | None = None
    seed: int = 0
    num_comparisons: int = 1

    @property
    def clusters(self) -> list[str] | None:
        """The cluster of each test document, None without."""
        return None if self.cluster is None else self.task.clusters(self.cluster)

    def interval(self, seeds: Sequence[Values]) -> Interval:
        """Return the metric with its interval; without edges where values are infinite or too few."""
        (rows,), clusters, missing = self._rows(seeds)
        if missing:
            return _unbounded(self._estimate(rows), len(rows[0]), missing)
        if self.task.metric.is_mean:
            return metric_interval(rows, clusters=clusters)
        return metric_interval(_columns(rows), **self._bootstrap(clusters), num_resamples=_RESAMPLES)

    def quick_interval(self, values: Values) -> Interval:
        """Return the same for a point of a curve: without edges where these would take a bootstrap."""
        if self.task.metric.is_mean or not values:
            return self.interval([values])
        return _unbounded(self._estimate([[*values.values()]]), len(values), "none: not a mean")

    def compare(self, a: Sequence[Values], b: Sequence[Values]) -> Comparison:
        """Compare two methods; either may have one seed alone."""
        (x, y), clusters, missing = self._rows(a, b)
        if missing:
            difference = _unbounded(self._estimate(x) - self._estimate(y), len(x[0]), missing)
            return Comparison(difference, math.nan, missing)
        if self.task.metric.is_mean:
            num = max(NUM_RESAMPLES, self._enough)
            return compare(x, y, clusters=clusters, seed=self.seed, num_resamples=num)
        test = partial(compare, _columns(x), _columns(y), **self._bootstrap(clusters))
        return self._drawn(test, lambda found: found.p_value)

    def p_equivalent(self, a: Sequence[Values], b: Sequence[Values], margin: float) -> float:
        """Return p of 'the two differ by `margin` or more', in the unit of the values; NaN where it cannot be told."""
        (x, y), clusters, missing = self._rows(a, b)
        if missing:
            return math.nan
        if self.task.metric.is_mean:
            return equivalence(x, y, margin, clusters=clusters)
        return self._drawn(partial(equivalence, _columns(x), _columns(y), margin, **self._bootstrap(clusters)), float)

    @property
    def _enough(self) -> int:
        """The number of resamples of which the smallest p, 2 / (n + 1), passes Holm's correction at 5 %."""
        return 40 * self.num_comparisons

    def _drawn(self, test: Callable[..., _Found], p_value: Callable[[_Found], float]) -> _Found:
        """Draw the resamples of a test: more only where p is the smallest that there can be, and too large for Holm."""
        found = test(num_resamples=_RESAMPLES)
        is_least = p_value(found) < 3 / (_RESAMPLES + 1)
        return test(num_resamples=self._enough) if is_least and self._enough > _RESAMPLES else found

    def _bootstrap(self, clusters: list[str] | None) -> dict[str, Any]:
        return {"aggregate": lambda rows: self._estimate(_columns(rows)), "clusters": clusters, "seed": self.seed}

    def _estimate(self, rows: Sequence[Sequence[Any]]) -> float:
        """The metric's mean over the seeds, of values (seeds, documents); NaN of no documents."""
        task, key = self.task.task, self.task.metric.key
        return sum(task.aggregate(key, of_seed) for of_seed in rows) / len(rows) if rows and rows[0] else math.nan

    def _rows(self, *methods: Sequence[Values]) -> tuple[list[list[list[Any]]], list[str] | None, str]:
        """Values (seeds, documents) by method, the clusters of these documents, and why they allow no statistics.

        A method that no training changes has the same values for all seeds.
        """
        names = [document.name for document in self.task.subsets[TEST]]
        shared = [all(name in of_seed for seeds in methods for of_seed in seeds) for name in names]
        clusters = None if self.clusters is None else list(compress(self.clusters, shared))
        num = max(map(len, methods))
        found = [
            [[of_seed[name] for name in compress(names, shared)] for of_seed in [*seeds] * (num // len(seeds))]
            for seeds in methods
        ]
        if not any(shared):
            return found, clusters, f"none: no document has {self.task.metric.key}"
        if clusters is not None and len(set(clusters)) < 2:
            return found, clusters, f"none: all documents have one {self.cluster}"
        if self.task.metric.is_mean and not np.isfinite(np.array(found, dtype=float)).all():
            return found, clusters, "none: values are infinite"
        return found, clusters, ""


def choose(found: Sequence[TaskValues], options: PlanOptions, rule: str, alphas: Sequence[float]) -> Selection:
    """Return the α of a rule that the validation documents, or the prompts, choose; seeds count by their mean."""
    points = [GridPoint(rule, alpha) for alpha in alphas]
    if options.by_perplexity:
        metrics = [found[0].prompt_perplexity(point) for point in points]
        return choose_alpha(alphas, metrics, higher_is_better=False)
    metrics = [sum(one.estimate(point, VALIDATION) for one in found) / len(found) for point in points]
    errors = None
    if options.one_standard_error:
        errors = [_standard_error(found[0], point, options.seed) for point in points]
    return choose_alpha(alphas, metrics, errors, higher_is_better=found[0].task.metric.higher_is_better)


def _standard_error(found: TaskValues, point: GridPoint, seed: int) -> float:
    """The standard error on the validation documents, by a bootstrap where the metric is no mean; NaN of infinities."""
    values, metric, task = [*found.values(point, VALIDATION).values()], found.task.metric, found.task.task
    if metric.is_mean and not np.isfinite(values).all():
        return math.nan
    aggregate = None if metric.is_mean else partial(task.aggregate, metric.key)
    return metric_interval(values, aggregate, seed=seed, num_resamples=_RESAMPLES).standard_error


def _columns(rows: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    return list(zip(*rows, strict=True))


def _unbounded(estimate: float, num_rows: int, why: str) -> Interval:
    return Interval(estimate, math.nan, math.nan, math.nan, num_rows, why)
