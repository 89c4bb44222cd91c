"""The tables of a benchmark as texts: on the terminal and on the page alike."""

from __future__ import annotations

from collections.abc import Sequence

from ensembler.evaluation.bench.summary import BenchTask, MethodSummary, Spread
from ensembler.evaluation.bench.verdict import NAMES
from ensembler.evaluation.formats import show_difference, show_interval, show_metric, show_p
from ensembler.planning.budgets import show_size

_COSTS = {
    "tokens_per_second": "tokens/s",
    "examples_per_second": "examples/s",
    "first_token_seconds": "first token, ms",
    "peak_device_bytes": "peak device memory",
    "peak_host_bytes": "peak host memory",
    "weight_bytes": "weights",
    "setup_seconds": "set-up, s",
}
_SIZES = ("peak_device_bytes", "peak_host_bytes", "weight_bytes")


def heading(task: BenchTask) -> str:
    """Return how many examples there were, and whence published figures come."""
    said = f"{task.num_test:,} test examples"
    if task.num_validation:
        said += f"; alpha was chosen on {task.num_validation:,} others"
    if task.source:
        said += f". Published figures: {task.source}"
    return f"{said}."


def columns(task: BenchTask) -> list[str]:
    """Return the names of the columns that any method of a task fills."""
    metric = show_metric(task.metric, percent=task.is_percent)
    published = ["published"] if _is_published(task, task.metric) else []
    against = _against(task)
    compared = [] if against is None else [f"− {NAMES[against]}", "p (Holm)"]
    others = [name for key in _others(task) for name in (key, "published")]
    costs = (_COSTS[name] for name in _costs(task))
    return ["method", "α", f"{metric} (95 % interval)", *published, *compared, *others, *costs]


def rows(task: BenchTask) -> list[list[str]]:
    """Return a row of texts for each method."""
    return [_row(method, task) for method in task.methods]


def differences(task: BenchTask) -> list[list[str]]:
    """Return a row of texts for each comparison."""
    return [
        [
            f"{NAMES[each.method]} − {NAMES[each.against]}",
            show_difference(each.comparison, percent=task.is_percent),
            show_p(each.comparison.p_value),
            show_p(each.p_holm),
            each.comparison.test,
        ]
        for each in task.differences
    ]


def notes(task: BenchTask) -> list[str]:
    """Return why the cost of a method, or some of its measurements, is missing."""
    failed = [method for method in task.methods if method.test is not None and method.error is not None]
    return [f"{NAMES[method.method]} could not be measured in every round: {method.error}" for method in failed]


def _row(method: MethodSummary, task: BenchTask) -> list[str]:
    name = NAMES[method.method]
    if method.test is None:
        cells = [name, "", f"failed: {method.error}"]
    else:
        cells = [name, _alpha(method), show_interval(method.test, percent=task.is_percent)]
    if _is_published(task, task.metric):
        cells.append(_number(method.published.get(task.metric)))
    if _against(task) is not None:
        cells += _compared(method, task)
    for key in _others(task):
        cells += [_number(method.others.get(key)), _number(method.published.get(key))]
    return [*cells, *(_show(cost, method) for cost in _costs(task))]


def _alpha(method: MethodSummary) -> str:
    """Its α, and a paper's behind it."""
    alpha = "" if method.alpha is None else f"{method.alpha:g}" + ("" if method.is_chosen else " (given)")
    if method.published_alpha is None:
        return alpha
    return f"{alpha}; published {method.published_alpha:g}"


def _compared(method: MethodSummary, task: BenchTask) -> list[str]:
    pair = (method.method, _against(task))
    for each in task.differences:
        if (each.method, each.against) == pair:
            return [show_difference(each.comparison, percent=task.is_percent), show_p(each.p_holm)]
    return ["", ""]


def _against(task: BenchTask) -> str | None:
    """The method that all are compared with."""
    return task.differences[0].against if task.differences else None


def _is_published(task: BenchTask, metric: str) -> bool:
    return any(metric in method.published for method in task.methods)


def _others(task: BenchTask) -> list[str]:
    """The other metrics that a paper has."""
    keys = dict.fromkeys(key for method in task.methods for key in method.published)
    return [key for key in keys if key != task.metric]


def _costs(task: BenchTask) -> Sequence[str]:
    methods = task.methods
    return [name for name in _COSTS if any(name in method.cost or name in method.published_cost for method in methods)]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _show(name: str, method: MethodSummary) -> str:
    """A cost: sizes, which vary little, by their median; others with their range; and the published one behind it."""
    spread, published = method.cost.get(name), method.published_cost.get(name)
    measured = "" if spread is None else _spread(name, spread)
    if published is None:
        return measured
    told = f"published {show_size(int(published)) if name in _SIZES else _scaled(name, published)}"
    return f"{measured}; {told}" if measured else told


def _spread(name: str, spread: Spread) -> str:
    if name in _SIZES:
        return show_size(int(spread.median))
    median, low, high = (_scaled(name, value) for value in (spread.median, spread.low, spread.high))
    return f"{median} ({low} to {high})"


def _scaled(name: str, value: float) -> str:
    return f"{1000.0 * value if name == 'first_token_seconds' else value:.3g}"
