"""Figures of committed results from their rows alone: no model and no data set is there, only what the rows hold.

A plan of a benchmark is made of models and data. Here it is made of a recipe, which has the methods, and of the rows,
which have documents, parts, points and values; `summarise` computes the figures of both in the same way. Only `tests`,
the hash of the documents, is another than in the summary of the command: some rows are published without prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from ensembler.config import EnsembleConfig
from ensembler.demo import demo_recipe
from ensembler.engine.grid import GridPoint, make_grid
from ensembler.evaluation.documents import SUBSETS, Document, Metric, PlannedTask
from ensembler.evaluation.ensemble_plan import Plan, PlanOptions
from ensembler.evaluation.methods import Run, Study, experiment_study, plan_runs, sweep_run, sweep_study
from ensembler.evaluation.recipe import Experiment
from ensembler.evaluation.recipe_file import read_recipe
from ensembler.evaluation.results_file import Results, open_results
from ensembler.evaluation.summary import summarise
from ensembler.extras import require
from ensembler.vision.answers import KINDS

RESULTS = Path(__file__).parent / "results"
_RECIPES = Path(__file__).parents[1] / "examples" / "recipes"
RECIPES = {
    "bench/demo": demo_recipe(),
    "bench/digits": _RECIPES / "digits.yaml",
    "bench/smollm2": _RECIPES / "smollm2.yaml",
}
SWEEPS = ("sweeps/demo", "sweeps/smollm2")


class Replayed(NamedTuple):
    """Results with the studies that they are of, and the name and description of their page."""

    results: Results
    studies: list[Study]
    name: str
    description: str


def replay(name: str, folder: Path | None = None) -> Replayed:
    """Return the results of a name from RECIPES or SWEEPS, the committed ones or those in `folder`."""
    results = open_results(folder or RESULTS / name)
    if name in SWEEPS:
        return Replayed(results, [_replay_sweep(results)], "sweep", "")
    recipe = read_recipe(RECIPES[name], KINDS)
    studies = [_replay_experiment(experiment, results) for experiment in recipe.experiments]
    return Replayed(results, studies, recipe.name, recipe.description)


def read_figures(name: str, folder: Path | None = None) -> dict[str, dict[str, Any]]:
    """Return the figures of a benchmark, each of whose experiments has one task, by the experiment's name, as dicts."""
    found = replay(name, folder)
    with found.results:
        return {task.experiment: asdict(task) for task in summarise(found.studies, found.results)}


class _RowsPlan(Plan):
    """The plan of a run whose documents and points are those of the rows."""

    def __init__(self, run: Run, options: PlanOptions, settings: Mapping[str, Any], results: Results) -> None:
        self.run, self.options = run, options
        self.rule = run.config.get_rule()
        self.points = make_grid(run.rules, run.alphas)
        self.grid = [GridPoint(*point) for point in results.points(run.name)]
        self.answerer: Any = SimpleNamespace(thumbnail=lambda document: None)
        self.tasks = [_plan_task(name, run.name, about, results) for name, about in settings["tasks"].items()]

    def is_finished(self, results: Results) -> bool:
        """Return whether there are rows; a run in place of another that did not fail has none."""
        return bool(self.names) and super().is_finished(results)


class _RowsTask:
    """A task that has been measured. Its metrics are those that the rows have, in their order."""

    def __init__(self, name: str, settings: Mapping[str, Any], keys: Sequence[str]) -> None:
        self.name, self.version = name, str(settings["version"])
        num_fewshot = settings.get("fewshot")  # None of images
        self.notes = () if num_fewshot is None else (f"{num_fewshot} examples in each prompt",)
        self.metrics = tuple(Metric(key, key, "", True, key != "f1") for key in keys)

    def aggregate(self, key: str, values: Sequence[Any]) -> float:
        """Return the mean, or lm-eval's F1."""
        return float(self._aggregation(key)(list(values)))

    def standard_error(self, key: str, values: Sequence[Any]) -> float | None:
        """Return lm-eval's standard error; the metrics that come first are means."""
        return float(require("lm_eval.api.metrics", "eval").mean_stderr(list(values)))

    def _aggregation(self, key: str) -> Any:
        metrics = require("lm_eval.api.metrics", "eval")
        return metrics.f1_score if key == "f1" else metrics.mean


def _plan_task(name: str, run: str, settings: Mapping[str, Any], results: Results) -> PlannedTask:
    found: dict[str, list[Document]] = {part: [] for part in SUBSETS}
    for document, task, part, prompt, choices, gold in results.documents(run):
        if task == name and part is not None:
            _, split, index = document.rsplit("/", 2)
            asked = (settings["documents"],)  # a hash of all questions in place of this one
            found[part].append(Document(name, split, int(index), {}, prompt, asked, tuple(choices), gold))
    _, measured = next(results.rows(run, name), (None, []))
    task: Any = _RowsTask(name, settings, list(measured[0].values) if measured else ["acc"])
    return PlannedTask(task, task.metrics[0], {part: tuple(documents) for part, documents in found.items()})


def _replay_sweep(results: Results) -> Study:
    settings = results.settings
    members = {role: {"model": member["model"]} for role, member in settings["ensemble"]["members"].items()}
    config = EnsembleConfig(rule=settings["ensemble"]["rule"], members=members)
    run = sweep_run("sweep", config, settings["rules"], settings["alphas"], chooses=True)
    return sweep_study(_RowsPlan(run, PlanOptions(validation="validation", seed=settings["seed"]), settings, results))


def _replay_experiment(experiment: Experiment, results: Results) -> Study:
    settings = results.settings["runs"]
    models = dict(experiment.models)
    if "patch" in models:  # a name alone is looked for on this machine
        models["patch"] = replace(models["patch"], model=f"./{models['patch'].model}")
    runs = plan_runs(experiment.model_copy(update={"models": models}))
    options = PlanOptions(validation=experiment.validation, seed=experiment.seed)
    return experiment_study(experiment, [_RowsPlan(run, options, settings[run.name], results) for run in runs])
