"""Figures from results: of each study and task the curve, every method beside its cost, and paired comparisons."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any

from ensembler.engine.grid import GridPoint
from ensembler.evaluation.decisions import detectable_effect
from ensembler.evaluation.documents import REPEATED, TEST, VALIDATION, PlannedTask
from ensembler.evaluation.ensemble_plan import Plan
from ensembler.evaluation.figures import (
    BY_PERPLEXITY,
    BY_VALIDATION,
    COSTS,
    GIVEN,
    CurvePoint,
    Difference,
    MethodFigure,
    Spread,
    TaskFigures,
)
from ensembler.evaluation.methods import Method, Study, finished_runs
from ensembler.evaluation.results_file import Results
from ensembler.evaluation.statistics import LEVEL, Selection, holm
from ensembler.evaluation.values import Statistics, TaskValues, Values, choose
from ensembler.files import digest

COST = "cost"  # the kind of notes of measurements


@dataclass(frozen=True)
class _Source:
    """Results of studies, and why runs failed, by their names."""

    results: Results
    studies: Sequence[Study]
    errors: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def finished(self) -> Mapping[str, bool]:
        """Return whether each run is finished, by its name."""
        return finished_runs(self.studies, self.results)

    @cached_property
    def read(self) -> Callable[[str, str], dict[str, list[Any]]]:
        """`Results.values`, which reads all rows of a run, once for each run and metric."""
        return cache(self.results.values)

    @property
    def num_comparisons(self) -> int:
        """The number of comparisons where nothing failed."""
        return sum(len(study.pairs(study.method_keys)) * len(study.plans[0].tasks) for study in self.studies)


@dataclass(frozen=True)
class _Answered:
    """A method that has all its answers: its values and its point of the grid for each seed of training."""

    method: Method
    plan: Plan
    found: Sequence[TaskValues]
    points: Sequence[GridPoint]
    selection: Selection | None

    @property
    def point(self) -> GridPoint:
        """The point of the first seed; those of others may be of a member alone."""
        return self.points[0]

    def is_also(self, other: _Answered) -> bool:
        """Return whether both are one rule at one α."""
        return self.method.has_alpha and other.method.has_alpha and self.point == other.point

    def values(self) -> list[Values]:
        """The values of the test documents for each seed."""
        return [one.values(point, TEST) for one, point in zip(self.found, self.points, strict=True)]


def summarise(studies: Sequence[Study], results: Results, errors: Mapping[str, str] | None = None) -> list[TaskFigures]:
    """Return the figures of every task of every study; `errors` says why runs failed, by their name.

    p values are corrected together, over all comparisons that could be tested (Holm); those of alike by themselves.
    """
    source = _Source(results, studies, errors or {})
    found = [_task(study, index, source) for study in studies for index in range(len(study.plans[0].tasks))]
    everything = [each for task in found for each in task.differences]
    corrected = iter(holm([each.comparison.p_value for each in everything]))
    equivalent = iter(holm([each.p_equivalent for each in everything if each.p_equivalent is not None]))
    level = (1 - LEVEL) / max(1, sum(not math.isnan(each.comparison.p_value) for each in everything))

    def correct(each: Difference, task: TaskFigures) -> Difference:
        detectable = detectable_effect(each.comparison, level=level)
        return replace(
            each,
            p_holm=next(corrected),
            detectable=math.inf if task.is_percent and detectable > 1 else detectable,
            p_equivalent=None if each.p_equivalent is None else next(equivalent),
        )

    return [replace(task, differences=tuple(correct(each, task) for each in task.differences)) for task in found]


def chosen_alpha(study: Study, key: str, index: int, results: Results) -> float:
    """Return the α of a method: the one given, or the one that the validation documents of a task choose."""
    source = _Source(results, [study])
    return _answered(study, key, index, source).point.alpha


def _task(study: Study, index: int, source: _Source) -> TaskFigures:
    plan = study.plans[0]
    task, options = plan.tasks[index], plan.options
    numbers = Statistics(task, options.cluster, options.seed, source.num_comparisons)
    answered: dict[str, _Answered] = {}
    figures: dict[str, MethodFigure] = {}
    for key in study.method_keys:
        if study.plans_of(key, source.finished) is None:
            figures[key] = _failed(study, key, task, source.errors)
            continue
        one = _answered(study, key, index, source)
        if study.experiment is None and any(one.is_also(other) for other in answered.values()):
            continue  # a rule whose chosen α is 1
        answered[key] = one
        figures[key] = _figure(study, one, index, numbers, source.results)
    margin, not_measured = options.margin, _not_measured(figures, study)
    scale = 100 if task.metric.is_percent else 1
    estimates = [one.test.estimate for one in figures.values() if one.test is not None]
    if margin is not None and margin >= scale and all(abs(estimate) <= 1 for estimate in estimates):
        unit = "points" if task.metric.is_percent else f"the unit of {task.metric.key}"
        fault = f"the margin of {margin:g} is in {unit}, and all figures lie between -{scale} and {scale}"
        not_measured.append(f"which methods are alike: {fault}; give a margin below {scale}")
        margin = None
    requests = [(one.name, [getattr(each, "args", each) for each in one.requests]) for one in task.subsets[TEST]]
    choosing = [one.tasks[index] for one in study.plans if one.run.chooses]
    return TaskFigures(
        experiment=study.name,
        task=task.task.name,
        version=task.task.version,
        metric=task.metric.key,
        higher_is_better=task.metric.higher_is_better,
        is_percent=task.metric.is_percent,
        num_validation=len(choosing[0].subsets[VALIDATION]) if choosing else 0,
        num_test=len(task.subsets[TEST]),
        tests=digest(repr(requests), 16),
        methods=tuple(figures.values()),
        differences=tuple(_differences(study, answered, numbers, None if margin is None else margin / scale)),
        curve=tuple(_curve(study, index, source, numbers)),
        levels=tuple(key for key, one in answered.items() if one.method.alone is not None),
        cluster=options.cluster,
        num_clusters=None if numbers.clusters is None else len(set(numbers.clusters)),
        margin=margin,
        source="" if study.experiment is None else study.experiment.source,
        notes=tuple(_notes(task.task.notes, (choosing or [task])[0], study, index)),
        not_measured=tuple(not_measured),
    )


def _answered(study: Study, key: str, index: int, source: _Source) -> _Answered:
    plans = study.plans_of(key, source.finished)
    assert plans is not None
    methods = [plan.run.method(key) for plan in plans]
    method = methods[0]
    found = [TaskValues(plan, index, source.read) for plan in plans]
    selection = choose(found, plans[0].options, method.rule, study.alphas) if method.alpha is None else None
    alphas = [each.alpha if selection is None else selection.alpha for each in methods]
    points = [GridPoint(each.rule, alpha) for each, alpha in zip(methods, alphas, strict=True) if alpha is not None]
    return _Answered(method, plans[0], found, points, selection)


def _figure(study: Study, one: _Answered, index: int, numbers: Statistics, results: Results) -> MethodFigure:
    method, seeds, task = one.method, one.values(), one.found[0].task
    of_seeds = list(zip(one.found, one.points, strict=True))
    others = [found.others(point) for found, point in of_seeds]
    by = BY_PERPLEXITY if one.plan.options.by_perplexity else BY_VALIDATION
    is_given = method.has_alpha and one.selection is None and not method.key.endswith(" at 1")
    has_point = study.experiment is None and method.key == method.rule
    cost, error = _cost(study, one, index, results)
    return MethodFigure(
        method.key,
        f"{method.label} α = {one.point.alpha:g}" if has_point else method.label,
        method.rule,
        alpha=one.point.alpha if method.has_alpha else None,
        chosen_by=by if one.selection is not None else GIVEN if is_given else None,
        selection=one.selection,
        test=numbers.interval(seeds),
        standard_error=one.found[0].standard_error(one.point, TEST) if len(seeds) == 1 else None,
        others={key: sum(of_seed[key] for of_seed in others) / len(others) for key in others[0]},
        seeds=tuple(found.estimate(point, TEST) for found, point in of_seeds) if len(seeds) > 1 else (),
        cost=cost,
        error=error,
        **_published(study, method.key, task),
    )


def _failed(study: Study, key: str, task: PlannedTask, errors: Mapping[str, str]) -> MethodFigure:
    plans = [plan for plan in study.plans if plan.run.has(key)]
    method = plans[0].run.method(key)
    error = next((errors[plan.name] for plan in plans if plan.name in errors), "it was not run")
    return MethodFigure(key, method.label, method.rule, error=error, **_published(study, key, task))


def _published(study: Study, key: str, task: PlannedTask) -> dict[str, Any]:
    experiment = study.experiment
    if experiment is None:
        return {}
    return {
        "published": experiment.published_figures(task.task.name, key, task.metric.key),
        "published_alpha": experiment.published_alphas.get(task.task.name, {}).get(key),
        "published_cost": dict(experiment.published_costs.get(key, {})),
    }


def _curve(study: Study, index: int, source: _Source, numbers: Statistics) -> list[CurvePoint]:
    """The metric at every point of the first run of each rule with a grid; of a benchmark, where an α was chosen."""
    curve: dict[GridPoint, CurvePoint] = {}
    for plan in study.plans:
        has_grid = study.experiment is None or plan.run.chooses
        if source.finished[plan.name] and plan.run.seed in (None, 0) and has_grid:
            found = TaskValues(plan, index, source.read)
            chooses = bool(plan.tasks[index].subsets[VALIDATION])
            of_rules = (method for method in reversed(plan.run.methods) if method.has_alpha)
            methods = {method.rule: method.key for method in of_rules}  # of two in a sweep not the one at α = 1
            known = {point.rule for point in curve}
            curve |= {
                point: CurvePoint(
                    methods[point.rule],
                    point.rule,
                    point.alpha,
                    numbers.quick_interval(found.values(point, TEST)),
                    found.estimate(point, VALIDATION) if chooses else None,
                )
                for point in plan.points
                if point.alpha in study.alphas and point.rule not in known
            }
    return list(curve.values())


def _differences(
    study: Study, answered: Mapping[str, _Answered], numbers: Statistics, margin: float | None
) -> list[Difference]:
    """All pairs; of a sweep those of different formulas, each once: base-change and EFT are the same at α = 1."""
    found: list[Difference] = []
    known: set[frozenset[object]] = set()
    for key, against in study.pairs(list(answered)):
        a, b = answered[key], answered[against]
        if a.plan is b.plan:
            formulas = frozenset(one.plan.formula(one.point) for one in (a, b))
            if study.experiment is None and (len(formulas) < 2 or formulas in known):
                continue
            known.add(formulas)
        values = (a.values(), b.values())
        p_equivalent = None if margin is None else numbers.p_equivalent(*values, margin)
        found.append(Difference(key, against, numbers.compare(*values), math.nan, p_equivalent=p_equivalent))
    return found


def cost_name(study: Study, key: str) -> str:
    """Return the name of the notes of a method's costs."""
    return f"{study.name}/{key}"


