"""Cases for the tests of sweeps: tiny members in folders, sweeps over the tasks of `task_cases`, and their rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scoring_cases import save_models
from task_cases import write_rows

from ensembler import EnsembleConfig, EnsembleForCausalLM
from ensembler.engine.grid import GridPoint
from ensembler.evaluation.backends import TransformersBackend
from ensembler.evaluation.rows_folder import Row, RowsFolder
from ensembler.evaluation.summary import TaskSummary, summarise
from ensembler.evaluation.sweep import Sweep, SweepOptions
from ensembler.evaluation.task_loading import load_tasks
from ensembler.evaluation.tasks import EvalTask
from ensembler.preflight import CheckedEnsemble, check_ensemble

RULES = ("base-change", "eft")
ALPHAS = tuple(round(0.1 * index, 1) for index in range(16))
FLAGS = {"source_ft": "--source-ft", "source_pt": "--source-pt", "target_pt": "--target-pt"}
Rows = dict[str, list[Row]]


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


def load_task(folder: Path, name: str, **settings: Any) -> EvalTask:
    """A task of a folder that `write_tasks` wrote."""
    (task,) = load_tasks([str(folder / f"{name}.yaml")], **settings)
    return task


def options(**changes: Any) -> SweepOptions:
    return SweepOptions(**{"rules": RULES, "alphas": (0.0, 0.5, 1.0), "batch_size": 3, **changes})


def run_sweep(sweep: Sweep, model: EnsembleForCausalLM, path: Path) -> Rows:
    """The rows of all examples, made into a folder at `path`."""
    folder = RowsFolder(path, sweep.settings, rows_per_id=len(sweep.grid))
    folder.begin("ensembler sweep", sweep.example_rows())
    done = frozenset(folder.rows())
    with folder:
        for _ in sweep.run(TransformersBackend(model, sweep.tokenizer), folder, sweep.unfinished(done), done):
            pass
    rows = folder.finish(sweep.ids)
    assert rows is not None
    return rows


def swept(ensemble: Ensemble, task: EvalTask, path: Path, **changes: Any) -> tuple[Sweep, Rows]:
    """A sweep of one task, and its rows."""
    sweep = Sweep(ensemble.checked, [task], options(**changes))
    return sweep, run_sweep(sweep, ensemble.model, path)


def rigged(sweep: Sweep, value: Callable[[str, int, GridPoint], Any]) -> Rows:
    """Rows that no model made: `value(part, index, point)` is the metric of the part's example of this index."""
    rows: Rows = {}
    for task in sweep.tasks:
        for part, examples in (("validation", task.parts.validation), ("test", task.parts.test)):
            for index, example in enumerate(examples):
                rows[example.id] = [
                    _row(example.id, point, {task.metric.key: value(part, index, point)}) for point in sweep.grid
                ]
    return rows


def _row(name: str, point: GridPoint, values: Mapping[str, Any]) -> Row:
    text = str(next(iter(values.values())))
    return {
        "id": name,
        "rule": point.rule,
        "alpha": point.alpha,
        "values": dict(values),
        "predictions": {"none": text},
        "answers": [[text]],
    }


def summary_of(sweep: Sweep, rows: Rows) -> TaskSummary:
    (summary,) = summarise(sweep, rows)
    return summary


def read_rows(path: Path) -> list[Row]:
    """The rows of a finished sweep, read by the test itself."""
    return [json.loads(line) for line in (path / "rows.jsonl").read_text("utf-8").splitlines()]


def column(rows: Sequence[Row], split: str, rule: str, alpha: float, key: str) -> list[Any]:
    """The values of a metric at one point, of the examples whose id holds /split/, in their order."""
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
