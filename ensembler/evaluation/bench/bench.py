"""A benchmark planned: the sweeps behind its methods; and one of them run."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ensembler.errors import ConfigError, HubError, InputError, MissingExtraError
from ensembler.evaluation.answering import Chunk
from ensembler.evaluation.bench.methods import Run, plan_runs
from ensembler.evaluation.bench.published import check_tasks
from ensembler.evaluation.bench.recipe import Experiment, Recipe, Speed
from ensembler.evaluation.rows_folder import RowsFolder
from ensembler.evaluation.sweep import Sweep, SweepOptions
from ensembler.evaluation.swept_task import SweptTask
from ensembler.evaluation.task_loading import load_tasks
from ensembler.preflight import CheckedEnsemble, check_ensemble
from ensembler.serving.choice import BackendChoice

_NAME = re.compile(r"[\w+.-]+")
_MOST_NAMES = 5  # in a line

# Plans an experiment on images: its runs with their sweeps, whose options are those of the run.
ImagePlan = Callable[[Experiment, Callable[[Run], SweepOptions]], Iterable[tuple[Run, Sweep]]]


@dataclass(frozen=True)
class PlannedRun:
    """A run of an experiment: its members checked, its examples encoded, nothing loaded."""

    experiment: Experiment
    run: Run
    sweep: Sweep

    @property
    def checked(self) -> CheckedEnsemble:
        """Its ensemble."""
        return self.sweep.checked

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.experiment.name}.{self.run.name}"

    @property
    def instead_of(self) -> str | None:
        """The name of the run in whose place it is, should that fail; None where it runs in any case."""
        return None if self.run.instead_of is None else f"{self.experiment.name}.{self.run.instead_of}"


class Bench:
    """All runs of a recipe, planned. Raises ConfigError, MemberError, VocabularyError, PatchError or PromptError.

    `image_planner` plans its experiments on images: this module knows nothing of them.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        allow_code_execution: bool = False,
        backend: BackendChoice | None = None,
        image_planner: ImagePlan | None = None,
    ) -> None:
        self.recipe = recipe
        self.backend = backend or BackendChoice()
        self._image_planner = image_planner
        self._tasks: dict[str, list[SweptTask]] = {}
        self._allow_code_execution = allow_code_execution
        self.runs: list[PlannedRun] = []
        faults: dict[str, InputError] = {}
        for experiment in recipe.experiments:
            try:
                self.runs += self._plan(experiment)
            except MissingExtraError:
                raise
            except InputError as error:
                faults[experiment.name] = error
                if isinstance(error, HubError):
                    break  # each of the others would wait for it again
        if faults:
            raise _told(faults)

    def _plan(self, experiment: Experiment) -> Iterator[PlannedRun]:
        if not _NAME.fullmatch(experiment.name):
            raise ConfigError("its name cannot be a folder's; use letters, digits, + - _ .")
        if experiment.images is not None:
            yield from self._plan_images(experiment)
            return
        checked = [(run, check_ensemble(run.config)) for run in plan_runs(experiment)]
        if not all(are_alike(ensemble) for _, ensemble in checked):
            checked = [(run, check_ensemble(run.config)) for run in plan_runs(experiment, members_apart=True)]
        tasks = self._load(experiment)  # after the members, since their data may have to be fetched
        check_tasks(experiment, tasks)
        for run, ensemble in checked:
            yield PlannedRun(experiment, run, Sweep(ensemble, tasks, _options(experiment, run, self.backend)))

    def _plan_images(self, experiment: Experiment) -> Iterator[PlannedRun]:
        if self._image_planner is None:
            raise ConfigError("it has images, and nothing was given that plans them")
        for run, sweep in self._image_planner(experiment, lambda run: _options(experiment, run, self.backend)):
            check_tasks(experiment, [task.task for task in sweep.tasks])
            yield PlannedRun(experiment, run, sweep)

    def _load(self, experiment: Experiment) -> list[SweptTask]:
        """Experiments differ in their models more than in their tasks."""
        key = _key(experiment)
        if key not in self._tasks:
            loaded = load_tasks(
                experiment.tasks,
                num_fewshot=experiment.num_fewshot,
                limit=experiment.limit,
                allow_code_execution=self._allow_code_execution,
            )
            self._tasks[key] = list(loaded)
        return self._tasks[key]

    def tasks(self, experiment: Experiment) -> list[SweptTask]:
        """Return the tasks of an experiment."""
        of_first = next(planned.sweep.tasks for planned in self.runs if planned.experiment is experiment)
        return [task.task for task in of_first]

    @property
    def settings(self) -> dict[str, Any]:
        """All that results depend on, as JSON."""
        return {
            "speed": {experiment.name: _speed(experiment) for experiment in self.recipe.experiments},
            "runs": {planned.name: planned.sweep.settings for planned in self.runs},
        }

    def folder(self, out: Path, planned: PlannedRun, *, rank: int = 0) -> RowsFolder:
        """Return the folder of a run's rows."""
        sweep = planned.sweep
        return RowsFolder(out / "runs" / planned.name, sweep.settings, rows_per_id=len(sweep.grid), rank=rank)


