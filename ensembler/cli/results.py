"""Begin the store of a sweep or a benchmark, and write and print its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from ensembler.cli.ranks import this_command
from ensembler.errors import ConfigError
from ensembler.launch import num_ranks, this_rank

if TYPE_CHECKING:
    from ensembler.evaluation.figures import TaskFigures
    from ensembler.evaluation.runner import Runner
    from ensembler.evaluation.store import Store
    from ensembler.evaluation.study import Study

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
    from ensembler.cli.figures_tables import print_figures
    from ensembler.evaluation.changed import changed_in
    from ensembler.evaluation.report import SUMMARY, write_report
    from ensembler.evaluation.summary import summarise
    from ensembler.evaluation.tracking import log_curves

    store, errors = runner.store, runner.errors(studies)
    if not runner.is_complete(studies, errors):
        if this_rank() == 0:
            click.echo(
                "this process is done, others are not: the last one writes the summary; if one was lost, run the same "
                "command again",
                err=True,
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
    click.echo(f"{store.folder}: {store.file.name}, {', '.join(files)}", err=True)
    return figures
