"""What the rows of a sweep come to: curves, the choice of α, and paired comparisons on rows that chose nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ensembler.decoding.points import GridPoint
from ensembler.evaluation.metric_values import from_json
from ensembler.evaluation.rows_folder import Row
from ensembler.evaluation.statistics import (
    Comparison,
    Interval,
    Selection,
    choose_alpha,
    compare,
    holm,
    metric_interval,
)
from ensembler.evaluation.sweep import LOG_PROB, TEST, VALIDATION, Sweep, SweepTask

_CURVE_RESAMPLES = 1000  # of a bootstrap at every point; what is compared gets the full number
BY_METRIC, BY_PERPLEXITY, GIVEN = "validation", "prompt perplexity", "given"


@dataclass(frozen=True)
class Figure:
    """The metric at one point: on the test examples with its interval, and on those that chose α where there are any.

    `others`: the task's other metrics on the test examples, by key; of compared methods only.
    """

    label: str
    rule: str
    alpha: float
    test: Interval
    validation: float | None
    others: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return {**asdict(self), "test": self.test.to_dict()}


@dataclass(frozen=True)
class Choice:
    """The α of a rule, and what it was chosen by: 'validation', 'prompt perplexity', or 'given' where it was the only.

    `selection`: by which numbers; of prompts these are perplexities.
    """

    rule: str
    alpha: float
    by: str
    selection: Selection | None

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return {**asdict(self), "selection": None if self.selection is None else self.selection.to_dict()}


@dataclass(frozen=True)
class Difference:
    """Two methods on the same test examples; `p_holm` is corrected over all comparisons of the sweep."""

    method: str
    against: str
    comparison: Comparison
    p_holm: float

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return {**asdict(self), "comparison": self.comparison.to_dict()}


@dataclass(frozen=True)
class TaskSummary:
    """One task of a sweep. `methods`: the members that are points of the grid, and each rule at its α and at 1.

    `num_repeated`: validation examples left out because test has them; `num_truncated`: requests that lost tokens on
    the left.
    """

    task: str
    version: str
    num_fewshot: int
    metric: str
    higher_is_better: bool
    num_validation: int
    num_test: int
    num_repeated: int
    num_truncated: int
    curve: tuple[Figure, ...]
    methods: tuple[Figure, ...]
    levels: tuple[str, ...]
    choices: tuple[Choice, ...]
    differences: tuple[Difference, ...]

    def choice(self, rule: str) -> Choice | None:
        """Return the choice of a rule, or None where nothing chose."""
        return next((choice for choice in self.choices if choice.rule == rule), None)

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        content = {key: value for key, value in vars(self).items() if not isinstance(value, tuple)}
        for name in ("curve", "methods", "choices", "differences"):
            content[name] = [each.to_dict() for each in getattr(self, name)]
        return {**content, "levels": list(self.levels)}


def summarise(sweep: Sweep, rows: Mapping[str, Sequence[Row]]) -> list[TaskSummary]:
    """Return the figures of every task of a sweep from all its rows, by example."""
    found = [_TaskFigures(sweep, task, rows).summary() for task in sweep.tasks]
    differences = [difference for summary in found for difference in summary.differences]
    corrected = iter(holm([difference.comparison.p_value for difference in differences]))
    return [
        replace(summary, differences=tuple(replace(each, p_holm=next(corrected)) for each in summary.differences))
        for summary in found
    ]


def label(point: GridPoint) -> str:
    """Return how a point is named in tables."""
    return f"{point.rule} α = {point.alpha:g}"


def level_label(role: str) -> str:
    """Return how a member is named in tables: source FT."""
    name, _, kind = role.rpartition("_")
    return f"{name} {kind.upper()}" if name in ("source", "target") else role


class _TaskFigures:
    """The values of one task by point and part, and what is computed of them."""

    def __init__(self, sweep: Sweep, task: SweepTask, rows: Mapping[str, Sequence[Row]]) -> None:
        self._sweep = sweep
        self._task = task
        self._seed = sweep.options.seed
        parts = {VALIDATION: task.parts.validation, TEST: task.parts.test}
        self._rows = {part: [rows[example.id] for example in examples] for part, examples in parts.items()}
        self._prompts = [rows[example.id] for example in task.prompts]
        self._place = {point: index for index, point in enumerate(sweep.grid)}

    def summary(self) -> TaskSummary:
        sweep, task = self._sweep, self._task
        choices = tuple(filter(None, map(self._choose, sweep.options.rules)))
        levels = {level_label(role): point for role, point in sweep.levels.items()}
        ones = [GridPoint(rule, 1.0) for rule in sweep.options.rules]
        chosen = {choice.rule: GridPoint(choice.rule, choice.alpha) for choice in choices}
        methods = {**{point: name for name, point in levels.items()}}
        for one in ones:
            for point in filter(None, (chosen.get(one.rule), one)):
                methods.setdefault(point, label(point))
        return TaskSummary(
            task=task.task.name,
            version=task.task.version,
            num_fewshot=task.task.num_fewshot,
            metric=task.metric.key,
            higher_is_better=task.metric.higher_is_better,
            num_validation=len(task.parts.validation),
            num_test=len(task.parts.test),
            num_repeated=task.parts.num_repeated,
            num_truncated=sweep.num_truncated(task),
            curve=tuple(self._figure(point, label(point)) for point in sweep.points),
            methods=tuple(self._method(point, name) for point, name in methods.items()),
            levels=tuple(levels),
            choices=choices,
            differences=tuple(
                self._difference(point, other, methods)
                for one in ones
                for point in [chosen.get(one.rule, one)]
                for other in dict.fromkeys((*levels.values(), one))
                if other != point
            ),
        )

    def _choose(self, rule: str) -> Choice | None:
        options, alphas = self._sweep.options, self._sweep.options.alphas
        points = [GridPoint(rule, alpha) for alpha in alphas]
        if len(alphas) == 1:
            return Choice(rule, alphas[0], GIVEN, None)
        if options.by_perplexity:
            selection = choose_alpha(alphas, list(map(self._perplexity, points)), higher_is_better=False)
            return Choice(rule, selection.alpha, BY_PERPLEXITY, selection)
        if options.validation is None:
            return None
        metrics = [self._estimate(point, VALIDATION) for point in points]
        errors = None
        if options.one_standard_error:
            errors = [self._interval(point, VALIDATION, _CURVE_RESAMPLES).standard_error for point in points]
        higher = self._task.metric.higher_is_better
        selection = choose_alpha(alphas, metrics, errors, higher_is_better=higher)
        return Choice(rule, selection.alpha, BY_METRIC, selection)

    def _figure(self, point: GridPoint, name: str) -> Figure:
        validation = self._estimate(point, VALIDATION) if self._rows[VALIDATION] else None
        return Figure(name, point.rule, point.alpha, self._interval(point, TEST, _CURVE_RESAMPLES), validation, {})

    def _method(self, point: GridPoint, name: str) -> Figure:
        others = {
            metric.key: self._estimate(point, TEST, metric.key)
            for metric in self._task.task.metrics
            if metric.key != self._task.metric.key
        }
        return replace(self._figure(point, name), others=others)

    def _difference(self, point: GridPoint, other: GridPoint, names: Mapping[GridPoint, str]) -> Difference:
        a, b = self._values(point, TEST), self._values(other, TEST)
        if self._aggregate is None and not all(map(math.isfinite, (*a, *b))):
            unknown = Interval(_mean(a) - _mean(b), math.nan, math.nan, math.nan, len(a), "none: values are infinite")
            comparison = Comparison(unknown, math.nan, "none: values are infinite")
        else:
            comparison = compare(a, b, self._aggregate, seed=self._seed)
        return Difference(names[point], names[other], comparison, math.nan)

    @property
    def _aggregate(self) -> Callable[[list[Any]], float] | None:
        """What makes one number of the values, None where it is their mean."""
        metric = self._task.metric
        return None if metric.is_mean else lambda values: self._task.task.aggregate(metric.key, values)

    def _values(self, point: GridPoint, part: str, key: str | None = None) -> list[Any]:
        key = self._task.metric.key if key is None else key
        rows = [rows[self._place[point]]["values"] for rows in self._rows[part]]
        return [from_json(row[key]) for row in rows if key in row]

    def _estimate(self, point: GridPoint, part: str, key: str | None = None) -> float:
        key = self._task.metric.key if key is None else key
        values = self._values(point, part, key)
        return self._task.task.aggregate(key, values) if values else math.nan

    def _interval(self, point: GridPoint, part: str, num_resamples: int) -> Interval:
        values = self._values(point, part)
        if self._aggregate is None and not all(map(math.isfinite, values)):
            return Interval(_mean(values), math.nan, math.nan, math.nan, len(values), "none: values are infinite")
        return metric_interval(values, self._aggregate, seed=self._seed, num_resamples=num_resamples)

    def _perplexity(self, point: GridPoint) -> float:
        """exp(−log p / tokens) of all prompts together."""
        total = sum(from_json(rows[self._place[point]]["values"][LOG_PROB]) for rows in self._prompts)
        exponent = -total / self._sweep.num_prompt_tokens(self._task)
        return math.exp(exponent) if exponent < 700 else math.inf


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def to_json(summaries: Sequence[TaskSummary], sweep: Sweep, command: str) -> str:
    """Return summary.json: the figures of all tasks, and what they were made with."""
    content = {
        "command": command,
        "tasks": [_finite(summary.to_dict()) for summary in summaries],
        "settings": sweep.settings,
        "task settings": {task.task.name: task.task.describe() for task in sweep.tasks},
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    """JSON knows no infinity: null stands for a number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value