def _cost(study: Study, one: _Answered, index: int, results: Results) -> tuple[dict[str, Spread], str | None]:
    """Costs over the rounds by name, and why a measurement failed, if one did: at its α, on the machine of the last."""
    known = results.notes(COST)
    last = _machine(known[-1][1]) if known else None
    notes = [
        content
        for name, content in known
        if name == cost_name(study, one.method.key)
        and content["alpha"] == one.point.alpha
        and _machine(content) == last
    ]
    whole = {content["round"]: content for content in notes if "error" not in content}
    lost = [content["error"] for content in notes if "error" in content and content["round"] not in whole]
    names = [name for name in COSTS if name != "examples_per_second" or index == 0]  # of the first task's documents
    found = {}
    for name in names:
        values = [content[name] for content in whole.values() if content.get(name) is not None]
        if values:
            found[name] = Spread(statistics.median(values), min(values), max(values), len(values))
    return found, lost[-1] if lost else None


def _machine(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a note tells of the machine."""
    return {key: value for key, value in content.items() if key not in (*COSTS, "round", "alpha", "error")}


def _notes(own: Sequence[str], task: PlannedTask, study: Study, index: int) -> list[str]:
    notes = list(own)
    num_drawn = len(task.subsets[VALIDATION])
    if num_drawn and not any(plan.run.chooses for plan in study.plans):
        notes.append(f"{num_drawn:,} drawn for validation are not reported; all alphas were given")
    if repeated := len(task.subsets[REPEATED]):
        notes.append(f"{repeated:,} left out of validation since test has them too")
    if num_cut := max(plan.tasks[index].num_cut for plan in study.plans):
        notes.append(f"{num_cut:,} requests cut on the left to fit into the shortest context")
    if study.experiment is not None and study.experiment.seeds:
        of_first = "the curve and the documents that alpha changed are of the first"
        num = len(study.experiment.seeds)
        notes.append(f"{num} seeds of training; the alpha of a method is the same for all, and {of_first}")
    return notes


def _not_measured(figures: Mapping[str, MethodFigure], study: Study) -> list[str]:
    lines = [f"{one.label}: {one.error}" for one in figures.values() if one.test is None]
    for one in figures.values():
        if one.test is not None and one.error is not None:
            lines.append(f"{one.label} could not be measured in every round: {one.error}")
    if study.experiment is not None and study.experiment.speed is None:
        lines.append("speed and memory")
    return lines
