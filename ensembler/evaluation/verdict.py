"""Put the figures of a task into sentences that claim no more than the rows show."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ensembler.evaluation.figures import BY_PERPLEXITY, Difference, TaskFigures
from ensembler.evaluation.statistics import LEVEL
from ensembler.evaluation.tables import show_margin, show_number, show_p, show_points

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
    edges = (sign * interval.estimate, *sorted((sign * interval.low, sign * interval.high)))
    size, low, high = (show_number(edge, percent=percent) for edge in edges)
    better = "better" if (sign > 0) == task.higher_is_better else "worse"
    names = f"{task.label(each.method)} is {better} than {task.label(each.against)}"
    return f"{names} by {size}{' points' if percent else ''} ({low} to {high})"


def _alike(each: Difference, task: TaskFigures) -> str:
    is_as_good = "is" if is_shown(each.p_equivalent) else "is not shown to be"
    names = f"{task.label(each.method)} {is_as_good} as good as {task.label(each.against)}"
    return f"{names} to within {show_margin(task)}, p = {show_p(each.p_equivalent)}"


def _unclear(each: Difference, task: TaskFigures) -> str:
    pair = f"{task.label(each.method)} and {task.label(each.against)}"
    if math.isnan(each.comparison.p_value):
        return f"the difference between {pair} could not be tested ({each.comparison.test})"
    said = f"no difference seen between {pair}"
    these = f"these {each.comparison.difference.num_rows:,} documents"
    if math.isinf(each.detectable):
        said += f"; {these} are too few to show one of any size"
    elif math.isfinite(each.detectable):
        said += f"; {these} would have shown one of {show_points(each.detectable, task)}"
    return said if each.p_equivalent is None else f"{said}; {_alike(each, task)}"


def _choices(task: TaskFigures) -> Iterator[str]:
    """Say how each α was chosen, and of which curves nothing chose one."""
    for method in task.methods:
        if (selection := method.selection) is not None:
            said = f"{method.name}: alpha {selection.alpha:g} was chosen"
            if method.chosen_by == BY_PERPLEXITY:
                by = f"it gives the prompts the highest likelihood (perplexity {show_number(selection.metric)})"
                yield f"{said} without labels: {by}"
            else:
                is_best = selection.threshold == selection.best_metric
                but = "" if is_best else f", within one standard error of the best, alpha {selection.best:g}"
                yield f"{said} on {task.num_validation:,} validation documents{but}"
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
