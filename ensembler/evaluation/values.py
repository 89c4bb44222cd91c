"""The values that results hold for a task, and the statistics of them: estimates, intervals, comparisons, choices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ensembler.engine.grid import GridPoint
from ensembler.errors import ConfigError
from ensembler.evaluation.decisions import equivalence, equivalence_by_t
from ensembler.evaluation.parts import PROMPTS, TEST, VALIDATION, PlannedTask
from ensembler.evaluation.plan import LOG_PROB, Plan, PlanOptions
from ensembler.evaluation.seeds import compare_seeded, seeded_interval
from ensembler.evaluation.statistics import Comparison, Interval, Selection, choose_alpha, compare, metric_interval

_RESAMPLES = 1000  # of a bootstrap of the task's aggregation, which may take many milliseconds a call
_INFINITE = "none: values are infinite"

Values = list[Any]
"""Of one metric at one point, for each document of a part."""


class TaskValues:
    """The values of one task in one plan's results.

    `index` is the task's place among those of the plan; `read` is `Results.values`.
    """

    def __init__(self, plan: Plan, index: int, read: Callable[[str, str], dict[str, list[Any]]]) -> None:
        self.task: PlannedTask = plan.tasks[index]
        self._plan, self._read = plan, read
        self._place = {point: place for place, point in enumerate(plan.grid)}

    def values(self, point: GridPoint, part: str, key: str | None = None) -> Values:
        """Return what a metric (the task's own, if no other is named) found for each document of a part."""
        known = self._read(self._plan.name, self.task.metric.key if key is None else key)
        place = self._place[point]
        values = [known[one.name][place] for one in self.task.parts[part] if one.name in known]
        return [value for value in values if value is not None]

    def estimate(self, point: GridPoint, part: str, key: str | None = None) -> float:
        """Return a metric of all documents of a part, by the task's own aggregation; NaN of none."""
        key = self.task.metric.key if key is None else key
        values = self.values(point, part, key)
        return self.task.task.aggregate(key, values) if values else math.nan

    def others(self, point: GridPoint) -> dict[str, float]:
        """Return the task's other metrics on the test documents, by key."""
        keys = [metric.key for metric in self.task.task.metrics if metric.key != self.task.metric.key]
        return {key: self.estimate(point, TEST, key) for key in keys}

    def standard_error(self, point: GridPoint, part: str) -> float | None:
        """Return lm-eval's standard error; None where it has none."""
        return self.task.task.standard_error(self.task.metric.key, self.values(point, part))

    def prompt_perplexity(self, point: GridPoint) -> float:
        """Return the perplexity of the prompts that choose α without labels."""
        exponent = -sum(self.values(point, PROMPTS, LOG_PROB)) / self.task.num_prompt_tokens
        return math.exp(exponent) if exponent < 700 else math.inf


@dataclass(frozen=True)
class Statistics:
    """Intervals, comparisons and tests of methods on a task's test documents. A method is its values for each seed.

    `cluster`: the field of the documents whose values belong together; `seed`: of the bootstrap.
    """

    task: PlannedTask
    cluster: str | None = None
    seed: int = 0

    @property
    def clusters(self) -> list[str] | None:
        """The cluster of each test document, None without."""
        return None if self.cluster is None else self.task.clusters(self.cluster)

    @property
    def aggregate(self) -> Callable[[list[Any]], float] | None:
        """The function that makes one number of the values, None where that is their mean."""
        metric = self.task.metric
        return None if metric.is_mean else lambda values: self.task.task.aggregate(metric.key, values)

    def interval(self, seeds: Sequence[Values]) -> Interval:
        """Return the metric with its interval; without edges where values are infinite."""
        if self.aggregate is not None:
            return metric_interval(self._columns(seeds), self._mean_of_seeds(len(seeds)), **self._settings)
        if not _is_finite(seeds):
            return _unbounded(_mean(seeds), len(seeds[0]), _INFINITE)
        if len(seeds) > 1:
            return seeded_interval(np.array(seeds, dtype=float), clusters=self.clusters)
        return metric_interval(seeds[0], **self._settings)

    def quick_interval(self, values: Values) -> Interval:
        """Return the same for a point of a curve: without edges where these would take a bootstrap."""
        if self.aggregate is None:
            return self.interval([values])
        return _unbounded(self.aggregate(values), len(values), "none: not a mean")

    def compare(self, a: Sequence[Values], b: Sequence[Values]) -> Comparison:
        """Compare two methods by their values on the same documents; either may have one seed alone."""
        if self.aggregate is not None:
            a, b = _alike(a, b)
            return compare(self._columns(a), self._columns(b), self._mean_of_seeds(len(a)), **self._settings)
        if not _is_finite([*a, *b]):
            return Comparison(_unbounded(_mean(a) - _mean(b), len(a[0]), _INFINITE), math.nan, _INFINITE)
        if max(len(a), len(b)) > 1:
            return compare_seeded(np.array(a, dtype=float), np.array(b, dtype=float), clusters=self.clusters)
        return compare(a[0], b[0], **self._settings)

    def p_equivalent(self, a: Sequence[Values], b: Sequence[Values], margin: float) -> float:
        """Return p of 'the two differ by `margin` or more', in the unit of the values; NaN where it cannot be told."""
        if self.aggregate is not None:
            a, b = _alike(a, b)
            columns = (self._columns(a), self._columns(b))
            return equivalence(*columns, margin, self._mean_of_seeds(len(a)), **self._settings)
        if not _is_finite([*a, *b]):
            return math.nan
        if max(len(a), len(b)) > 1:
            return equivalence_by_t(self.compare(a, b).difference, margin)
        return equivalence(a[0], b[0], margin, clusters=self.clusters, seed=self.seed)

    @property
    def _settings(self) -> dict[str, Any]:
        return {"clusters": self.clusters, "seed": self.seed, "num_resamples": _RESAMPLES}

    def _columns(self, seeds: Sequence[Values]) -> list[tuple[Any, ...]]:
        return list(zip(*seeds, strict=True))

    def _mean_of_seeds(self, num: int) -> Callable[[list[Any]], float]:
        aggregate = self.aggregate
        assert aggregate is not None
        return lambda rows: sum(aggregate([row[seed] for row in rows]) for seed in range(num)) / num


def choose(found: Sequence[TaskValues], options: PlanOptions, rule: str, alphas: Sequence[float]) -> Selection:
    """Return the α of a rule that the validation documents, or the prompts, choose; seeds count by their mean."""
    points = [GridPoint(rule, alpha) for alpha in alphas]
    if options.by_perplexity:
        metrics = [found[0].prompt_perplexity(point) for point in points]
        return choose_alpha(alphas, metrics, higher_is_better=False)
    metrics = [sum(one.estimate(point, VALIDATION) for one in found) / len(found) for point in points]
    errors = None
    if options.one_standard_error:
        of_first = [found[0].standard_error(point, VALIDATION) for point in points]
        errors = [math.nan if error is None else error for error in of_first]
    return choose_alpha(alphas, metrics, errors, higher_is_better=found[0].task.metric.higher_is_better)


def _alike(a: Sequence[Values], b: Sequence[Values]) -> tuple[Sequence[Values], Sequence[Values]]:
    """Both with the same number of seeds: a method that no training changes has the same values for all."""
    num = max(len(a), len(b))
    if {len(a), len(b)} - {1, num}:
        raise ConfigError(f"methods with {len(a)} and {len(b)} seeds cannot be compared; give all the same")
    return (list(a) * (num // len(a)), list(b) * (num // len(b)))


def _is_finite(seeds: Sequence[Values]) -> bool:
    return all(math.isfinite(value) for values in seeds for value in values)


def _mean(seeds: Sequence[Values]) -> float:
    values = [value for of_seed in seeds for value in of_seed]
    return sum(values) / len(values) if values else math.nan


def _unbounded(estimate: float, num_rows: int, why: str) -> Interval:
    return Interval(estimate, math.nan, math.nan, math.nan, num_rows, why)
