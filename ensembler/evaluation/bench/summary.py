"""What a benchmark comes to: every method's figure beside its cost, and paired comparisons on the same examples."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ensembler.engine.grid import GridPoint
from ensembler.evaluation.bench.bench import Bench, PlannedRun
from ensembler.evaluation.bench.costs import FAILED, cost_id
from ensembler.evaluation.bench.measure import Cost
from ensembler.evaluation.bench.methods import Method
from ensembler.evaluation.bench.recipe import Experiment
from ensembler.evaluation.examples import Example
from ensembler.evaluation.rows_folder import Row
from ensembler.evaluation.statistics import WILSON, Interval, holm
from ensembler.evaluation.summary import Difference
from ensembler.evaluation.sweep_tasks import TEST, SweepTask
from ensembler.evaluation.task_figures import TaskFigures

# Which methods are compared besides each with the first (source FT, where there is one): the question of the benchmark.
_PAIRS = (
    ("base-change", "eft"),
    ("base-change", "patch"),
    ("eft", "patch"),
    ("patch+base-change", "patch"),
    ("patch+base-change", "base-change"),
    ("patch", "target_pt"),
    ("patch", "direct"),
    ("base-change", "direct"),
)
# Of each run by example; None of a run without all of its rows.
RowsByRun = Mapping[str, Mapping[str, Sequence[Row]] | None]
COSTS = tuple(each.name for each in fields(Cost))


@dataclass(frozen=True)
class Spread:
    """A quantity over the rounds: median, smallest and largest of how many."""

    median: float
    low: float
    high: float
    num_rounds: int


@dataclass(frozen=True)
class MethodSummary:
    """One method on one task.

    `test`: the metric on the test examples; `others`: other metrics; `published`: a paper's figures by metric in the
    unit of the table, and `published_alpha` the α that it chose; `cost` and `published_cost` by name (`Cost`). `error`:
    why there is no figure, or no cost.
    """

    method: str
    alpha: float | None = None
    is_chosen: bool = False
    test: Interval | None = None
    others: Mapping[str, float] = field(default_factory=dict)
    published: Mapping[str, float] = field(default_factory=dict)
    published_alpha: float | None = None
    cost: Mapping[str, Spread] = field(default_factory=dict)
    published_cost: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return {**asdict(self), "test": None if self.test is None else self.test.to_dict()}


@dataclass(frozen=True)
class BenchTask:
    """One task of one experiment. `num_validation` examples chose an α; `tests`: a hash of those that are reported."""

    experiment: str
    task: str
    version: str
    metric: str
    higher_is_better: bool
    is_percent: bool
    num_validation: int
    num_test: int
    tests: str
    source: str
    methods: tuple[MethodSummary, ...]
    differences: tuple[Difference, ...]

    @property
    def name(self) -> str:
        """Experiment and task, once where they are called alike."""
        return self.task if self.experiment == self.task else f"{self.experiment}, {self.task}"

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        content = {key: value for key, value in vars(self).items() if not isinstance(value, tuple)}
        for name in ("methods", "differences"):
            content[name] = [each.to_dict() for each in getattr(self, name)]
        return content


@dataclass(frozen=True)
class _Answers:
    """What a method found on the test examples of a task."""

    figures: TaskFigures
    point: GridPoint

    @property
    def values(self) -> list[Any]:
        return self.figures.values(self.point, TEST)


def summarise_bench(
    bench: Bench,
    rows: RowsByRun,
    costs: Mapping[str, Row],
    errors: Mapping[str, str],
) -> list[BenchTask]:
    """Return the figures of every task of every experiment.

    `costs`: the rows of measurements by id; `errors` by run.
    """
    found = [
        _task(bench, experiment, index, rows, costs, errors)
        for experiment in bench.recipe.experiments
        for index in range(len(bench.tasks(experiment)))
    ]
    corrected = iter(holm([each.comparison.p_value for task in found for each in task.differences]))
    return [
        replace(task, differences=tuple(replace(each, p_holm=next(corrected)) for each in task.differences))
        for task in found
    ]


def chosen_alpha(planned: PlannedRun, method: Method, task: SweepTask, rows: Mapping[str, Sequence[Row]]) -> float:
    """Return a method's α: the one given, or the one that the validation examples of a task choose."""
    if method.alpha is not None:
        return method.alpha
    figures = TaskFigures(task, planned.sweep.grid, rows, seed=planned.experiment.seed)
    return figures.choose(method.rule, planned.experiment.alphas).alpha


