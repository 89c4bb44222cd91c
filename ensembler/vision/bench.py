"""What a benchmark needs of image classifiers: their ensembles checked, and the images of its tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from ensembler.config import EnsembleConfig
from ensembler.errors import ConfigError
from ensembler.evaluation.bench.methods import Run, plan_runs
from ensembler.evaluation.bench.recipe import Experiment, Images
from ensembler.evaluation.sweep import SweepOptions
from ensembler.vision.class_files import as_images
from ensembler.vision.preflight import CheckedImages, check_images
from ensembler.vision.sweep import ImageSweep
from ensembler.vision.tasks import ImageTask, load_image_task


class ImagePlanner:
    """Plans the experiments on images of a benchmark; folders that several of them have are read once.

    `tasks`: all that were read so far.
    """

    def __init__(self) -> None:
        self.tasks: list[ImageTask] = []
        self._known: dict[str, list[ImageTask]] = {}

    def __call__(
        self, experiment: Experiment, options: Callable[[Run], SweepOptions]
    ) -> Iterator[tuple[Run, ImageSweep]]:
        """Yield the runs of an experiment with their sweeps.

        A member in an ensemble is what it is alone, so it never runs apart for that. Raises as `check_images` and
        `load_image_task`, and ConfigError for two folders of one name.
        """
        images = experiment.images or Images()
        checked = [(run, check_images(_as_images(run.config, images))) for run in plan_runs(experiment)]
        tasks = self._load(experiment, checked[0][1])
        for run, ensemble in checked:
            yield run, ImageSweep(ensemble, tasks, options(run))

    def _load(self, experiment: Experiment, checked: CheckedImages) -> list[ImageTask]:
        settings = (experiment.tasks, experiment.validation, experiment.limit, experiment.seed)
        key = repr((settings, checked.classes, checked.config.aliases))
        if key not in self._known:
            self._known[key] = list(_load_tasks(experiment, checked))
            self.tasks += self._known[key]
        return self._known[key]


def _load_tasks(experiment: Experiment, checked: CheckedImages) -> Iterator[ImageTask]:
    folders: dict[str, str] = {}
    for folder in experiment.tasks:
        task = load_image_task(
            Path(folder),
            checked.classes,
            aliases=checked.config.aliases,
            validation=experiment.validation,
            limit=experiment.limit,
            seed=experiment.seed,
        )
        if task.name in folders:
            raise ConfigError(
                f"{folders[task.name]} and {folder} are both called {task.name!r}, and their images would be taken for "
                "each other's; rename one of them, or give a link of another name"
            )
        folders[task.name] = folder
        yield task


def _as_images(config: EnsembleConfig, images: Images) -> EnsembleConfig:
    paths = {name: None if path is None else Path(path) for name, path in vars(images).items()}
    return as_images(config, **paths)
