"""The figures of sweeps and benchmarks on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ensembler.cli.tables import console, plain_table

if TYPE_CHECKING:
    from ensembler.evaluation.figures import TaskFigures


def print_figures(tasks: Sequence[TaskFigures]) -> None:
    """Print, for each task, the methods with their intervals and costs, the comparisons, notes, and the verdict."""
    from ensembler.evaluation.tables import cost_table, difference_table, heading, method_table
    from ensembler.evaluation.verdict import verdict

    out = console()
    for task in tasks:
        out.print(f"\n{task.name}: {heading(task)}", markup=False)
        for rows in filter(None, (method_table(task), cost_table(task), difference_table(task))):
            out.print(plain_table(rows[0], [list(row.values()) for row in rows]))
        missing = (f"not measured: {what}" for what in task.not_measured)
        for line in (*task.notes, *missing, *(f"* {said}" for said in verdict(task))):
            out.print(line, markup=False)
    if any(task.differences for task in tasks):
        alike = ", p of alike over all tests of that" if any(task.margin for task in tasks) else ""
        said = f"\nIntervals are of 95 %; p (Holm) is corrected over all comparisons shown{alike}."
        out.print(said, markup=False)


def print_pairs(pairs: Sequence[Mapping[str, Any]], a: str, b: str) -> None:
    """Print every method of both folders in one line; each side has its own α."""
    names = ("task", "method", f"{a} (95 % interval)", f"{b} (95 % interval)", "documents")
    rows = [
        (
            f"{pair['experiment']}, {pair['task']}".removeprefix(", ")
            + f" ({pair['metric']}{', %' if pair['is_percent'] else ''})",
            (pair["a"] or pair["b"])["label"].partition(" α = ")[0],
            *(_side(pair[side], percent=pair["is_percent"]) for side in ("a", "b")),
            {True: "the same", False: "others", None: "-"}[pair["same_documents"]],
        )
        for pair in pairs
    ]
    console().print(plain_table(names, rows))


def _side(method: Mapping[str, Any] | None, *, percent: bool) -> str:
    from ensembler.evaluation.statistics import Interval
    from ensembler.evaluation.tables import show_interval

    if method is None or method["test"] is None:
        return "-"
    said = show_interval(Interval(**method["test"]), percent=percent)
    if method["alpha"] is not None:
        said += f", α {method['alpha']:g}"
    speed = method["cost"].get("tokens_per_second")
    return said if speed is None else f"{said}, {speed['median']:.3g} tokens/s"
