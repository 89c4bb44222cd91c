"""The values that a run's rows hold for a task, and what can be computed of them at any point of its grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ensembler.engine.grid import GridPoint
from ensembler.evaluation.metric_values import from_json
from ensembler.evaluation.rows_folder import Row
from ensembler.evaluation.statistics import Comparison, Interval, Selection, choose_alpha, compare, metric_interval
from ensembler.evaluation.sweep_tasks import LOG_PROB, PROMPTS, TEST, VALIDATION, SweepTask

_RESAMPLES = 1000  # of a bootstrap of the task's aggregation, which may take many milliseconds a call
_RESAMPLES_OF_ERROR = 100
_INFINITE = "none: values are infinite"


class TaskFigures:
    """The values of one task by point and part, and what is computed of them.

    `grid`: the points of the rows of each example, in their order; `rows` by example.
    """

    def __init__(
        self, task: SweepTask, grid: Sequence[GridPoint], rows: Mapping[str, Sequence[Row]], *, seed: int = 0
    ) -> None:
        self.task = task
        self._seed = seed
        parts = {VALIDATION: task.parts.validation, TEST: task.parts.test, PROMPTS: task.prompts}
        self._rows = {part: [rows[example.id] for example in examples] for part, examples in parts.items()}
        self._place = {point: index for index, point in enumerate(grid)}

    def values(self, point: GridPoint, part: str, key: str | None = None) -> list[Any]:
        """Return what a metric (the task's own, if no other is named) found for each example of a part."""
        key = self.task.metric.key if key is None else key
        rows = [rows[self._place[point]]["values"] for rows in self._rows[part]]
        return [from_json(row[key]) for row in rows if key in row]

    def estimate(self, point: GridPoint, part: str, key: str | None = None) -> float:
        """Return a metric of all examples of a part, by the task's own aggregation; NaN of none."""
        key = self.task.metric.key if key is None else key
        values = self.values(point, part, key)
        return self.task.task.aggregate(key, values) if values else math.nan

    def others(self, point: GridPoint) -> dict[str, float]:
        """Return the task's other metrics on the test examples, by key."""
        keys = [metric.key for metric in self.task.task.metrics if metric.key != self.task.metric.key]
        return {key: self.estimate(point, TEST, key) for key in keys}

    def interval(self, point: GridPoint) -> Interval:
        """Return the metric of the test examples with its interval; without edges where values are infinite."""
        values = self.values(point, TEST)
        if self._aggregate is None and not all(map(math.isfinite, values)):
            return _unbounded(_mean(values), len(values), _INFINITE)
        return metric_interval(values, self._aggregate, seed=self._seed, num_resamples=_RESAMPLES)

    def quick_interval(self, point: GridPoint) -> Interval:
        """Return the same for a point of a curve: without edges where these would take a bootstrap."""
        if self._aggregate is None:
            return self.interval(point)
        return _unbounded(self.estimate(point, TEST), len(self._rows[TEST]), "none: not a mean")

    def standard_error(self, point: GridPoint, part: str) -> float | None:
        """Return lm-eval's standard error; None where it has none."""
        key = self.task.metric.key
        return self.task.task.standard_error(key, self.values(point, part), num_resamples=_RESAMPLES_OF_ERROR)

    def compare(self, a: Sequence[Any], b: Sequence[Any]) -> Comparison:
        """Compare two methods by their values on the same examples."""
        if self._aggregate is None and not all(map(math.isfinite, (*a, *b))):
            return Comparison(_unbounded(_mean(a) - _mean(b), len(a), _INFINITE), math.nan, _INFINITE)
        return compare(a, b, self._aggregate, seed=self._seed, num_resamples=_RESAMPLES)

    def choose(self, rule: str, alphas: Sequence[float], *, one_standard_error: bool = False) -> Selection:
        """Return the α whose metric on the validation examples is best."""
        points = [GridPoint(rule, alpha) for alpha in alphas]
        metrics = [self.estimate(point, VALIDATION) for point in points]
        errors = None
        if one_standard_error:
            found = [self.standard_error(point, VALIDATION) for point in points]
            errors = [math.nan if error is None else error for error in found]
        return choose_alpha(alphas, metrics, errors, higher_is_better=self.task.metric.higher_is_better)

    def choose_by_prompts(self, rule: str, alphas: Sequence[float], num_tokens: int) -> Selection:
        """Return the α that gives the prompts, of `num_tokens` together, the smallest perplexity."""
        perplexities = []
        for alpha in alphas:
            exponent = -sum(self.values(GridPoint(rule, alpha), PROMPTS, LOG_PROB)) / num_tokens
            perplexities.append(math.exp(exponent) if exponent < 700 else math.inf)
        return choose_alpha(alphas, perplexities, higher_is_better=False)

    @property
    def has_validation(self) -> bool:
        """Whether there are examples that choose."""
        return bool(self._rows[VALIDATION])

    @property
    def _aggregate(self) -> Callable[[list[Any]], float] | None:
        """What makes one number of the values, None where it is their mean."""
        metric = self.task.metric
        return None if metric.is_mean else lambda values: self.task.task.aggregate(metric.key, values)


def _unbounded(estimate: float, num_rows: int, why: str) -> Interval:
    return Interval(estimate, math.nan, math.nan, math.nan, num_rows, why)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
