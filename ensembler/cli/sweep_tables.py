"""The result of a sweep on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from ensembler.cli.tables import console
from ensembler.evaluation.formats import show_difference, show_interval, show_metric, show_p
from ensembler.evaluation.report import choice_lines, heading

if TYPE_CHECKING:
    from ensembler.evaluation.summary import TaskSummary


def print_sweep(summaries: Sequence[TaskSummary]) -> None:
    """Print, for each task, the chosen α, the methods with their intervals, and the comparisons."""
    out = console()
    for summary in summaries:
        out.print(f"\n{summary.task}: {heading(summary)}", markup=False)
        for line in choice_lines(summary):
            out.print(line, markup=False)
        out.print(_methods(summary))
        if summary.differences:
            out.print(_differences(summary))
    if any(summary.differences for summary in summaries):
        out.print("Intervals are of 95 %; p (Holm) is corrected over all comparisons shown.", markup=False)


def _methods(summary: TaskSummary) -> Table:
    others = list(summary.methods[0].others)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("method", f"{show_metric(summary.metric, summary.methods[0].test)} (95 % interval)", *others):
        table.add_column(name)
    for figure in summary.methods:
        table.add_row(figure.label, show_interval(figure.test), *(f"{figure.others[key]:.4g}" for key in others))
    return table


def _differences(summary: TaskSummary) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("compared", "difference (95 % interval)", "p", "p (Holm)", "test"):
        table.add_column(name)
    for each in summary.differences:
        table.add_row(
            f"{each.method} − {each.against}",
            show_difference(each.comparison),
            show_p(each.comparison.p_value),
            show_p(each.p_holm),
            each.comparison.test,
        )
    return table
