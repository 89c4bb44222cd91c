"""A benchmark on the terminal: its plan, its results, two of them side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ensembler.cli.tables import console, plain_table
from ensembler.inspection import summarise
from ensembler.planning.budgets import show_size

if TYPE_CHECKING:
    from ensembler.evaluation.bench.bench import Bench
    from ensembler.evaluation.bench.comparing import Pair, Side
    from ensembler.evaluation.bench.summary import BenchTask


def print_plan(bench: Bench) -> None:
    """Print what would run: members with their bytes, vocabulary contracts, tasks with their examples, the grid."""
    out = console()
    for planned in (planned for planned in bench.runs if planned.run.instead_of is None):
        summary = summarise(planned.checked)
        out.print(f"\n{planned.name}: {', '.join(method.name for method in planned.run.methods)}", markup=False)
        out.print(f"  vocabulary {summary.vocabulary}, {summary.shared:,} shared ids", markup=False)
        for member in summary.members:
            size = "?" if member.num_bytes is None else show_size(member.num_bytes)
            adapter = "" if member.adapter is None else f" + {member.adapter}"
            out.print(f"  {member.role}: {member.model}{adapter}, {size}, {member.dtype}", markup=False)
        for task in planned.sweep.tasks:
            parts = task.parts
            chosen = f", alpha chosen of {len(planned.run.alphas)} on {len(parts.validation):,} others"
            out.print(
                f"  {task.task.name} ({task.metric.key}): {len(parts.test):,} test examples"
                f"{chosen if planned.run.chooses else ''}",
                markup=False,
            )


def print_bench(tasks: Sequence[BenchTask]) -> None:
    """Print, for each task, the methods with their costs, the comparisons, and the verdict."""
    from ensembler.evaluation.bench import tables
    from ensembler.evaluation.bench.verdict import verdict
    from ensembler.evaluation.sweep_texts import COMPARED

    out = console()
    for task in tasks:
        out.print(f"\n{task.name}: {tables.heading(task)}", markup=False)
        out.print(plain_table(tables.columns(task), tables.rows(task)))
        for note in tables.notes(task):
            out.print(note, markup=False)
        if task.differences:
            out.print(plain_table(COMPARED, tables.differences(task)))
        for line in verdict(task):
            out.print(f"* {line}", markup=False)


def print_pairs(pairs: Sequence[Pair], a: str, b: str) -> None:
    """Print every method of both folders in one line."""
    out = console()
    names = ("experiment", "task", "method", f"{a} (95 % interval)", f"{b} (95 % interval)", "examples")
    rows = [
        (
            pair.experiment,
            f"{pair.task} ({pair.metric})",
            pair.method,
            _side(pair.a),
            _side(pair.b),
            "the same" if pair.same_examples else "others",
        )
        for pair in pairs
    ]
    out.print(plain_table(names, rows))


def _side(side: Side | None) -> str:
    if side is None or side.estimate is None:
        return "-"
    edges = "" if side.low is None or side.high is None else f" ({side.low:.4g} to {side.high:.4g})"
    alpha = "" if side.alpha is None else f", α {side.alpha:g}"
    speed = "" if side.tokens_per_second is None else f", {side.tokens_per_second:.3g} tokens/s"
    return f"{side.estimate:.4g}{edges}{alpha}{speed}"
