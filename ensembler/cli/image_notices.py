"""Say on standard error which files of a folder of images are left out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ensembler.launch import this_rank

if TYPE_CHECKING:
    from ensembler.vision.tasks import ImageTask

_MOST_SHOWN = 5  # images that cannot be read


def say_left_out(task: ImageTask) -> None:
    """Name images that cannot be read, count them, and files that are none; of several processes one says it."""
    if this_rank() != 0:
        return
    reasons = [reason for of_split in task.skipped.values() for reason in of_split]
    for reason in reasons[:_MOST_SHOWN]:
        click.echo(f"skipped: {reason}", err=True)
    if reasons:
        click.echo(f"{len(reasons):,} images cannot be read and are left out", err=True)
    say_others(task.num_others)


def say_others(num: int) -> None:
    """Count the files that do not end as images do, or lie beside the folders of classes."""
    if num:
        click.echo(f"{num:,} files that are no images, or of no class, are left out", err=True)
