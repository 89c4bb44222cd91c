"""Pictures of a benchmark, as PNG: figures with intervals by method, and what they cost."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from ensembler.evaluation.bench.summary import BenchTask, MethodSummary
from ensembler.evaluation.bench.verdict import NAMES
from ensembler.extras import require

_COLOURS = {
    "source_ft": "#555555",
    "source_pt": "#999999",
    "target_pt": "#b0a070",
    "base-change": "#1f6fb4",
    "eft": "#d9730d",
    "patch": "#2e8b57",
    "patch+base-change": "#8a4fbf",
    "direct": "#b03060",
}


def draw_metrics(tasks: Sequence[BenchTask]) -> bytes:
    """Return a PNG with one panel per task: every method's metric on the test examples with its 95 % interval."""
    return _draw(tasks, _draw_metrics)


def draw_against(tasks: Sequence[BenchTask], cost: str, name: str, scale: float = 1.0) -> bytes | None:
    """Return a PNG with one panel per task: the metric against a cost (`COSTS`); None if unmeasured.

    `name` is that of the axis, `scale` what one unit of it is.
    """
    measured = [task for task in tasks if any(cost in method.cost for method in task.methods)]
    return _draw(measured, lambda axes, task: _draw_against(axes, task, cost, name, scale)) if measured else None


def _draw(tasks: Sequence[BenchTask], draw: Any) -> bytes:
    figure = require("matplotlib.figure", "eval").Figure(
        figsize=(8.5, 0.4 + 3.2 * len(tasks)), layout="constrained", dpi=100
    )
    for axes, task in zip(figure.subplots(len(tasks), squeeze=False)[:, 0], tasks, strict=True):
        draw(axes, task)
        axes.set_title(task.name)
        axes.grid(alpha=0.25)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "ensembler"})
    return buffer.getvalue()


def _draw_metrics(axes: Any, task: BenchTask) -> None:
    methods = [method for method in task.methods if method.test is not None]
    for height, method in enumerate(reversed(methods)):
        _point(axes, method, (_estimate(method), height), across=True)
    axes.set_yticks(range(len(methods)), [_label(method) for method in reversed(methods)])
    axes.set_ylim(-0.6, len(methods) - 0.4)
    axes.set_xlabel(task.metric)


def _draw_against(axes: Any, task: BenchTask, cost: str, name: str, scale: float) -> None:
    for method in task.methods:
        if method.test is not None and cost in method.cost:
            _point(axes, method, (method.cost[cost].median / scale, _estimate(method)), across=False)
    axes.set_xlim(left=0)
    axes.set_xlabel(name)
    axes.set_ylabel(task.metric)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _point(axes: Any, method: MethodSummary, place: tuple[float, float], *, across: bool) -> None:
    assert method.test is not None
    low, high = method.test.low, method.test.high
    reach = None
    if math.isfinite(low) and math.isfinite(high):
        reach = [[method.test.estimate - low], [high - method.test.estimate]]
    errors = {"xerr" if across else "yerr": reach}
    axes.errorbar(
        [place[0]], [place[1]], **errors, fmt="o", color=_COLOURS[method.method], capsize=3, label=_label(method)
    )


def _estimate(method: MethodSummary) -> float:
    assert method.test is not None
    return method.test.estimate


def _label(method: MethodSummary) -> str:
    name = NAMES[method.method]
    return name if method.alpha is None else f"{name}, α = {method.alpha:g}"
