"""What the rows of a sweep come to: curves, the choice of α, and paired comparisons on rows that chose nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ensembler.engine.grid import GridPoint
from ensembler.evaluation.rows_folder import Row
from ensembler.evaluation.statistics import (
    WILSON,
    Comparison,
    Interval,
    Selection,
    holm,
)
from ensembler.evaluation.sweep import Sweep
from ensembler.evaluation.sweep_tasks import TEST, VALIDATION, SweepTask
from ensembler.evaluation.task_figures import TaskFigures

BY_METRIC, BY_PERPLEXITY, GIVEN = "validation", "prompt perplexity", "given"


@dataclass(frozen=True)
class Figure:
    """The metric at one point: on the test examples with its interval, and on those that chose α where there are any.

    Of compared methods only: `standard_error` by lm-eval's own formula or bootstrap, and `others`, the task's other
    metrics on the test examples by key.
    """

    label: str
    rule: str
    alpha: float
    test: Interval
    validation: float | None
    standard_error: float | None = None
    others: Mapping[str, float] = field(default_factory=dict)

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

    `is_percent`: the metric is right or wrong per example, and told in percent; `num_repeated`: validation examples
    left out because test has them; `num_truncated`: requests that lost tokens on the left; `num_skipped`: images that
    cannot be read.
    """

    task: str
    version: str
    num_fewshot: int | None
    metric: str
    higher_is_better: bool
    is_percent: bool
    num_validation: int
    num_test: int
    num_repeated: int
    num_truncated: int
    num_skipped: int
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
    found = [_summary(sweep, task, rows) for task in sweep.tasks]
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


def _summary(sweep: Sweep, task: SweepTask, rows: Mapping[str, Sequence[Row]]) -> TaskSummary:
    figures = TaskFigures(task, sweep.grid, rows, seed=sweep.options.seed)
    choices = tuple(filter(None, (_choose(sweep, figures, rule) for rule in sweep.options.rules)))
    levels = {level_label(role): point for role, point in sweep.levels.items()}
    ones = [GridPoint(rule, 1.0) for rule in sweep.options.rules]
    chosen = {choice.rule: GridPoint(choice.rule, choice.alpha) for choice in choices}
    methods = {point: name for name, point in levels.items()}
    for one in ones:
        for point in filter(None, (chosen.get(one.rule), one)):
            methods.setdefault(point, label(point))
    curve = tuple(_figure(figures, point, label(point)) for point in sweep.points)
    compared = tuple(_compared_figure(figures, point, name) for point, name in methods.items())
    wanted = [
        (point, other) for one in ones for point in [chosen.get(one.rule, one)] for other in (*levels.values(), one)
    ]
    return TaskSummary(
        task=task.task.name,
        version=task.task.version,
        num_fewshot=task.task.num_fewshot,
        metric=task.metric.key,
        higher_is_better=task.metric.higher_is_better,
        num_validation=len(task.parts.validation),
        num_test=len(task.parts.test),
        num_repeated=len(task.parts.repeated),
        num_truncated=sweep.num_truncated(task),
        num_skipped=sweep.num_skipped(task),
        is_percent=all(figure.test.method == WILSON for figure in (*curve, *compared)),
        curve=curve,
        methods=compared,
        levels=tuple(levels),
        choices=choices,
        differences=tuple(
            Difference(
                methods[point],
                methods[other],
                figures.compare(figures.values(point, TEST), figures.values(other, TEST)),
                math.nan,
            )
            for point, other in _different(sweep, wanted)
        ),
    )


def _different(sweep: Sweep, pairs: Sequence[tuple[GridPoint, GridPoint]]) -> list[tuple[GridPoint, GridPoint]]:
    """The pairs of different formulas, each once: base-change and EFT are the same at α = 1."""
    found: dict[frozenset[object], tuple[GridPoint, GridPoint]] = {}
    for pair in pairs:
        formulas = frozenset(map(sweep.formula, pair))
        if len(formulas) == 2:
            found.setdefault(formulas, pair)
    return list(found.values())


def _choose(sweep: Sweep, figures: TaskFigures, rule: str) -> Choice | None:
    options = sweep.options
    if len(options.alphas) == 1:
        return Choice(rule, options.alphas[0], GIVEN, None)
    if options.by_perplexity:
        selection = figures.choose_by_prompts(rule, options.alphas, sweep.num_prompt_tokens(figures.task))
        return Choice(rule, selection.alpha, BY_PERPLEXITY, selection)
    if not figures.has_validation:
        return None
    selection = figures.choose(rule, options.alphas, one_standard_error=options.one_standard_error)
    return Choice(rule, selection.alpha, BY_METRIC, selection)


def _figure(figures: TaskFigures, point: GridPoint, name: str) -> Figure:
    validation = figures.estimate(point, VALIDATION) if figures.has_validation else None
    return Figure(name, point.rule, point.alpha, figures.quick_interval(point), validation)


def _compared_figure(figures: TaskFigures, point: GridPoint, name: str) -> Figure:
    return replace(
        _figure(figures, point, name),
        test=figures.interval(point),
        standard_error=figures.standard_error(point, TEST),
        others=figures.others(point),
    )


def to_json(summaries: Sequence[TaskSummary], sweep: Sweep, command: str) -> str:
    """Return summary.json: the figures of all tasks, and what they were made with."""
    content = {
        "command": command,
        "selection": {
            "validation": sweep.options.validation,
            "select": sweep.options.select,
            "one standard error": sweep.options.one_standard_error,
        },
        "tasks": [finite(summary.to_dict()) for summary in summaries],
        "settings": sweep.settings,
        "task settings": {task.task.name: task.task.describe() for task in sweep.tasks},
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def finite(value: Any) -> Any:
    """JSON knows no infinity: null stands for a number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, list | tuple) else value
