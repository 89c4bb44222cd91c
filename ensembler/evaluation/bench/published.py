"""Figures of a paper in a recipe: read from it, and checked against the tasks that it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from ensembler.errors import ConfigError
from ensembler.evaluation.bench.measure import Cost
from ensembler.evaluation.bench.recipe import METHODS, TUNED, Experiment, Figure
from ensembler.evaluation.bench.values import check_keys, check_mapping, nearest, read_number
from ensembler.evaluation.swept_task import SweptTask

_COSTS = tuple(each.name for each in fields(Cost))


def read_figures(published: Any, methods: Sequence[str], where: str) -> dict[str, dict[str, Figure]]:
    """Return figures by task and method, where each is a number, or numbers by metric. Raises ConfigError."""
    check_mapping(published, f"{where}: published")
    found = {}
    for task, figures in published.items():
        _check_methods(figures, methods, f"{where}: published of {task}")
        found[str(task)] = {
            method: _read_figure(figure, f"{where}: published figure of {method} on {task}")
            for method, figure in figures.items()
        }
    return found


def read_published_alphas(published: Any, methods: Sequence[str], where: str) -> dict[str, dict[str, float]]:
    """Return the α of a paper by task and method. Raises ConfigError."""
    check_mapping(published, f"{where}: published_alphas")
    found = {}
    for task, alphas in published.items():
        _check_methods(alphas, methods, f"{where}: published_alphas of {task}")
        check_keys(alphas, TUNED, f"{where}: published_alphas of {task}", "method with an alpha")
        found[str(task)] = {
            method: read_number(alpha, f"{where}: published alpha of {method} on {task}")
            for method, alpha in alphas.items()
        }
    return found


def read_costs(published: Any, methods: Sequence[str], where: str) -> dict[str, dict[str, float]]:
    """Return costs by method and name. Raises ConfigError."""
    _check_methods(published, methods, f"{where}: published_costs")
    found = {}
    for method, costs in published.items():
        check_keys(costs, _COSTS, f"{where}: published_costs of {method}", "cost")
        found[method] = {
            name: read_number(value, f"{where}: published {name} of {method}") for name, value in costs.items()
        }
    return found


def check_tasks(experiment: Experiment, tasks: Sequence[SweptTask]) -> None:
    """Raise ConfigError where figures are of a task that is not run, or of a metric that a task has not."""
    by_name = {task.name: task for task in tasks}
    for name in (*experiment.published, *experiment.published_alphas):
        if name not in by_name:
            raise ConfigError(f"published figures of a task that is not run, {name!r}{nearest(name, list(by_name))}")
    for name, figures in experiment.published.items():
        metrics = [metric.key for metric in by_name[name].metrics]
        for figure in figures.values():
            unknown = [metric for metric in figure if metric not in metrics] if isinstance(figure, Mapping) else []
            if unknown:
                raise ConfigError(
                    f"published figures of {name} by an unknown metric, {unknown[0]!r}{nearest(unknown[0], metrics)}"
                )


def _check_methods(content: Any, methods: Sequence[str], where: str) -> None:
    """A figure that nothing stands beside would be lost in silence."""
    check_mapping(content, where)
    for method in content:
        if method not in METHODS:
            raise ConfigError(f"{where}: unknown method {method!r}{nearest(str(method), tuple(METHODS))}")
        if method not in methods:
            raise ConfigError(f"{where}: {method} is not among the methods; add it to them, or leave its figures out")


def _read_figure(figure: Any, where: str) -> Figure:
    if not isinstance(figure, Mapping):
        return read_number(figure, where)
    if not figure:
        raise ConfigError(f"{where} is empty; expected a number, or numbers by metric")
    return {str(metric): read_number(value, f"{where} by {metric}") for metric, value in figure.items()}
