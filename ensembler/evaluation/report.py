"""Figures as files: summary.json, pictures, and one self-contained HTML page; two summaries side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from ensembler.errors import OutputError
from ensembler.evaluation import pictures, tables
from ensembler.evaluation.figures import TaskFigures
from ensembler.evaluation.recommendation import recommendation
from ensembler.evaluation.results_file import FILE
from ensembler.evaluation.verdict import verdict
from ensembler.extras import require
from ensembler.files import write_whole

SUMMARY, REPORT = "summary.json", "report.html"
_EXPECTED = "two folders that `ensembler bench` or `ensembler sweep` wrote"
_KEY = ("experiment", "task", "metric", "is_percent")


def write_report(
    out: Path,
    name: str,
    description: str,
    tasks: Sequence[TaskFigures],
    *,
    command: str,
    settings: Mapping[str, Any],
    changed: Callable[[TaskFigures], Sequence[Mapping[str, Any]]],
) -> list[str]:
    """Write the files of a finished run into the folder `out` and return their names. Raises OutputError.

    `changed` returns what `changed_by` found of a task, for each α that is to be shown. In JSON, null is a number that
    is not finite.
    """
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    summaries = [{**vars(task), "recommendation": recommendation(task), "verdict": verdict(task)} for task in tasks]
    shown = {"name": name, "description": description, "tasks": tasks, "command": command, "settings": _json(settings)}
    makers = {"tables": tables, "pictures": pictures, "changed": changed}
    makers |= {"recommendation": recommendation, "verdict": verdict}
    files: dict[str, str | bytes] = {
        SUMMARY: _json({"name": name, "command": command, "tasks": summaries, "settings": settings}) + "\n",
        **{pictures.FILES[one]: pictures.draw_png(one, of) for one, of in pictures.pictures_of(tasks).items()},
        REPORT: environment.get_template("report.html.jinja").render(shown, **makers),
    }
    for file, written in files.items():
        write_whole(out / file, written)
    return list(files)


def compare_folders(a: Path, b: Path) -> list[dict[str, Any]]:
    """Return every method of every task that either folder has, as JSON.

    Beside the names of its experiment, task, metric and method: `a` and `b`, its figures as summary.json has them, None
    where a folder has none, and whether both were tested on the `same_documents`, None where one has no figures. Raises
    OutputError for a folder without a summary, and for two without a method in common.
    """
    one, other = _read(a), _read(b)
    if not one.keys() & other.keys():
        raise OutputError(
            f"no method is in both folders, on the same task by the same metric: {a} has ({_names(one)}), {b} has "
            f"({_names(other)}); give two that can be set side by side"
        )
    found = []
    for key in dict.fromkeys((*one, *other)):
        (left, tests), (right, others) = one.get(key, (None, "")), other.get(key, (None, ""))
        same = tests == others if left and right else None
        found.append({**dict(key), "a": left, "b": right, "same_documents": same})
    return found


def _read(folder: Path) -> dict[tuple[Any, ...], tuple[dict[str, Any] | None, str]]:
    """The methods of a folder by their names, each with a hash of its test documents."""
    path = folder / SUMMARY
    if (folder / FILE).exists() and not path.exists():
        raise OutputError(f"{folder} is of a run that has not finished; run its command again, which goes on with it")
    if not path.exists():
        found = f"holds no {SUMMARY}" if folder.is_dir() else "is no folder"
        raise OutputError(f"{folder} {found}; give {_EXPECTED}")
    try:
        return {
            (*((name, task[name]) for name in _KEY), ("method", method["method"])): (method, task["tests"])
            for task in json.loads(path.read_text(encoding="utf-8"))["tasks"]
            for method in task["methods"]
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"{path} is no summary of this version; run the command that wrote it again, or give {_EXPECTED}"
        ) from error


def _names(methods: Iterable[tuple[tuple[str, Any], ...]]) -> str:
    """The methods by the experiment, task and metric that they were measured on."""
    found: dict[str, list[str]] = {}
    for names in map(dict, methods):
        found.setdefault(" ".join(filter(None, map(names.get, _KEY[:3]))), []).append(names["method"])
    return "; ".join(f"{measured}: {', '.join(keys)}" for measured, keys in found.items())


def _json(content: Mapping[str, Any]) -> str:
    return str(require("pydantic_core", "eval").to_json(content, indent=2, inf_nan_mode="null"), "utf-8")