def _task(
    bench: Bench,
    experiment: Experiment,
    index: int,
    rows: RowsByRun,
    costs: Mapping[str, Row],
    errors: Mapping[str, str],
) -> BenchTask:
    answers: dict[str, _Answers] = {}
    summaries: dict[str, MethodSummary] = {}
    runs = [planned for planned in bench.runs if planned.experiment is experiment]
    for planned in runs:
        task, of_run = planned.sweep.tasks[index], rows[planned.name]
        for method in planned.run.methods:
            if method.name in answers:  # by the run that this one would be in place of
                continue
            summary = MethodSummary(
                method.name,
                published=experiment.published_figures(task.task.name, method.name, task.metric.key),
                published_alpha=experiment.published_alphas.get(task.task.name, {}).get(method.name),
                published_cost=experiment.published_costs.get(method.name, {}),
            )
            if of_run is None:
                summaries.setdefault(method.name, replace(summary, error=errors.get(planned.name, "it was not run")))
                continue
            alpha = chosen_alpha(planned, method, task, of_run)
            figures = TaskFigures(task, planned.sweep.grid, of_run, seed=experiment.seed)
            answers[method.name] = one = _Answers(figures, GridPoint(method.rule, alpha))
            cost, error = _cost(planned, method, costs)
            if index > 0:  # examples of the first task are scored
                cost.pop("examples_per_second", None)
            summaries[method.name] = replace(
                summary,
                alpha=None if method.alone else alpha,
                is_chosen=method.alpha is None,
                test=figures.interval(one.point),
                others=figures.others(one.point),
                cost=cost,
                error=error,
            )
    task = runs[0].sweep.tasks[index]
    choosing = [planned.sweep.tasks[index].parts.validation for planned in runs if planned.run.chooses]
    return BenchTask(
        experiment.name,
        task.task.name,
        task.task.version,
        task.metric.key,
        task.metric.higher_is_better,
        all(one.test is None or one.test.method == WILSON for one in summaries.values()),
        len(choosing[0]) if choosing else 0,
        len(task.parts.test),
        _hash(task.parts.test),
        experiment.source,
        tuple(summaries[name] for name in experiment.methods),
        tuple(_differences(answers, experiment.methods)),
    )


def _differences(answers: Mapping[str, _Answers], methods: Sequence[str]) -> list[Difference]:
    known = [method for method in methods if method in answers]
    if not known:
        return []
    first = "source_ft" if "source_ft" in known else known[0]
    pairs = [(method, first) for method in known if method != first]
    pairs += [pair for pair in _PAIRS if set(pair) <= set(known) and pair not in pairs]
    return [
        Difference(a, b, answers[a].figures.compare(answers[a].values, answers[b].values), math.nan) for a, b in pairs
    ]


def _cost(planned: PlannedRun, method: Method, costs: Mapping[str, Row]) -> tuple[dict[str, Spread], str | None]:
    rounds = range(0 if planned.experiment.speed is None else planned.experiment.speed.rounds)
    names = [cost_id(planned, method, number) for number in rounds]
    whole = [costs[name] for name in names if name in costs]
    lost = [name for name in names if name not in costs]
    errors = [row["error"] for name, row in costs.items() if any(name.startswith(f"{one}{FAILED}") for one in lost)]
    found = {}
    for name in COSTS:
        values = [row[name] for row in whole if row.get(name) is not None]
        if values:
            found[name] = Spread(statistics.median(values), min(values), max(values), len(values))
    return found, errors[-1] if errors else None


def _hash(examples: Sequence[Example]) -> str:
    asked = repr([(example.id, example.requests) for example in examples])
    return hashlib.sha256(asked.encode()).hexdigest()[:16]
