"""Figures as texts: numbers, and the tables of the terminal and of the page. A table is rows with the same columns."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ensembler.evaluation.figures import COSTS, Difference, MethodFigure, TaskFigures
from ensembler.evaluation.statistics import Interval
from ensembler.planning.budgets import show_digits, show_size

_DIFFERENCE, _P_HOLM = "difference (95 % interval)", "p (Holm)"

Table = list[dict[str, str]]


def show_number(number: float | None, *, percent: bool = False) -> str:
    """Return one number: tenths of a percent, or three significant digits; "?" of NaN, "" of None."""
    if number is None:
        return ""
    return (f"{100 * number:z.1f}" if percent else show_digits(number)).replace("nan", "?")


def show_interval(interval: Interval, *, percent: bool) -> str:
    """Return an estimate with its interval, where it has one."""
    edges = (interval.estimate, interval.low, interval.high)
    estimate, low, high = (show_number(edge, percent=percent) for edge in edges)
    return estimate if low in ("", "?") else f"{estimate} ({low} to {high})"


def show_points(number: float, task: TaskFigures) -> str:
    """Return a difference of a task's metric with its unit."""
    return show_number(number, percent=task.is_percent) + (" points" if task.is_percent else "")


def show_cost(name: str, value: float) -> str:
    """Return a cost, given by its name in `COSTS`, in the unit of tables."""
    if name.endswith("_bytes"):
        return show_size(value)
    return show_number(1000 * value if name == "first_token_seconds" else value)


def show_p(p_value: float | None) -> str:
    """Return a p value with two digits, as a power where it is small; "?" of NaN, "" of None."""
    if p_value is None:
        return ""
    return (f"{p_value:.2g}" if p_value < 0.001 else f"{p_value:.3f}").replace("nan", "?")


def show_margin(task: TaskFigures) -> str:
    """Return the margin of equivalence with its unit."""
    return f"{task.margin or 0:g} {'points' if task.is_percent else f'in {task.metric}'}"


def metric_name(task: TaskFigures) -> str:
    """Return the metric's name with its unit."""
    return f"{task.metric}, %" if task.is_percent else task.metric


def heading(task: TaskFigures) -> str:
    """Return how many documents there were, and where published figures come from."""
    said = f"{task.num_test:,} test documents"
    if task.cluster is not None:
        said += f" in {task.num_clusters or 0:,} groups by {task.cluster}, on which intervals and tests rest"
    if task.num_validation:
        said += f"; {task.num_validation:,} others chose alpha"
    is_versioned = task.version not in ("Yaml", "None")  # lm-eval's words for none
    said += f". Version {task.version} of the task, metric" if is_versioned else ". Metric"
    said += f" {task.metric}." if task.higher_is_better else f" {task.metric} (lower is better)."
    return f"{said} Published figures: {task.source}." if task.source else said


def method_table(task: TaskFigures) -> Table:
    """Return a row for each method: α, the metric, the difference to the method that all are compared with."""
    return _without_empty([dict(_method_cells(method, task)) for method in task.methods])


def cost_table(task: TaskFigures) -> Table:
    """Return a row for each method with a cost."""
    used = {name for method in task.methods for name in (*method.cost, *method.published_cost)}
    costs = {name: label for name, label in COSTS.items() if name in used}
    methods = [method for method in task.methods if method.cost or method.published_cost]
    return [{"method": one.title, **{label: _cost(name, one) for name, label in costs.items()}} for one in methods]


def difference_table(task: TaskFigures) -> Table:
    """Return a row for each comparison."""
    return _without_empty([_difference_cells(each, task) for each in task.differences])


def _without_empty(rows: Table) -> Table:
    """Leave out the columns that no row fills."""
    filled = {name for row in rows for name, cell in row.items() if cell}
    return [{name: cell for name, cell in row.items() if name in filled} for row in rows]


def _method_cells(method: MethodFigure, task: TaskFigures) -> Iterator[tuple[str, str]]:
    percent = task.is_percent
    alpha = show_number(method.alpha) if method.chosen_by is None else f"{method.alpha:g} ({method.chosen_by})"
    yield "method", method.name
    published = "" if method.published_alpha is None else f"published {method.published_alpha:g}"
    yield "α", "; ".join(filter(None, (alpha, published)))
    found = f"failed: {method.error}" if method.test is None else show_interval(method.test, percent=percent)
    yield f"{metric_name(task)} (95 % interval)", found
    yield f"without {task.metric}", "" if method.test is None else _left_out(method.test, task)
    yield "published", show_number(method.published.get(task.metric))
    yield "by seed", ", ".join(show_number(seed, percent=percent) for seed in method.seeds)
    if task.differences:
        against = task.differences[0].against
        compared = {each.method: _difference_cells(each, task) for each in task.differences if each.against == against}
        cells = compared.get(method.method, {})
        yield f"− {task.label(against)}", cells.get(_DIFFERENCE, "")
        yield _P_HOLM, cells.get(_P_HOLM, "")
    for key in dict.fromkeys(key for one in task.methods for key in (*one.others, *one.published)):
        if key != task.metric:
            yield key, show_number(method.others.get(key))
            yield f"{key}, published", show_number(method.published.get(key))


def _difference_cells(each: Difference, task: TaskFigures) -> dict[str, str]:
    difference, percent = each.comparison.difference, task.is_percent
    sign = "+" if difference.estimate > 0 else ""
    return {
        "compared on the same documents": f"{task.label(each.method)} − {task.label(each.against)}",
        _DIFFERENCE: sign + show_interval(difference, percent=percent),
        "p": show_p(each.comparison.p_value),
        _P_HOLM: show_p(each.p_holm),
        "test": each.comparison.test,
        f"without {task.metric}": _left_out(difference, task),
        "would have shown": show_number(each.detectable if math.isfinite(each.detectable) else None, percent=percent),
        f"p of alike to within {show_margin(task)}": show_p(each.p_equivalent),
    }


def _left_out(interval: Interval, task: TaskFigures) -> str:
    num = task.num_test - interval.num_rows
    return f"{num:,} documents" if num else ""


def _cost(name: str, method: MethodFigure) -> str:
    """The median; its range, but of sizes, which vary little; and the published one behind it."""
    said = []
    if spread := method.cost.get(name):
        low, high = show_cost(name, spread.low), show_cost(name, spread.high)
        said.append(show_cost(name, spread.median) + ("" if name.endswith("_bytes") else f" ({low} to {high})"))
    if name in method.published_cost:
        said.append(f"published {show_cost(name, method.published_cost[name])}")
    return "; ".join(said)
