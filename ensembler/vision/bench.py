"""Image classifiers in a benchmark: the experiments of a recipe with the key `images`, and their folders of images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, model_validator

from ensembler.config import EnsembleConfig
from ensembler.errors import ConfigError
from ensembler.evaluation.documents import Answerer
from ensembler.evaluation.recipe import Experiment, FoundPath, Speed
from ensembler.preflight import CheckedEnsemble
from ensembler.vision.answers import ImageAnswerer
from ensembler.vision.classes import as_images
from ensembler.vision.preflight import CheckedImages, check_images
from ensembler.vision.tasks import ImageTask, load_image_task

_OF_TEXTS = ("num_fewshot", "apply_chat_template", "fewshot_as_multiturn", "system_instruction", "gen_kwargs")


class Images(BaseModel, frozen=True, extra="forbid"):
    """Settings of image classifiers, as of `ensembler create`: paths of files, or None."""

    classes: FoundPath | None = None
    templates: FoundPath | None = None
    aliases: FoundPath | None = None


class ImageExperiment(Experiment, frozen=True, extra="forbid"):
    """One set of image classifiers; `tasks` are folders of images."""

    images: Images
    settings: ClassVar[Mapping[str, type[BaseModel]]] = {"speed": Speed, "images": Images}
    is_timed: ClassVar[bool] = False

    @model_validator(mode="after")
    def _check_is_of_images(self) -> Self:
        if self.speed is not None:
            raise ConfigError("speed is measured of texts alone; leave it out, or write speed: false")
        of_texts = [key for key in _OF_TEXTS if getattr(self, key)]
        if of_texts:
            raise ConfigError(f"{of_texts[0]} is a setting of texts; leave it out of an experiment on images")
        return self


class ImageModels:
    """Image classifiers on folders of images, each read once; `loaded`: all tasks that were read so far."""

    def __init__(self) -> None:
        self.loaded: dict[str, ImageTask] = {}

    def answerer(self, experiment: Experiment, config: EnsembleConfig) -> tuple[CheckedImages, ImageAnswerer]:
        """Return the members of a run, checked, and what answers with them. Raises as `check_images`."""
        assert isinstance(experiment, ImageExperiment)
        checked = check_images(as_images(config, **dict(experiment.images)))
        return checked, ImageAnswerer(checked)

    def are_alike(self, checked: CheckedEnsemble) -> bool:
        """Return True: a classifier in an ensemble is what it is alone."""
        return True

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
