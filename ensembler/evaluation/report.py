"""Figures as files: summary.json, pictures, and one self-contained HTML page; two summaries side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ensembler.errors import OutputError
from ensembler.evaluation import pictures, tables
from ensembler.evaluation.figures import TaskFigures
from ensembler.evaluation.verdict import verdict
from ensembler.extras import require
from ensembler.files import write_whole

SUMMARY, REPORT = "summary.json", "report.html"
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
    jinja2 = require("jinja2", "eval")
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    told = [{**vars(task), "verdict": verdict(task)} for task in tasks]
    shown = {"name": name, "description": description, "tasks": tasks, "command": command, "settings": _json(settings)}
    makers = {"tables": tables, "verdict": verdict, "pictures": pictures, "changed": changed}
    files: dict[str, str | bytes] = {
        SUMMARY: _json({"name": name, "command": command, "tasks": told, "settings": settings}) + "\n",
        **{pictures.FILES[one]: pictures.draw_png(one, of) for one, of in pictures.pictures_of(tasks).items()},
        REPORT: environment.get_template("report.html.jinja").render(shown, **makers),
    }
    for file, written in files.items():
        write_whole(out / file, written)
    return list(files)


def compare_folders(a: Path, b: Path) -> list[dict[str, Any]]:
    """Return every method of every task that either folder has, as JSON.

    Beside the names of its experiment, task, metric and method: `a` and `b`, its figures as summary.json has them, None
    where a folder has none, and whether both were tested on the `same_documents`. Raises OutputError for a folder
    without a summary.
    """
    one, other = _read(a), _read(b)
    found = []
    for key in dict.fromkeys((*one, *other)):
        (left, tests), (right, others) = one.get(key, (None, "")), other.get(key, (None, ""))
        found.append({**dict(key), "a": left, "b": right, "same_documents": tests == others})
    return found


def _read(folder: Path) -> dict[tuple[Any, ...], tuple[dict[str, Any] | None, str]]:
    """The methods of a folder by their names, each with a hash of its test documents."""
    path = folder / SUMMARY
    try:
        return {
            (*((name, task[name]) for name in _KEY), ("method", method["method"])): (method, task["tests"])
            for task in json.loads(path.read_text(encoding="utf-8"))["tasks"]
            for method in task["methods"]
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"{path} is no summary of this version; give two folders of `ensembler bench` or `ensembler sweep`, or run "
            "the command of an older one again"
        ) from error


def _json(content: Mapping[str, Any]) -> str:
    return str(require("pydantic_core", "eval").to_json(content, indent=2, inf_nan_mode="null"), "utf-8")
