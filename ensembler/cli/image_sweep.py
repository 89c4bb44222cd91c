"""A sweep over images, as given on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ensembler.errors import ConfigError
from ensembler.launch import this_rank

if TYPE_CHECKING:
    from ensembler.cli.task_options import TaskOptions
    from ensembler.config import EnsembleConfig
    from ensembler.evaluation.sweep import Sweep, SweepOptions

_MOST_SHOWN = 5  # images that cannot be read


def plan_images(
    config: EnsembleConfig, images: Path, tasks: TaskOptions, options: SweepOptions, *, strict: bool
) -> Sweep:
    """Return the sweep over the images below a folder; those that cannot be read are named on standard error."""
    from ensembler.vision.preflight import check_images
    from ensembler.vision.sweep import ImageSweep
    from ensembler.vision.tasks import load_image_task

    beside = next((name for name, value in vars(tasks).items() if value and name not in ("limit", "metric")), None)
    if beside is not None:
        raise ConfigError(f"--{beside.replace('_', '-')} and --images were both given; give one of them")
    checked = check_images(config)
    task = load_image_task(images, checked.classes, aliases=config.aliases, limit=tasks.limit, strict=strict)
    reasons = [reason for of_split in task.skipped.values() for reason in of_split]
    if reasons and this_rank() == 0:
        for reason in reasons[:_MOST_SHOWN]:
            click.echo(f"skipped: {reason}", err=True)
        click.echo(f"{len(reasons):,} images cannot be read and are left out", err=True)
    return ImageSweep(checked, [task], options)
