"""Cases for the tests of sweeps: tiny members in folders, sweeps over the tasks of `task_cases`, and their rows."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.scoring_cases import save_models
from helpers.task_cases import write_rows

from ensembler import EnsembleConfig, EnsembleForCausalLM
from ensembler.engine.grid import GridPoint
from ensembler.evaluation.ensemble_plan import Plan, PlanOptions
from ensembler.evaluation.figures import TaskFigures
from ensembler.evaluation.lm_eval_settings import PromptSettings
from ensembler.evaluation.methods import Study, sweep_run, sweep_study
from ensembler.evaluation.results_file import FILE, Measured, Results
from ensembler.evaluation.runner import Runner
from ensembler.evaluation.store import Store
from ensembler.evaluation.summary import summarise
from ensembler.evaluation.task_loading import load_tasks
from ensembler.evaluation.tasks import TextTask
from ensembler.evaluation.text_answers import TextAnswerer
from ensembler.preflight import CheckedEnsemble, check_ensemble
from ensembler.serving.choice import BackendChoice

RULES = ("base-change", "eft")
ALPHAS = tuple(round(0.1 * index, 1) for index in range(16))
FLAGS = {"source_ft": "--source-ft", "source_pt": "--source-pt", "target_pt": "--target-pt"}
Rows = dict[str, list[Measured]]
"""What each document came to at each point of the grid."""


@dataclass(frozen=True)
class Ensemble:
    """A saved trio: what was checked of it, and the loaded model."""

    checked: CheckedEnsemble
    model: EnsembleForCausalLM

    @property
    def flags(self) -> list[str]:
        """The members as on the command line."""
        paths = {role: str(files.config.model) for role, files in self.checked.files.items()}
        return [part for role, flag in FLAGS.items() for part in (flag, paths[role])]

    def at(self, point: GridPoint) -> EnsembleForCausalLM:
        """The same members under one rule and α."""
        members = dict(self.model.members.items())
        one = EnsembleForCausalLM.from_members(rule=point.rule, alpha=point.alpha, members=members)
        one.generation_config = self.model.generation_config
        return one


def save_ensemble(folder: Path, **families: dict[str, Any]) -> Ensemble:
    """Members of three families, sizes and vocabulary widths; `families` gives others by role."""
    trio = {
        "source_ft": {"family": "llama", "vocab_size": 72},
        "source_pt": {"family": "qwen2", "vocab_size": 64, "hidden_size": 24, "num_layers": 1},
        "target_pt": {"family": "gpt2", "vocab_size": 70, "hidden_size": 32},
    }
    checked = check_ensemble(EnsembleConfig(members=save_models(folder, **{**trio, **families})))
    return Ensemble(checked, EnsembleForCausalLM.from_checked(checked))


def load_task(folder: Path, name: str, **settings: Any) -> TextTask:
    """A task of a folder that `write_tasks` wrote."""
    (task,) = load_tasks([str(folder / f"{name}.yaml")], PromptSettings(**settings))
    return task


def plan_of(
    checked: CheckedEnsemble,
    tasks: Sequence[TextTask],
    *,
    rules: Sequence[str] = RULES,
    alphas: Sequence[float] = (0.0, 0.5, 1.0),
    backend: BackendChoice | None = None,
    **changes: Any,
) -> Plan:
    """A sweep of tasks, planned as the command does it."""
    chosen = PlanOptions(**{"batch_size": 3, **changes})
    run = sweep_run("sweep", checked.config, rules, alphas, chooses=chosen.chooses)
    answerer = TextAnswerer(checked, chosen.seed, backend or BackendChoice())
    return Plan(run, checked, answerer, [task.for_model(answerer.model) for task in tasks], chosen)


def run_plan(plan: Plan, folder: Path) -> Rows:
    """The rows of all documents, made into a folder."""
    with Store(folder, plan.settings) as store:
        store.begin("ensembler sweep")
        Runner(store).run(plan, lambda num: None)
        return dict(store.rows(plan.name))


def swept(ensemble: Ensemble, task: TextTask, folder: Path, **changes: Any) -> tuple[Plan, Rows]:
    """A sweep of one task, and its rows."""
    plan = plan_of(ensemble.checked, [task], **changes)
    return plan, run_plan(plan, folder)


def stored(plan: Plan, folder: Path, rows: Rows) -> Results:
    """Rows as the results of a sweep."""
    store = Store(folder, plan.settings)
    store.begin("ensembler sweep")
    store.begin_run(plan.name, plan.grid, plan.documents())
    store.add(plan.name, list(rows.items()))
    return store


def rigged(plan: Plan, folder: Path, value: Callable[[str, int, GridPoint], Any]) -> Results:
    """Results that no model made: `value(part, index, point)` is the metric of the document of this index in a part."""
    rows = {}
    for task in plan.tasks:
        for part, documents in task.subsets.items():
            for index, document in enumerate(documents):
                values = [value(part, index, point) for point in plan.grid]
                rows[document.name] = [
                    Measured([[str(one)]], {task.metric.key: one}, {"none": str(one)}) for one in values
                ]
    return stored(plan, folder, rows)


def study_of(plan: Plan) -> Study:
    return sweep_study(plan)


def figures_of(plan: Plan, results: Results) -> TaskFigures:
    (figures,) = summarise([study_of(plan)], results)
    return figures


def read_rows(folder: Path, run: str = "sweep") -> list[dict[str, Any]]:
    """The rows of a run, a document after the other at all points of the grid, read by the test itself."""
    of_points = "FROM {} AS one JOIN documents ON one.document = documents.id JOIN points ON one.point = points.id"
    columns, ordered = "documents.name, part, rule, alpha", "WHERE points.run = ? ORDER BY documents.id, points.id"
    with closing(sqlite3.connect(folder / FILE)) as connection:
        measured = connection.execute(
            f"SELECT {columns}, metric_values, predictions {of_points.format('measurements')} {ordered}", [run]
        ).fetchall()
        answered = connection.execute(
            f"SELECT {columns}, answer {of_points.format('answers')} {ordered}, request", [run]
        ).fetchall()
    answers: dict[tuple[Any, ...], list[Any]] = {}
    for *key, answer in answered:
        answers.setdefault(tuple(key), []).append(json.loads(answer))
    return [
        {"id": name, "part": part, "rule": rule, "alpha": alpha}
        | {"values": json.loads(values), "predictions": json.loads(predictions)}
        | {"answers": answers[name, part, rule, alpha]}
        for name, part, rule, alpha, values, predictions in measured
    ]


def column(rows: Sequence[dict[str, Any]], split: str, rule: str, alpha: float, key: str) -> list[Any]:
    """The values of a metric at one point, of the documents whose name holds /split/, in their order."""
    return [
        row["values"][key] for row in rows if f"/{split}/" in row["id"] and (row["rule"], row["alpha"]) == (rule, alpha)
    ]


def write_questions(path: Path, number: int) -> Path:
    """A file of rows for --data: different questions of a few characters, answered by one of two letters."""
    rows = [{"question": f"{chr(97 + i % 26)} {i * 7 % 97}?", "label": "ab"[i * i % 3 % 2]} for i in range(number)]
    return write_rows(path, rows)


def data_flags(path: Path) -> list[str]:
    return ["--data", str(path), "--prompt", "{question}", "--choices", "a,b", "--answer", "{label}"]


def start(*arguments: object, ranks: int = 1, **environment: str) -> subprocess.Popen[str]:
    """`ensembler` in a process of its own, or in several under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "ensembler", *map(str, arguments)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
