"""Begin the store of a sweep or a benchmark, and write and print its figures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from textwrap import fill
from typing import TYPE_CHECKING, Any

import click

from ensembler.cli.command_class import log
from ensembler.cli.ranks import this_command
from ensembler.errors import ConfigError
from ensembler.launch import num_ranks, this_rank
from ensembler.planning.sizes import show_digits

if TYPE_CHECKING:
    from rich.table import Table

    from ensembler.evaluation.expiry import Expiry
    from ensembler.evaluation.figures import TaskFigures
    from ensembler.evaluation.methods import Study
    from ensembler.evaluation.runner import Runner
    from ensembler.evaluation.store import Store

WIDTH = 100  # of tables in a file or a pipe, where sentences do not wrap
_FIRST, _LONGEST = 24, 24  # characters: room for the first column, and a cell that stays in one line
_BREAK = re.compile(r"(?<=[;,]) | (?=\()")  # where a cell goes on in a second line first


def print_figures(tasks: Sequence[TaskFigures]) -> None:
    """Print the recommendation for each task; then for each the methods, costs, comparisons, notes and the verdict."""
    from ensembler.cli.tables import console
    from ensembler.evaluation.figures import cost_table, difference_table, heading, method_table
    from ensembler.evaluation.verdict import recommendation, verdict

    out = console(plain_width=WIDTH)
    say = partial(out.print, markup=False, soft_wrap=not out.is_terminal)
    for task in tasks:
        first, *reasons = recommendation(task)
        say(f"Recommendation for {task.name}: {first}")
        for line in reasons:
            say(f"* {line}")
    for task in tasks:
        say(f"\n{task.name}: {heading(task)}")
        for rows in filter(None, (method_table(task), cost_table(task), difference_table(task))):
            out.print(_table(rows, out.width), end="\n\n")
        missing = (f"not measured: {what}" for what in task.not_measured)
        for line in (*task.notes, *missing, *(f"* {said}" for said in verdict(task))):
            say(line)
    if any(task.differences for task in tasks):
        alike = ", p of alike over all tests of that" if any(task.margin for task in tasks) else ""
        say(f"\nIntervals are of 95 %; p (Holm) is corrected over all comparisons shown{alike}.")


def _table(rows: Sequence[Mapping[str, str]], width: int) -> Table:
    """Return a table for so many columns: the first column wraps, the others only where they are too wide together."""
    from rich.table import Table
    from rich.text import Text

    columns = {name: [row[name] for row in rows] for name in rows[0]}
    first, *others = columns
    room = width - min(_FIRST, _longest(first, columns[first]))

    def is_narrow() -> bool:
        return sum(2 + min(_LONGEST, _longest(name, columns[name])) for name in others) <= room

    if not is_narrow():
        columns |= {name: [_BREAK.sub("\n", cell) for cell in columns[name]] for name in others}
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(first, overflow="fold")
    for name in others:
        longest = _longest(name, columns[name])
        table.add_column(fill(name, longest), no_wrap=is_narrow() and longest <= _LONGEST, overflow="fold")
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*map(Text, cells))
    return table


def _longest(name: str, cells: Sequence[str]) -> int:
    """The characters of the longest line of a column, whose name may wrap between its words."""
    lines = (line for text in (*cells, *name.split()) for line in text.split("\n"))
    return max(*map(len, lines), min(len(name), 10))


def print_pairs(pairs: Sequence[Mapping[str, Any]], a: str, b: str) -> None:
    """Print every method of both folders side by side; each side has its own α."""
    rows = [
        {
            "task": f"{pair['experiment']}, {pair['task']}".removeprefix(", ")
            + f" ({pair['metric']}{', %' if pair['is_percent'] else ''})",
            "method": (pair["a"] or pair["b"])["label"].partition(" α = ")[0],
            f"{a} (95 % interval)": _side(pair["a"], percent=pair["is_percent"]),
            f"{b} (95 % interval) ": _side(pair["b"], percent=pair["is_percent"]),
            "documents": {True: "the same", False: "others", None: "-"}[pair["same_documents"]],
        }
        for pair in pairs
    ]
    from ensembler.cli.tables import console

    out = console(plain_width=WIDTH)
    out.print(_table(rows, out.width))


def _side(method: Mapping[str, Any] | None, *, percent: bool) -> str:
    from ensembler.evaluation.figures import show_interval
    from ensembler.evaluation.statistics import Interval

    if method is None or method["test"] is None:
        return "-"
    speed = method["cost"].get("tokens_per_second")
    more = ["" if method["alpha"] is None else f"α {method['alpha']:g}"]
    more += ["" if speed is None else f"{show_digits(speed['median'])} tokens/s"]
    interval = show_interval(Interval(**method["test"]), percent=percent)
    return "\n".join(filter(None, (interval, ", ".join(filter(None, more)))))


def print_expiries(expiries: Sequence[Expiry]) -> None:
    """Print for each task the score of the patch at every update, then when it crosses the floor, and notes."""
    from ensembler.cli.tables import console
    from ensembler.evaluation.expiry import tell_expiry
    from ensembler.evaluation.figures import show_interval

    out = console(plain_width=WIDTH)
    say = partial(out.print, markup=False, soft_wrap=not out.is_terminal)
    for one in expiries:
        metric = f"{one.metric}{', %' if one.is_percent else ''} (95 % interval)"
        scores = [show_interval(score, percent=one.is_percent) for score in one.scores]
        rows = [
            {"results": folder, "update": str(number), "base": base, metric: score}
            for number, (folder, base, score) in enumerate(zip(one.folders, one.bases, scores, strict=True), start=1)
        ]
        out.print(_table(rows, out.width), end="\n\n")
        for line in (tell_expiry(one), *(f"* {note}" for note in one.notes)):
            say(line)
        say("")
    say("Intervals are of 95 %, over test documents: they hold where later updates go on as these did.")


_SUMMARY = "summary"  # of several processes that finish together the one that claims it writes it


def read_batch_size(given: str) -> int | str:
    """Return a number from 1, or 'auto'; raise ConfigError."""
    if given == "auto":
        return given
    if not given.isdecimal() or int(given) < 1:
        raise ConfigError(f"--batch-size is {given!r}; expected a number from 1, or auto")
    return int(given)


def begin(store: Store) -> None:
    """Begin results or go on with them; what a process claimed that was lost is free again."""
    store.begin(this_command())
    if this_rank() == 0:
        store.release(_SUMMARY)


def finish(
    name: str,
    description: str,
    studies: Sequence[Study],
    runner: Runner,
    settings: Mapping[str, Any],
    *,
    trackers: Sequence[str] = (),
    as_json: bool,
) -> list[TaskFigures] | None:
    """Write and print the figures of finished studies and return them.

    Return None where another process is still at work, was lost, or writes them: of several the last one has all rows.
    """
    from ensembler.evaluation.report import SUMMARY, changed_in, write_report
    from ensembler.evaluation.results_export import log_curves
    from ensembler.evaluation.summary import summarise

    store, errors = runner.store, runner.errors(studies)
    if not runner.is_complete(studies, errors):
        if this_rank() == 0:
            log.info(
                "this process is done, others are not: the last one writes the summary; if one was lost, run the same "
                "command again"
            )
        return None
    if num_ranks() > 1 and not store.claim(_SUMMARY):
        return None
    figures = summarise(studies, store, errors)
    files = write_report(
        store.folder,
        name,
        description,
        figures,
        command=store.command,
        settings=settings,
        changed=lambda task: changed_in(studies, store, task),
    )
    if as_json:
        click.echo((store.folder / SUMMARY).read_text(encoding="utf-8"), nl=False)
    else:
        print_figures(figures)
    log_curves(trackers, store.folder, figures, settings)
    store.release(_SUMMARY)  # a process that ends later may have more to tell, after failures that were tried again
    log.info("%s: %s, %s", store.folder, store.file.name, ", ".join(files))
    return figures
