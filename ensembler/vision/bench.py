"""The image classifiers of a benchmark, and its folders of images, each read once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensembler.config import EnsembleConfig
from ensembler.errors import ConfigError
from ensembler.evaluation.documents import Answerer
from ensembler.vision.answers import ImageAnswerer
from ensembler.vision.classes import as_images
from ensembler.vision.preflight import CheckedImages, check_images
from ensembler.vision.tasks import ImageTask, load_image_task

if TYPE_CHECKING:
    from ensembler.evaluation.recipe import Experiment


class ImagePlanner:
    """Checks the members of runs on images, and reads their folders; `loaded`: all tasks that were read so far."""

    def __init__(self) -> None:
        self.loaded: dict[str, ImageTask] = {}

    def answerer(self, experiment: Experiment, config: EnsembleConfig) -> tuple[CheckedImages, ImageAnswerer]:
        """Return the members of a run, checked, and what answers with them. Raises as `check_images`."""
        checked = check_images(as_images(config, **dict(experiment.images or ())))
        return checked, ImageAnswerer(checked)

    def tasks(self, experiment: Experiment, answerer: Answerer) -> list[ImageTask]:
        """Return the tasks of an experiment, whose classes are those of the members.

        Raises as `load_image_task`, and ConfigError for two folders of one name.
        """
        assert isinstance(answerer, ImageAnswerer)
        checked = answerer.checked
        settings: dict[str, Any] = {"validation": experiment.validation, "limit": experiment.limit}
        settings |= {"aliases": checked.config.aliases, "seed": experiment.seed}
        found: dict[str, tuple[str, ImageTask]] = {}
        for folder in experiment.tasks:
            key = repr((folder, checked.classes, settings))
            if key not in self.loaded:
                self.loaded[key] = load_image_task(Path(folder), checked.classes, **settings)
            task = self.loaded[key]
            if task.name in found:
                raise ConfigError(
                    f"{found[task.name][0]} and {folder} are both called {task.name!r}, and their images would be "
                    "taken for each other's; rename one of them, or give a link of another name"
                )
            found[task.name] = folder, task
        return [task for _, task in found.values()]
