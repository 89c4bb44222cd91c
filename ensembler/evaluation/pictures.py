"""Pictures of results, as PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from ensembler.evaluation.statistics import Interval
from ensembler.evaluation.summary import Figure, TaskSummary
from ensembler.extras import require

_COLOURS = ("#1f6fb4", "#d9730d", "#2e8b57", "#8a4fbf")
_LEVEL_COLOUR = "#555555"
_LEVEL_STYLES = ("--", "-.", ":")


def draw_sweep(summaries: Sequence[TaskSummary]) -> bytes:
    """Return a PNG with one panel per task: the metric against α (Figure 2 of the base-change paper), with intervals.

    One line per rule on the test examples with its 95 % band, dotted on the validation examples; members as levels; the
    chosen α as a star.
    """
    figure = require("matplotlib.figure", "eval").Figure(
        figsize=(9.5, 0.6 + 4.2 * len(summaries)), layout="constrained", dpi=120
    )
    panels = figure.subplots(len(summaries), squeeze=False)
    for axes, summary in zip(panels[:, 0], summaries, strict=True):
        _draw_task(axes, summary)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "ensembler"})
    return buffer.getvalue()


def _draw_task(axes: Any, summary: TaskSummary) -> None:
    by_label = {figure.label: figure for figure in summary.methods}
    for style, name in zip(_LEVEL_STYLES, summary.levels, strict=False):
        level = by_label[name].test.estimate
        axes.axhline(level, color=_LEVEL_COLOUR, linestyle=style, linewidth=1.2, label=name)
    rules = list(dict.fromkeys(figure.rule for figure in summary.curve))
    for colour, rule in zip(_COLOURS, rules, strict=False):
        _draw_rule(axes, colour, rule, sorted_curve(summary, rule), summary)
    axes.set_xlabel("α")
    axes.set_ylabel(f"{summary.metric}, {summary.num_test:,} test examples")
    axes.set_title(summary.task)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axes.grid(alpha=0.25)


def sorted_curve(summary: TaskSummary, rule: str) -> list[Figure]:
    """Return the points of a rule by α."""
    return sorted((figure for figure in summary.curve if figure.rule == rule), key=lambda figure: figure.alpha)


def _draw_rule(axes: Any, colour: str, rule: str, curve: Sequence[Figure], summary: TaskSummary) -> None:
    alphas = [figure.alpha for figure in curve]
    marker = "o" if len(curve) < 40 else None
    axes.plot(
        alphas, [figure.test.estimate for figure in curve], color=colour, marker=marker, markersize=3.5, label=rule
    )
    low, high = zip(*(_edges(figure.test) for figure in curve), strict=True)
    axes.fill_between(alphas, low, high, color=colour, alpha=0.15, linewidth=0)
    if all(figure.validation is not None for figure in curve):
        validation = [figure.validation for figure in curve]
        axes.plot(alphas, validation, color=colour, linestyle=":", linewidth=1, label=f"{rule}, validation")
    choice = summary.choice(rule)
    if choice is not None:
        chosen = next(figure for figure in curve if figure.alpha == choice.alpha)
        axes.plot(
            [choice.alpha],
            [chosen.test.estimate],
            marker="*",
            markersize=15,
            color=colour,
            markeredgecolor="black",
            linestyle="none",
            label=f"{rule}, α = {choice.alpha:g} ({choice.by})",
        )


def _edges(interval: Interval) -> tuple[float, float]:
    return interval.low, interval.high
