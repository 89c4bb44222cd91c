"""Curves of a sweep logged to Weights & Biases or TensorBoard, by their own libraries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ensembler.errors import ConfigError
from ensembler.evaluation.figures import TaskFigures


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError for one whose library is not installed, before anything is run."""
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(
                f"--log {name} needs its library, which is not installed; install it with: pip install {name}"
            )


def log_curves(names: Sequence[str], folder: Path, tasks: Sequence[TaskFigures], settings: Mapping[str, Any]) -> None:
    """Log the metric of each task, rule and α with its interval, and to W&B the α that was chosen."""
    if "wandb" in names:
        import wandb

        with wandb.init(project="ensembler", name=folder.name, dir=str(folder), config=dict(settings)) as run:
            run.define_metric("*", step_metric="alpha")
            for name, alpha, value in _scalars(tasks):
                run.log({"alpha": alpha, name: value})
            for task in tasks:
                for method in task.methods:
                    if method.chosen_by is not None:
                        run.summary[f"{task.name}/{method.method}/chosen alpha"] = method.alpha
    if "tensorboard" in names:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(folder / "tensorboard")) as writer:
            for name, alpha, value in _scalars(tasks):
                writer.add_scalar(name, value, round(1000 * alpha))  # TensorBoard knows whole steps only


def _scalars(tasks: Sequence[TaskFigures]) -> Iterator[tuple[str, float, float]]:
    """Names with the α and the value of each point, by α."""
    for task in tasks:
        for point in sorted(task.curve, key=lambda one: one.alpha):
            test = {"test": point.test.estimate, "test low": point.test.low, "test high": point.test.high}
            for name, value in {**test, "validation": point.validation}.items():
                if value is not None:
                    yield f"{task.name}/{task.metric}/{point.rule}/{name}", point.alpha, value
