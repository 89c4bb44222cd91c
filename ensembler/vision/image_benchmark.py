"""Image classifiers in a benchmark: the models and folders of images of a recipe with the key `images`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ensembler.config import EnsembleConfig
from ensembler.errors import ConfigError
from ensembler.evaluation.recipe import Experiment
from ensembler.preflight import CheckedEnsemble
from ensembler.vision.answers import ImageAnswerer
from ensembler.vision.heads import as_images
from ensembler.vision.image_preflight import CheckedImages, check_images
from ensembler.vision.image_tasks import ImageTask, load_image_task


class ImageModels:
    """Image classifiers on folders of images, each read once; `loaded`: all tasks that were read so far.

    With `strict`, an image that cannot be read is refused, else it is left out.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self._strict = strict
        self.loaded: dict[str, ImageTask] = {}

    def answerer(self, experiment: Experiment, config: EnsembleConfig) -> tuple[CheckedImages, ImageAnswerer]:
        """Return the members of a run, checked, and what answers with them. Raises as `check_images`."""
        assert experiment.images is not None
        checked = check_images(as_images(config, **dict(experiment.images)))
        return checked, ImageAnswerer(checked)

    def are_alike(self, checked: CheckedEnsemble) -> bool:
        """Return True: a classifier in an ensemble is what it is alone."""
        return True

    def tasks(self, experiment: Experiment, answerer: ImageAnswerer) -> list[ImageTask]:
        """Return the tasks of an experiment, whose classes are those of the members.

        Raises as `load_image_task`, and ConfigError for two folders of one name.
        """
        checked = answerer.checked
        settings: dict[str, Any] = {"validation": experiment.validation, "limit": experiment.limit}
        settings |= {"aliases": checked.config.aliases, "seed": experiment.seed}
        found: dict[str, tuple[str, ImageTask]] = {}
        for folder in experiment.tasks:
            key = repr((folder, checked.classes, settings))
            if key not in self.loaded:
                self.loaded[key] = load_image_task(Path(folder), checked.classes, strict=self._strict, **settings)
            task = self.loaded[key]
            if task.name in found:
                raise ConfigError(
                    f"{found[task.name][0]} and {folder} are both called {task.name!r}, and their images would be "
                    "taken for each other's; rename one of them, or give a link of another name"
                )
            found[task.name] = folder, task
        return [task for _, task in found.values()]
