"""A sweep over images, as given on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ensembler.cli.image_notices import say_left_out
from ensembler.errors import ConfigError

if TYPE_CHECKING:
    from ensembler.cli.task_options import TaskOptions
    from ensembler.config import EnsembleConfig
    from ensembler.evaluation.sweep import Sweep, SweepOptions


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
    task = load_image_task(
        images,
        checked.classes,
        aliases=config.aliases,
        validation=options.validation,
        limit=tasks.limit,
        seed=options.seed,
        strict=strict,
    )
    say_left_out(task)
    return ImageSweep(checked, [task], options)
