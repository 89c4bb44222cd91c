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
_ONCE = ("peak_device_bytes", "peak_host_bytes", "weight_bytes")  # sizes vary little: the median alone


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
    published = ["published"] if any(method.published is not None for method in task.methods) else []
    against = task.differences[0].against if task.differences else None
    compared = [] if against is None else [f"− {NAMES[against]}", "p (Holm)"]
    costs = (_COSTS[name] for name in _costs(task))
    return ["method", "α", f"{metric} (95 % interval)", *published, *compared, *costs]


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


def _row(method: MethodSummary, task: BenchTask) -> list[str]:
    name = NAMES[method.method]
    if method.test is None:
        cells = [name, "", f"failed: {method.error}"]
    else:
        alpha = "" if method.alpha is None else f"{method.alpha:g}" + ("" if method.is_chosen else " (given)")
        cells = [name, alpha, show_interval(method.test, percent=task.is_percent)]
    if any(each.published is not None for each in task.methods):
        cells.append("" if method.published is None else f"{method.published:g}")
    if task.differences:
        against = task.differences[0].against
        found = [each for each in task.differences if (each.method, each.against) == (method.method, against)]
        cells += (
            [show_difference(found[0].comparison, percent=task.is_percent), show_p(found[0].p_holm)]
            if found
            else ["", ""]
        )
    return [*cells, *(_show(cost, method.cost.get(cost)) for cost in _costs(task))]


def _costs(task: BenchTask) -> Sequence[str]:
    return [name for name in _COSTS if any(name in method.cost for method in task.methods)]


def _show(name: str, spread: Spread | None) -> str:
    if spread is None:
        return ""
    if name in _ONCE:
        return show_size(int(spread.median))
    scale = 1000.0 if name == "first_token_seconds" else 1.0
    median, low, high = (f"{scale * value:.3g}" for value in (spread.median, spread.low, spread.high))
    return f"{median} ({low} to {high})"
