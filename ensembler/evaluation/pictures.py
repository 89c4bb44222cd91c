"""Pictures of figures, drawn once for both: as SVG for the page, as PNG for a file. A picture goes by its name here."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from itertools import cycle
from typing import Any

from ensembler.evaluation.figures import COSTS, MethodFigure, TaskFigures, metric_name
from ensembler.extras import require

FILES = {
    "curve": "curve.png",
    "methods": "methods.png",
    "tokens_per_second": "speed.png",
    "peak_device_bytes": "memory.png",
    "peak_host_bytes": "memory.png",
}
_WIDTH, _LONGEST = 4.2, 60_000  # inches: letters are nearly as large as a telephone's; pixels
_INK, _GREY = "#1a1d21", "#848b94"
_COLOURS = ("#1f77c4", "#d9650d", "#1d9a6c", "#a259c4", "#c9408a", "#a8860b", "#2aa3b8", "#6f6fe0")
_INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
# Of an SVG's tags: digits that are not seen, ids that all pictures of a page have alike, fonts other than the page's.
_BULK = re.compile(r'(\.\d\d)\d+|\n| id="[\w.]+_\d+"| font-family: [^;]*;')
_STYLE = {
    "svg.fonttype": "none",  # letters stay letters, in the page's own font
    "text.parse_math": False,  # a task may be named after a sum of dollars
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    **dict.fromkeys(_INKED, _INK),
}


def pictures_of(tasks: Sequence[TaskFigures]) -> dict[str, list[TaskFigures]]:
    """Return the pictures that there are for any of the tasks, with those tasks; of two of memory that of devices."""
    found = {name: [task for task in tasks if _shown(name, task)] for name in FILES}
    if found["peak_device_bytes"]:
        del found["peak_host_bytes"]
    return {name: those for name, those in found.items() if those}


def draw_png(name: str, tasks: Sequence[TaskFigures]) -> bytes:
    """Return a picture as PNG, with one panel for each task under its name."""
    return _draw(name, tasks, "png", metadata={"Software": "ensembler"})


def draw_svg(name: str, task: TaskFigures) -> str:
    """Return a picture of one task as an SVG element in the colours of the text around it."""
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    text = _draw(name, [task], "svg", transparent=True, metadata=nothing).decode()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    return re.sub("<[^>]+>", lambda tag: _BULK.sub(r"\1", tag[0]), text)


def _shown(name: str, task: TaskFigures) -> list[MethodFigure]:
    """The methods that a picture shows: those with a finite figure."""
    found = [method for method in task.methods if method.test is not None and math.isfinite(method.test.estimate)]
    if name in COSTS:
        return [method for method in found if name in method.cost]
    is_worth_it = len(task.curve) > len(task.rules) if name == "curve" else len(found) > 1
    return found if is_worth_it else []


def _draw(name: str, tasks: Sequence[TaskFigures], kind: str, **options: Any) -> bytes:
    base, step = (0.5, 0.42) if name == "methods" else (2.8, 0.06) if name == "curve" else (2.5, 0.18)
    heights = [base + step * len(_shown(name, task)) for task in tasks]
    with require("matplotlib", "eval").rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = require("matplotlib.figure", "eval").Figure((_WIDTH, sum(heights)), layout="constrained")
        panels = figure.subplots(len(tasks), squeeze=False, height_ratios=heights)[:, 0]
        for axes, task in zip(panels, tasks, strict=True):
            _draw_task(axes, name, task)
            if kind == "png":
                axes.set_title(task.name, loc="left", fontsize="medium")
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=min(200, _LONGEST / sum(heights)), **options)
    return buffer.getvalue()


def _draw_task(axes: Any, name: str, task: TaskFigures) -> None:
    methods = _shown(name, task)
    if name == "methods":
        _draw_methods(axes, methods, task)
        axes.set_xlabel(metric_name(task))
        return
    if name == "curve":
        _draw_curve(axes, [method for method in methods if method.method in task.levels], task)
    else:
        unit = 2**30 if name.endswith("_bytes") else 1
        for method in methods:
            _draw_point(axes, method, task, x=method.cost[name].median / unit)
        axes.set_xlim(left=0)
    axes.set_xlabel("α" if name == "curve" else COSTS[name] + (", GiB" if name.endswith("_bytes") else ""))
    axes.set_ylabel(metric_name(task))
    columns = 2 if max(map(len, axes.get_legend_handles_labels()[1])) <= 24 else 1
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), borderaxespad=4.2, ncols=columns, fontsize="small")


def _draw_curve(axes: Any, levels: Sequence[MethodFigure], task: TaskFigures) -> None:
    for dashes, method in zip(cycle(("--", "-.", ":")), levels, strict=False):
        axes.axhline(_edges(method, task)[0], color=_GREY, linestyle=dashes, linewidth=1.1, label=method.name)
    for rule in task.rules:
        points = sorted((point for point in task.curve if point.rule == rule), key=lambda point: point.alpha)
        alphas, chosen = [point.alpha for point in points], task.chosen(rule)
        middle, low, high = zip(*(_edges(point, task) for point in points), strict=True)
        colour = _colour(rule if chosen is None else chosen.name, task)
        label = rule if chosen is None else f"{chosen.name}, ★ α = {chosen.alpha:g}"
        axes.fill_between(alphas, low, high, color=colour, alpha=0.16, linewidth=0)
        axes.plot(alphas, middle, ".-", color=colour, markersize=4, label=label)
        validation = [math.nan if point.validation is None else _scale(task) * point.validation for point in points]
        axes.plot(alphas, validation, ":", color=colour, linewidth=1.1)
        if chosen is not None and chosen.alpha in alphas:
            star = (chosen.alpha, middle[alphas.index(chosen.alpha)])
            axes.plot(*star, "*", markersize=13, color=colour, markeredgecolor=_INK, markeredgewidth=0.7)


def _draw_methods(axes: Any, methods: Sequence[MethodFigure], task: TaskFigures) -> None:
    for height, method in enumerate(reversed(methods)):
        seeds = [_scale(task) * seed for seed in method.seeds]
        axes.plot(seeds, [height] * len(seeds), "|", color=_INK, markersize=9)
        _draw_point(axes, method, task, y=height)
        axes.plot(method.published.get(task.metric, math.nan), height, "D", color=_INK, markerfacecolor="none")
        offset = {"xycoords": ("axes fraction", "data"), "xytext": (2, 7), "textcoords": "offset points"}
        axes.annotate(method.title, (0, height), **offset, fontsize="small")
    axes.set_ylim(-0.5, len(methods) - 0.2)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def _draw_point(
    axes: Any, method: MethodFigure, task: TaskFigures, *, x: float | None = None, y: float | None = None
) -> None:
    """Draw a figure with its interval: upright at `x`, or lying at `y`."""
    middle, low, high = _edges(method, task)
    reach = {"yerr" if y is None else "xerr": [[middle - low], [high - middle]]}
    look = {"fmt": "osDv^PXd"[task.methods.index(method) % 8], "color": _colour(method.name, task), "markersize": 5}
    point = (middle if x is None else x, middle if y is None else y)
    axes.errorbar(*point, **reach, **look, capsize=2.5, label=method.title)


def _colour(name: str, task: TaskFigures) -> str:
    """The same for a curve and for its methods at any α."""
    names = list(dict.fromkeys((*(method.name for method in task.methods), *task.rules)))
    return _COLOURS[names.index(name) % len(_COLOURS)]


def _scale(task: TaskFigures) -> float:
    return 100.0 if task.is_percent else 1.0


def _edges(one: Any, task: TaskFigures) -> tuple[float, float, float]:
    """The figure of a method or a point of the curve, with its interval, in the unit of the axis."""
    return _scale(task) * one.test.estimate, _scale(task) * one.test.low, _scale(task) * one.test.high
