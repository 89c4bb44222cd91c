"""A benchmark planned: the studies of a recipe's experiments."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ensembler.config import EnsembleConfig
from ensembler.errors import ConfigError, HubError, InputError, MissingExtraError
from ensembler.evaluation.ensemble_plan import Plan, PlanOptions
from ensembler.evaluation.lm_eval_settings import PromptSettings
from ensembler.evaluation.methods import Run, Study, experiment_study, plan_runs
from ensembler.evaluation.recipe import Experiment, Recipe, Speed
from ensembler.evaluation.task_loading import load_tasks
from ensembler.evaluation.tasks import TextTask
from ensembler.evaluation.text_answers import TextAnswerer
from ensembler.preflight import CheckedEnsemble, check_ensemble
from ensembler.serving.choice import TRANSFORMERS, BackendChoice

_NAME = re.compile(r"[\w+.-]+")
_MOST_NAMES = 5  # in a line


class TextModels:
    """Language models on tasks of lm-eval, each loaded once: experiments differ in their models more than in these."""

    def __init__(self, backend: BackendChoice, confirm_run_unsafe_code: bool) -> None:
        self._backend = backend
        self._confirmed = confirm_run_unsafe_code
        self._tasks: dict[str, list[TextTask]] = {}

    def answerer(self, experiment: Experiment, config: EnsembleConfig) -> tuple[CheckedEnsemble, TextAnswerer]:
        """Return an ensemble, checked, and what answers with it."""
        checked = check_ensemble(config)
        return checked, TextAnswerer(checked, experiment.seed, self._backend)

    def are_alike(self, checked: CheckedEnsemble) -> bool:
        """Return whether all members have the same tokens, length of context, and beginning and end of texts."""
        names = ("max_position_embeddings", "bos_token_id", "eos_token_id")
        found = [[repr(getattr(config, name, None)) for name in names] for config in checked.model_configs.values()]
        widths = set(checked.contract.widths.values())
        return checked.contract.kind == "identical" and len(widths) == 1 and all(one == found[0] for one in found)

    def tasks(self, experiment: Experiment, answerer: TextAnswerer) -> list[TextTask]:
        """Return the tasks of an experiment, their chats in the template of the anchor's tokenizer."""
        names, settings = experiment.tasks, PromptSettings.of(experiment)
        key = repr((names, settings))
        if key not in self._tasks:
            self._tasks[key] = load_tasks(names, settings, confirm_run_unsafe_code=self._confirmed)
        return [task.for_model(answerer.model) for task in self._tasks[key]]


class Bench:
    """All studies of a recipe, planned. Raises ConfigError, MemberError, VocabularyError, PatchError or PromptError.

    `models`: what loads the models and tasks of experiments of other kinds than language models on texts, by kind; it
    has the methods of `TextModels`. `verify_weights`: see `describe_ensemble`.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        confirm_run_unsafe_code: bool = False,
        backend: BackendChoice | None = None,
        models: Mapping[type[Experiment], Any] | None = None,
        verify_weights: bool = False,
    ) -> None:
        self.recipe = recipe
        self.backend = backend or BackendChoice()
        self._verify_weights = verify_weights
        self._models: dict[type[Experiment], Any] = {
            Experiment: TextModels(self.backend, confirm_run_unsafe_code),
            **(models or {}),
        }
        self.studies: list[Study] = []
        faults: dict[str, InputError] = {}
        for experiment in recipe.experiments:
            try:
                self.studies.append(self._plan(experiment))
            except MissingExtraError:
                raise
            except InputError as error:
                faults[experiment.name] = error
                if isinstance(error, HubError):
                    break  # each of the others would wait for it again
        if faults:
            raise _combined(faults) from next(iter(faults.values()))

    def _plan(self, experiment: Experiment) -> Study:
        if not _NAME.fullmatch(experiment.name):
            raise ConfigError("its name cannot be one of results; use letters, digits, + - _ .")
        models = self._models[type(experiment)]
        if self.backend.name != TRANSFORMERS and not isinstance(models, TextModels):
            raise ConfigError(f"its models are not run by {self.backend.name}; leave --backend out")
        found = [(run, *models.answerer(experiment, run.config)) for run in plan_runs(experiment)]
        if not all(models.are_alike(checked) for _, checked, _ in found):
            is_text = any(checked.contract.is_text for _, checked, _ in found)
            runs = plan_runs(experiment, members_apart=True, rules_apart=is_text)
            found = [(run, *models.answerer(experiment, run.config)) for run in runs]
        plans = []
        for run, checked, answerer in found:  # tasks after all members, since their data may have to be fetched
            tasks = models.tasks(experiment, answerer)
            experiment.check_published({task.name: [metric.key for metric in task.metrics] for task in tasks})
            plans.append(Plan(run, checked, answerer, tasks, _options(experiment, run, self._verify_weights)))
        return experiment_study(experiment, plans)

    @property
    def settings(self) -> dict[str, Any]:
        """All that results depend on, as JSON."""
        return {
            "runs": {plan.name: plan.settings for study in self.studies for plan in study.plans},
            "speed": {
                experiment.name: (experiment.speed or Speed()).model_dump(
                    exclude={"rounds"}
                )  # of which more may follow
                for experiment in self.recipe.experiments
            },
        }

    @property
    def num_documents(self) -> int:
        """The number of documents of all runs that are not in place of others."""
        plans = [plan for study in self.studies for plan in study.plans if plan.run.instead_of is None]
        return sum(len(plan.names) for plan in plans)


def _combined(faults: Mapping[str, InputError]) -> InputError:
    """Return the first experiment's fault in full with the names of the others that have one, in one line."""
    first, *others = faults
    error = faults[first]
    shown = ", ".join(others[:_MOST_NAMES]) + (" ..." if len(others) > _MOST_NAMES else "")
    more = f"; {len(others)} other experiments cannot run either: {shown}" if others else ""
    return type(error)(f"experiment {first}: {error}{more}")


def _options(experiment: Experiment, run: Run, verify_weights: bool) -> PlanOptions:
    """Return the options of a run; examples drawn from the reported ones are taken out of all runs' alike."""
    validation = None if experiment.validation is None else str(experiment.validation)
    is_drawn = validation is not None and validation.isdecimal()
    return PlanOptions(
        validation=validation if run.chooses or is_drawn else None,
        metric=experiment.metric,
        cluster=experiment.cluster,
        margin=experiment.margin,
        batch_size=experiment.batch_size,
        seed=experiment.seed,
        verify_weights=verify_weights,
    )