def _told(faults: Mapping[str, InputError]) -> InputError:
    """The first experiment's fault in full, and which others have faults: one line."""
    (first, error), *others = faults.items()
    names = [name for name, _ in others]
    more = ""
    if names:
        shown = ", ".join(names[:_MOST_NAMES]) + (" ..." if len(names) > _MOST_NAMES else "")
        more = f"; {len(names)} other experiments cannot run either: {shown}"
    told = type(error)(f"experiment {first}: {error}{more}")
    told.__cause__ = error
    return told


def _key(experiment: Experiment) -> str:
    return repr((experiment.tasks, experiment.num_fewshot, experiment.limit))


def _options(experiment: Experiment, run: Run, backend: BackendChoice) -> SweepOptions:
    return SweepOptions(
        rules=run.rules,
        alphas=run.alphas,
        validation=experiment.validation if run.chooses or _is_drawn(experiment.validation) else None,
        metric=experiment.metric,
        batch_size=experiment.batch_size,
        seed=experiment.seed,
        backend=backend,
    )


def are_alike(ensemble: CheckedEnsemble) -> bool:
    """Whether each member in the ensemble is what it is alone: the same tokens, context, beginning and end of texts."""
    names = ("max_position_embeddings", "bos_token_id", "eos_token_id")
    found = [[repr(getattr(config, name, None)) for name in names] for config in ensemble.model_configs.values()]
    widths = set(ensemble.contract.widths.values())
    return ensemble.contract.kind == "identical" and len(widths) == 1 and all(one == found[0] for one in found)


def _speed(experiment: Experiment) -> dict[str, int]:
    """What a measurement depends on; more of them may be made later, or the first."""
    settings = asdict(experiment.speed or Speed())
    del settings["rounds"]
    return settings


def _is_drawn(validation: str | None) -> bool:
    """Whether the validation examples are taken out of those that would be reported: then out of all runs' alike."""
    return validation is not None and validation.isdecimal()


def answer(
    planned: PlannedRun, folder: RowsFolder, command: str, *, rank: int, num_ranks: int, advance: Callable[[int], None]
) -> None:
    """Make the rows of a run that are missing. Raises EnsemblerError, or what torch raises without memory."""
    sweep = planned.sweep
    folder.begin(command, sweep.example_rows())
    done = frozenset(folder.rows())
    advance(sum(1 for name in sweep.ids if name in done))
    chunks = sweep.unfinished(done, rank=rank, num_ranks=num_ranks)
    if not chunks:
        return
    try:
        _run(planned, folder, chunks, done, advance)
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _run(
    planned: PlannedRun,
    folder: RowsFolder,
    chunks: Sequence[Chunk],
    done: frozenset[str],
    advance: Callable[[int], None],
) -> None:
    with planned.sweep.open() as backend, folder:
        for num in planned.sweep.run(backend, folder, chunks, done):
            advance(num)
