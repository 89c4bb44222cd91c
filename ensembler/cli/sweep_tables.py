"""The result of a sweep on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ensembler.cli.tables import console, plain_table
from ensembler.evaluation.sweep_texts import COMPARED, choice_lines, columns, difference_rows, heading, method_rows

if TYPE_CHECKING:
    from ensembler.evaluation.summary import TaskSummary


def print_sweep(summaries: Sequence[TaskSummary]) -> None:
    """Print, for each task, the chosen α, the methods with their intervals, and the comparisons."""
    out = console()
    for summary in summaries:
        out.print(f"\n{summary.task}: {heading(summary)}", markup=False)
        for line in choice_lines(summary):
            out.print(line, markup=False)
        out.print(plain_table(columns(summary), method_rows(summary)))
        if summary.differences:
            out.print(plain_table(COMPARED, difference_rows(summary)))
    if any(summary.differences for summary in summaries):
        out.print("Intervals are of 95 %; p (Holm) is corrected over all comparisons shown.", markup=False)
