"""A sweep over images, as given on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ensembler.cli.image_notices import say_left_out
from ensembler.errors import ConfigError

if TYPE_CHECKING:
    from ensembler.cli.task_options import TaskOptions
    from ensembler.evaluation.methods import Run
    from ensembler.evaluation.plan import Plan, PlanOptions
    from ensembler.serving.choice import BackendChoice


def plan_images(
    run: Run,
    images: Path,
    tasks: TaskOptions,
    options: PlanOptions,
    backend: BackendChoice,
    *,
    strict: bool,
) -> Plan:
    """Return the plan of the images below a folder; those that cannot be read are named on standard error."""
    from ensembler.evaluation.plan import Plan
    from ensembler.serving.choice import TRANSFORMERS
    from ensembler.vision.answers import ImageAnswerer
    from ensembler.vision.preflight import check_images
    from ensembler.vision.tasks import load_image_task

    given = [name for name, value in vars(tasks).items() if value != getattr(type(tasks), name)]
    beside = next((name for name in given if name not in ("limit", "metric")), None)
    if beside is not None:
        raise ConfigError(f"--{beside.replace('_', '-')} and --images were both given; give one of them")
    if options.by_perplexity:
        raise ConfigError("images have no prompts whose likelihood could choose alpha; give --validation")
    if backend.name != TRANSFORMERS:
        raise ConfigError(f"images are not run by {backend.name}; leave --backend out")
    if not isinstance(options.batch_size, int):
        raise ConfigError(f"--batch-size {options.batch_size} is for texts; give a number of images")
    checked = check_images(run.config)
    task = load_image_task(
        images,
        checked.classes,
        aliases=run.config.aliases,
        validation=options.validation,
        limit=tasks.limit,
        seed=options.seed,
        strict=strict,
    )
    say_left_out(task)
    return Plan(run, checked, ImageAnswerer(checked), [task], options)
