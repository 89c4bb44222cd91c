"""What a benchmark needs of image classifiers: their ensembles checked, and the images of its tasks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ensembler.config import IMAGES, EnsembleConfig
from ensembler.evaluation.bench.methods import Run, plan_runs
from ensembler.evaluation.bench.recipe import Experiment, Images
from ensembler.vision.classes import read_aliases, read_classes, read_templates
from ensembler.vision.preflight import CheckedImages, check_images
from ensembler.vision.tasks import ImageTask, load_image_task


def plan_image_runs(experiment: Experiment) -> list[tuple[Run, CheckedImages]]:
    """Return the runs of an experiment with their ensembles checked.

    A member in an ensemble is what it is alone, so it never runs apart for that. Raises as `check_images`.
    """
    images = experiment.images or Images()
    return [(run, check_images(_as_images(run.config, images))) for run in plan_runs(experiment)]


def load_tasks_of(experiment: Experiment, checked: CheckedImages) -> Iterator[ImageTask]:
    """Yield the tasks of an experiment: its folders of images. Raises as `load_image_task`."""
    for folder in experiment.tasks:
        yield load_image_task(Path(folder), checked.classes, aliases=checked.config.aliases, limit=experiment.limit)


def _as_images(config: EnsembleConfig, images: Images) -> EnsembleConfig:
    classes, texts = (None, None) if images.classes is None else read_classes(Path(images.classes))
    return config.replaced(
        task=IMAGES,
        classes=classes,
        class_texts=texts,
        templates=None if images.templates is None else read_templates(Path(images.templates)),
        aliases=None if images.aliases is None else read_aliases(Path(images.aliases)),
    )
