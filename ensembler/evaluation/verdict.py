"""Sentences about the figures of a task: a verdict, a method to deploy, and whether conditions on them hold."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ensembler.errors import ConfigError, nearest
from ensembler.evaluation.figures import (
    BY_PERPLEXITY,
    BY_VALIDATION,
    COSTS,
    TRANSPORTED,
    Difference,
    MethodFigure,
    TaskFigures,
    show_cost,
    show_interval,
    show_margin,
    show_number,
    show_p,
    show_points,
)
from ensembler.evaluation.statistics import LEVEL

# Of two methods of one speed, the ranges over 4 rounds do not overlap in 2 of 70 cases (8 choose 4), over 3 in 2 of 20.
ROUNDS_FOR_A_CLAIM = 4
_SPEED = "tokens_per_second"


def verdict(task: TaskFigures) -> list[str]:
    """Return the sentences of one task.

    Differences that are significant after Holm's correction; methods that are alike to within the margin; pairs of
    which neither is shown; methods that failed; the choice of α; speed.
    """
    clear = [each for each in task.differences if is_shown(each.p_holm)]
    alike = [each for each in task.differences if is_shown(each.p_equivalent)]
    return [
        *(tell_difference(each, task) for each in clear),
        *(_alike(each, task) for each in alike),
        *(_unclear(each, task) for each in task.differences if each not in clear and each not in alike),
        *(f"{method.label} failed, so nothing is said of it" for method in task.methods if method.test is None),
        *_choices(task),
        *_speeds(task),
    ]


def is_shown(p_value: float | None) -> bool:
    """Return whether a corrected p value is small enough for a claim; None and NaN are not."""
    return p_value is not None and p_value <= 1 - LEVEL


def tell_difference(each: Difference, task: TaskFigures) -> str:
    """Say which method is better or worse than the other, by how much, with the interval."""
    interval, percent = each.comparison.difference, task.is_percent
    sign = 1 if interval.estimate > 0 else -1
    size = show_points(sign * interval.estimate, task)
    if not math.isnan(interval.low):
        low, high = (show_number(edge, percent=percent) for edge in sorted((sign * interval.low, sign * interval.high)))
        size += f" ({low} to {high})"
    better = "better" if (sign > 0) == task.higher_is_better else "worse"
    names = f"{task.label(each.method)} is {better} than {task.label(each.against)}"
    return f"{names} by {size}"


def _alike(each: Difference, task: TaskFigures) -> str:
    is_as_good = "is" if is_shown(each.p_equivalent) else "is not shown to be"
    names = f"{task.label(each.method)} {is_as_good} as good as {task.label(each.against)}"
    return f"{names} to within {show_margin(task)}, p = {show_p(each.p_equivalent)}"


def _unclear(each: Difference, task: TaskFigures) -> str:
    pair = f"{task.label(each.method)} and {task.label(each.against)}"
    if math.isnan(each.comparison.p_value):
        return f"the difference between {pair} could not be tested ({each.comparison.test})"
    text = f"no difference seen between {pair}"
    num = each.comparison.difference.num_rows
    these = f"these {num:,} documents" if num > 1 else "this one document"
    if math.isinf(each.detectable):
        text += f"; {these} {'are' if num > 1 else 'is'} too few to show one of any size"
    elif math.isfinite(each.detectable):
        text += f"; {these} would have shown one of {show_points(each.detectable, task)}"
    return text if each.p_equivalent is None else f"{text}; {_alike(each, task)}"


def _choices(task: TaskFigures) -> Iterator[str]:
    """Say how each α was chosen, and of which curves nothing chose one."""
    for method in task.methods:
        if (selection := method.selection) is not None:
            text = f"{method.name}: alpha {selection.alpha:g} was chosen"
            if method.chosen_by == BY_PERPLEXITY:
                by = f"it gives the prompts the highest likelihood (perplexity {show_number(selection.metric)})"
                yield f"{text} without labels: {by}"
            else:
                is_best = selection.threshold == selection.best_metric
                but = "" if is_best else f", within one standard error of the best, alpha {selection.best:g}"
                yield f"{text} on {task.num_validation:,} validation documents{but}"
    for rule in task.rules:
        chosen = task.chosen(rule)
        if sum(point.rule == rule for point in task.curve) == 1:
            yield f"{rule}: its alpha was the only one given, so there was nothing to choose"
        elif chosen is None:
            yield (
                f"{rule}: no alpha was chosen, since the documents that choose it cannot report it too; give "
                "--validation N or a split, or --select perplexity"
            )


def _speeds(task: TaskFigures) -> Iterator[str]:
    """Speeds of the other methods over base-change; no ratio where the ranges over the rounds overlap."""
    timed = {method.method: method for method in task.methods if _SPEED in method.cost}
    base = timed.get("base-change") or timed.get("eft")
    if base is None:
        return
    for other in (timed[key] for key in ("patch", "direct", "source_ft") if key in timed):
        fast, slow = other.cost[_SPEED], base.cost[_SPEED]
        if min(fast.num_rounds, slow.num_rounds) < ROUNDS_FOR_A_CLAIM:
            continue
        if fast.low <= slow.high and slow.low <= fast.high:
            yield f"no difference in speed seen between {other.name} and {base.name}"
        else:
            yield f"{other.name} decodes {fast.median / slow.median:.3g} × as fast as {base.name}"


_KEPT, _LOADED, _PATCHED, _TUNED, _ENSEMBLE = range(5)  # what a method takes, the cheapest first
_KINDS = {"source_ft": _KEPT, "patch": _PATCHED, "direct": _TUNED, **dict.fromkeys(TRANSPORTED, _PATCHED)}
_SPEED, _MEMORY = "tokens_per_second", ("peak_device_bytes", "peak_host_bytes", "weight_bytes")


def recommended(task: TaskFigures) -> MethodFigure | None:
    """Return the method to deploy; None where all failed.

    That is the cheapest of the methods that are shown to be better than the one in use, less those that another method
    is shown to be better than; where there is none, the one in use: source FT, or without it the cheapest method.
    """
    methods = _by_cost(task)
    if not methods:
        return None
    better = [one for one in methods if _is_better(one, methods[0], task)]
    best = [one for one in better if not any(_is_better(other, one, task) for other in methods)]
    return (best or better or methods)[0]


def recommendation(task: TaskFigures) -> list[str]:
    """Return the recommendation in sentences: what to deploy first, then why, what it costs, and warnings."""
    pick = recommended(task)
    failed = [one.name for one in task.methods if one.test is None]
    if pick is None:
        return ["none, since every method failed"]
    advice = "keep source FT as it is" if pick.method == "source_ft" else f"deploy {pick.title}"
    return [
        advice,
        *_reasons(pick, task),
        *([f"not considered, since they failed: {', '.join(failed)}"] if failed else []),
        _costs(pick, _by_cost(task)[0]),
        *(f"warning: {line}" for line in (*_too_few(pick, task), *_edges(task), *_flat_curves(task))),
    ]


def _by_cost(task: TaskFigures) -> list[MethodFigure]:
    """Return the methods with figures, the cheapest first; of equals, the best on validation documents."""

    def cost(method: MethodFigure) -> tuple[int, bool, float]:
        kind = _KINDS.get(method.method, _LOADED if method.alpha is None else _ENSEMBLE)
        on_validation = math.inf
        if method.selection is not None and method.chosen_by == BY_VALIDATION:
            on_validation = -method.selection.metric if task.higher_is_better else method.selection.metric
        return kind, method.chosen_by is None, on_validation

    return sorted((one for one in task.methods if one.test is not None), key=cost)


def _is_better(a: MethodFigure, b: MethodFigure, task: TaskFigures) -> bool:
    """Return whether `a` is shown to be better than `b`, and not shown to be alike to within the margin.

    Two methods that no test compared: whether their intervals do not overlap.
    """
    each = task.compared(a.method, b.method)
    if each is not None:
        has_more = (each.comparison.difference.estimate > 0) == (each.method == a.method)
        return is_shown(each.p_holm) and not is_shown(each.p_equivalent) and has_more == task.higher_is_better
    more, less = (a, b) if task.higher_is_better else (b, a)
    return more.test is not None and less.test is not None and more.test.low > less.test.high


def _rivals(pick: MethodFigure, task: TaskFigures) -> list[tuple[MethodFigure, Difference | None]]:
    """The methods of which neither is shown to be better, each with its comparison, if there was one."""
    others = [one for one in _by_cost(task) if one.method != pick.method]
    neither = [one for one in others if not _is_better(pick, one, task) and not _is_better(one, pick, task)]
    return [(one, task.compared(one.method, pick.method)) for one in neither]


def _reasons(pick: MethodFigure, task: TaskFigures) -> Iterator[str]:
    methods, rivals = _by_cost(task), _rivals(pick, task)
    current = methods[0]
    if len(methods) == 1:
        yield "no other method has figures to compare it with"
    elif pick.method == current.method:
        yield f"no method is shown to be better than {pick.name}" if rivals else "all others are shown to be worse"
    elif (each := task.compared(pick.method, current.method)) is not None:
        yield f"{tell_difference(each, task)}, p = {show_p(each.p_holm)} after correction"
    else:
        shown = (show_interval(one.test, percent=task.is_percent) for one in (pick, current) if one.test is not None)
        yield (
            f"better than {current.name} by intervals that do not overlap, {' and '.join(shown)}; no test compared them"
        )
    unclear = [(one, each) for one, each in rivals if each is not None and not is_shown(each.p_equivalent)]
    if alike := [one.title for one, each in rivals if each is not None and is_shown(each.p_equivalent)]:
        yield f"shown to be as good to within {show_margin(task)}: {'; '.join(alike)}"
    if unclear:
        yield f"not shown to be better or worse than it: {'; '.join(one.title for one, _ in unclear)}"
    if untested := [one.title for one, each in rivals if each is None]:
        yield f"not tested against it, nor told apart by intervals: {'; '.join(untested)}"
    if any(math.isinf(each.detectable) for _, each in unclear):
        yield f"{task.num_test:,} documents are too few to show a difference of any size"
    elif known := [one for one in unclear if math.isfinite(one[1].detectable)]:
        rival, each = max(known, key=lambda one: one[1].detectable)
        size = show_points(each.detectable, task)
        yield f"a difference below {size} to {rival.title} may have gone unseen on {task.num_test:,} documents"


def _costs(pick: MethodFigure, current: MethodFigure) -> str:
    found = []
    for name in (_SPEED, next((one for one in _MEMORY if one in pick.cost), "")):
        if name in pick.cost:
            text = f"{COSTS[name]} {show_cost(name, pick.cost[name].median)}"
            if name in current.cost and current.method != pick.method:
                text += f" ({current.name} {show_cost(name, current.cost[name].median)})"
            found.append(text)
    runs = "one model runs" if pick.alpha is None else "all members run"
    return f"cost: {runs}; {', '.join(found) or 'speed and memory were not measured'}"


def _too_few(pick: MethodFigure, task: TaskFigures) -> Iterator[str]:
    """Of differences that were not seen, the one that needs most documents: the margin, or a rival's lead.

    A lead within its standard error is left out. The difference that is seen falls with the root of the number of
    documents, as long as two methods disagree as often; more documents do not show what varies with the seed.
    """
    found = []
    for rival, each in _rivals(pick, task):
        if each is None or is_shown(each.p_equivalent):
            continue
        lead = each.comparison.difference.estimate * (1 if each.method == rival.method else -1)
        wished = lead if task.higher_is_better else -lead
        if task.margin is not None:
            wished = task.margin / (100 if task.is_percent else 1)
        elif not wished > each.comparison.difference.standard_error:
            continue
        if 0 < wished < each.detectable < math.inf:
            num = each.comparison.difference.num_rows * (each.detectable / wished) ** 2
            found.append((num, rival, wished, each))
    if not found:
        return
    num, rival, wished, each = max(found, key=lambda one: one[0])
    size, by = show_points(wished, task), "more documents and seeds of training"
    if not each.comparison.test.startswith("seeds"):
        unit = 10.0 ** max(0, math.floor(math.log10(num)) - 1)
        by = f"about {unit * math.ceil(num / unit):,.0f} documents"  # two digits, rounded up
    if task.margin is None:
        yield f"{rival.title} is ahead by {size}, which {task.num_test:,} documents do not show; {by} would"
    else:
        yield f"{task.num_test:,} documents do not show a difference of {size} to {rival.title}; {by} would"


def _edges(task: TaskFigures) -> Iterator[str]:
    """The rules whose α was chosen at the edge of the grid."""
    alphas = sorted({point.alpha for point in task.curve})
    for method in task.methods:
        is_chosen = method.chosen_by in (BY_VALIDATION, BY_PERPLEXITY)
        if not is_chosen or len(alphas) < 2 or method.alpha not in (alphas[0], alphas[-1]):
            continue
        edge = f"{method.name}: alpha {method.alpha:g} was chosen"
        if method.alpha == 0:
            yield f"{edge}, which is its anchor alone"
        else:
            yield f"{edge}, at the edge of the grid ({alphas[0]:g} to {alphas[-1]:g}); a better one may lie beyond it"


def _flat_curves(task: TaskFigures) -> Iterator[str]:
    """The rules of which no point has an interval without the figure at α = 0, or at the α nearest to it."""
    for rule in task.rules:
        first, *others = sorted((point for point in task.curve if point.rule == rule), key=lambda one: abs(one.alpha))
        if others and all(one.test.low <= first.test.estimate <= one.test.high for one in others):
            yield f"{rule}: the curve is flat: the interval at every alpha holds the figure at alpha {first.alpha:g}"


_OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_CONDITION = re.compile(r"\s*(?P<left>[a-z_+:-]*[a-z])\s*(?P<operator>[<>]=?)\s*(?P<right>[^<>=]*?)\s*")
_NUMBER = r"(\d+\.?\d*|\.\d+)(e[+-]?\d+)?"
_RIGHT = re.compile(rf"(?P<right>[a-z_+:-]*[a-z])\s*(?P<offset>[+-]\s*{_NUMBER})?|(?P<number>-?{_NUMBER})")


@dataclass(frozen=True)
class Requirement:
    """`left` OPERATOR `right` + `offset`, of the metric in the unit of the table; without `right` a bare number."""

    text: str
    left: str
    operator: str
    right: str | None
    offset: float

    @classmethod
    def parse(cls, text: str, methods: Sequence[Sequence[str]]) -> Requirement:
        """Return what a condition says; raise ConfigError where it is none, or no experiment has its methods.

        `methods`: those of each experiment.
        """
        match = _CONDITION.fullmatch(text)
        if match is None:
            raise ConfigError(f'--require {text!r} is no condition; give one such as "patch >= source_ft - 2"')
        side = _RIGHT.fullmatch(match["right"])
        if side is None:
            expected = "expected a method, a method and + or - a number, or a number"
            raise ConfigError(f"--require {text!r} has {match['right']!r} on the right; {expected}")
        left, right = match["left"], side["right"]
        all_methods = list(dict.fromkeys(method for known in methods for method in known))
        for method in (left, right):
            if method not in (None, *all_methods):
                hint = nearest(method, all_methods)
                raise ConfigError(f"--require {text!r}: no experiment has the method {method!r}{hint}")
        if not any({left, right} <= {None, *known} for known in methods):
            given = "; ".join(dict.fromkeys(", ".join(known) for known in methods))
            raise ConfigError(f"--require {text!r} is of methods of different experiments; they have {given}")
        number = "".join((side["number"] or side["offset"] or "0").split())
        return cls(text, left, match["operator"], right, float(number))

    def failures(self, tasks: Sequence[TaskFigures]) -> list[str]:
        """Return a sentence for each task with these methods on which the condition does not hold."""
        found = []
        for task in tasks:
            figures: dict[str | None, float] = {None: 0.0}
            for method in task.methods:
                estimate = math.nan if method.test is None else method.test.estimate
                figures[method.method] = estimate * (100 if task.is_percent else 1)
            if self.left in figures and self.right in figures:
                left, right = figures[self.left], figures[self.right] + self.offset
                if not _OPERATORS[self.operator](round(left, 9), round(right, 9)):  # NaN of a method that failed: never
                    found.append(f"{task.name}: {self.text} does not hold, {left:.4g} against {right:.4g}")
        return found
