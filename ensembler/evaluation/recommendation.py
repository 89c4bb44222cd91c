"""Recommend which method of a task to deploy, and say how sure that is. Never rests on a difference that is not shown.

Knows figures only; cheap means few models in memory, by the kind of method and not by what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from ensembler.evaluation.figures import BY_PERPLEXITY, BY_VALIDATION, COSTS, Difference, MethodFigure, TaskFigures
from ensembler.evaluation.tables import show_cost, show_interval, show_margin, show_p, show_points
from ensembler.evaluation.verdict import is_shown, tell_difference

_KEPT, _LOADED, _PATCHED, _TUNED, _ENSEMBLE = range(5)  # what a method takes, the cheapest first
_KINDS = {"source_ft": _KEPT, "patch": _PATCHED, "direct": _TUNED}
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
    said = "keep source FT as it is" if pick.method == "source_ft" else f"deploy {pick.title}"
    return [
        said,
        *_reasons(pick, task),
        *([f"not considered, since they failed: {', '.join(failed)}"] if failed else []),
        _costs(pick, _by_cost(task)[0]),
        *(f"warning: {line}" for line in (*_too_few(pick, task), *_edges(task), *_flat_curves(task))),
    ]


def _by_cost(task: TaskFigures) -> list[MethodFigure]:
    """The methods with figures, the cheapest first; of those that cost the same, the best on validation documents."""

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
    else:
        yield _over(pick, current, task)
    alike = [one.title for one, each in rivals if each is not None and is_shown(each.p_equivalent)]
    unclear = [one.title for one, each in rivals if each is not None and not is_shown(each.p_equivalent)]
    untested = [one.title for one, each in rivals if each is None]
    if alike:
        yield f"shown to be as good to within {show_margin(task)}: {'; '.join(alike)}"
    if unclear:
        yield f"not shown to be better or worse than it: {'; '.join(unclear)}"
    if untested:
        yield f"not tested against it, nor told apart by intervals: {'; '.join(untested)}"
    tested = _unclear(pick, task)
    if any(math.isinf(each.detectable) for _, each in tested):
        yield f"{task.num_test:,} documents are too few to show a difference of any size"
    elif known := [one for one in tested if math.isfinite(one[1].detectable)]:
        rival, each = max(known, key=lambda one: one[1].detectable)
        size = show_points(each.detectable, task)
        yield f"a difference below {size} to {rival.title} may have gone unseen on {task.num_test:,} documents"


def _over(pick: MethodFigure, current: MethodFigure, task: TaskFigures) -> str:
    """Return the reason to put the recommended method in the place of the one in use."""
    each = task.compared(pick.method, current.method)
    if each is not None:
        return f"{tell_difference(each, task)}, p = {show_p(each.p_holm)} after correction"
    shown = (show_interval(one.test, percent=task.is_percent) for one in (pick, current) if one.test is not None)
    return f"better than {current.name} by intervals that do not overlap, {' and '.join(shown)}; no test compared them"


def _unclear(pick: MethodFigure, task: TaskFigures) -> list[tuple[MethodFigure, Difference]]:
    """The methods whose comparison with the recommended one showed nothing."""
    tested = [(one, each) for one, each in _rivals(pick, task) if each is not None]
    return [(one, each) for one, each in tested if not is_shown(each.p_equivalent)]


def _costs(pick: MethodFigure, current: MethodFigure) -> str:
    found = []
    for name in (_SPEED, next((one for one in _MEMORY if one in pick.cost), "")):
        if name in pick.cost:
            said = f"{COSTS[name]} {show_cost(name, pick.cost[name].median)}"
            if name in current.cost and current.method != pick.method:
                said += f" ({current.name} {show_cost(name, current.cost[name].median)})"
            found.append(said)
    runs = "one model runs" if pick.alpha is None else "all members run"
    return f"cost: {runs}; {', '.join(found) or 'speed and memory were not measured'}"


def _too_few(pick: MethodFigure, task: TaskFigures) -> Iterator[str]:
    """Of differences that were not seen, the one that needs most documents: the margin, or a rival's lead.

    A lead within its standard error is left out. The difference that is seen falls with the root of the number of
    documents, as long as two methods disagree as often; more documents do not show what varies with the seed.
    """
    found = []
    for rival, each in _unclear(pick, task):
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
    size = show_points(wished, task)
    has_seeds = each.comparison.test.startswith("seeds")
    by = "more documents and seeds of training" if has_seeds else f"about {_round_up(num):,} documents"
    if task.margin is None:
        yield f"{rival.title} is ahead by {size}, which {task.num_test:,} documents do not show; {by} would"
    else:
        yield f"{task.num_test:,} documents do not show a difference of {size} to {rival.title}; {by} would"


def _round_up(num: float) -> int:
    """A number to two digits, upwards."""
    unit = 10.0 ** max(0, math.floor(math.log10(num)) - 1)
    return int(unit * math.ceil(num / unit))


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
