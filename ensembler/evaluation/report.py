"""Figures as files: summary.json, pictures, and one self-contained HTML page; two summaries side by side."""

from __future__ import annotations

import html
import json
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from ensembler.engine.grid import GridPoint
from ensembler.errors import OutputError
from ensembler.evaluation import figures, pictures
from ensembler.evaluation.documents import TEST, Document
from ensembler.evaluation.figures import MethodFigure, TaskFigures
from ensembler.evaluation.methods import Study
from ensembler.evaluation.results_file import FILE, Measured, Results
from ensembler.evaluation.verdict import recommendation, verdict
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
    escaped = html.escape(json_text(settings, indent=2), quote=False)  # a third of it is quotes
    shown = {"name": name, "description": description, "tasks": tasks, "command": command, "settings": escaped}
    makers = {"tables": figures, "pictures": pictures, "changed": changed}
    makers |= {"recommendation": recommendation, "verdict": verdict}
    summary = {"name": name, "command": command, "tasks": summaries, "settings": settings}
    files: dict[str, str | bytes] = {
        SUMMARY: json_text(summary, indent=2) + "\n",
        **{pictures.FILES[one]: pictures.draw_png(one, of) for one, of in pictures.pictures_of(tasks).items()},
        REPORT: environment.get_template("report.html.jinja").render(shown, **makers),
    }
    for file, written in files.items():
        write_whole(out / file, written)
    return list(files)


def remove_report(out: Path) -> None:
    """Remove the files that `write_report` wrote into a folder, if any."""
    for file in (SUMMARY, REPORT, *pictures.FILES.values()):
        (out / file).unlink(missing_ok=True)


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


def read_summary(folder: Path) -> list[dict[str, Any]]:
    """Return the tasks of a folder's summary.json. Raises OutputError for a folder without one of this version."""
    path = folder / SUMMARY
    if (folder / FILE).exists() and not path.exists():
        raise OutputError(f"{folder} is of a run that has not finished; run its command again, which goes on with it")
    if not path.exists():
        found = f"holds no {SUMMARY}" if folder.is_dir() else "is no folder"
        raise OutputError(f"{folder} {found}; give {_EXPECTED}")
    try:
        tasks: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["tasks"]
        for task in tasks:
            _by_method(task)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"{path} is no summary of this version; run the command that wrote it again, or give {_EXPECTED}"
        ) from error
    return tasks


def _read(folder: Path) -> dict[tuple[Any, ...], tuple[dict[str, Any] | None, str]]:
    """The methods of a folder by their names, each with a hash of its test documents."""
    return {key: found for task in read_summary(folder) for key, found in _by_method(task).items()}


def _by_method(task: Mapping[str, Any]) -> dict[tuple[Any, ...], tuple[dict[str, Any] | None, str]]:
    return {
        (*((name, task[name]) for name in _KEY), ("method", method["method"])): (method, task["tests"])
        for method in task["methods"]
    }


def _names(methods: Iterable[tuple[tuple[str, Any], ...]]) -> str:
    """The methods by the experiment, task and metric that they were measured on."""
    found: dict[str, list[str]] = {}
    for names in map(dict, methods):
        found.setdefault(" ".join(filter(None, map(names.get, _KEY[:3]))), []).append(names["method"])
    return "; ".join(f"{measured}: {', '.join(keys)}" for measured, keys in found.items())


def json_text(content: Mapping[str, Any], *, indent: int | None = None) -> str:
    """Return `content` as JSON, where null is a number that is not finite."""
    return str(require("pydantic_core", "eval").to_json(content, indent=indent, inf_nan_mode="null"), "utf-8")


_NUM_DOCUMENTS = 10
_PROMPT_CHARACTERS = 700  # of a prompt's end


def changed_in(studies: Sequence[Study], results: Results, task: TaskFigures) -> list[dict[str, Any]]:
    """Return what `changed_by` finds for each method of a task with a chosen or given α; of several seeds the first."""
    found = []
    for plan in (plan for study in studies if study.name == task.experiment for plan in study.plans):
        keys = {method.key for method in plan.run.methods if plan.run.seed in (None, 0)}
        methods = [method for method in task.methods if method.method in keys and method.chosen_by is not None]
        if methods:
            planned = next(one for one in plan.tasks if one.task.name == task.task)
            documents = {document.name: document for document in planned.subsets[TEST]}
            rows = [(documents[name], at) for name, at in results.rows(plan.name, task.task) if name in documents]
            if len(rows) == len(documents):
                measured = [(document, dict(zip(plan.grid, points, strict=True))) for document, points in rows]
                found += [changed_by(measured, method, task, plan.answerer.thumbnail) for method in methods]
    return [one for one in found if one is not None]


def changed_by(
    measured: Sequence[tuple[Document, Mapping[GridPoint, Measured]]],
    method: MethodFigure,
    task: TaskFigures,
    thumbnail: Callable[[Document], str | None] = lambda document: None,
) -> dict[str, Any] | None:
    """Return what a page shows of the test documents that a method answers otherwise than its rule at α = 0.

    `thumbnail` returns a small picture of a document as a data URI, where it shows one. None where α is 0, or the
    rows have no α = 0 or no answers: log-probs alone.
    """
    points = GridPoint(method.rule, 0.0), GridPoint(method.rule, method.alpha or 0.0)
    if not method.alpha or any(points[0] not in rows or not rows[points[0]].predictions for _, rows in measured):
        return None
    pairs = [(document, [_side(point, rows[point], task.metric) for point in points]) for document, rows in measured]
    changes = [pair for pair in pairs if pair[1][0]["answer"] != pair[1][1]["answer"]]
    drawn = sorted(random.Random(0).sample(range(len(changes)), min(_NUM_DOCUMENTS, len(changes))))
    sign = 1 if task.higher_is_better else -1
    gains = [sign * (after["value"] - before["value"]) for _, (before, after) in pairs]
    better, worse = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    by_metric = f"; by {task.metric}, {better:,} documents are better and {worse:,} worse" if task.is_percent else ""
    return {
        "title": f"{method.title} beside α = 0{', of the first seed of training' if method.seeds else ''}",
        "counts": f"α changed {len(changes):,} of {len(pairs):,} answers{by_metric}. {len(drawn)} of the changed ones, "
        "drawn at random:",
        "examples": [
            {
                "name": document.name,
                "picture": thumbnail(document),
                "prompt": _end(document.prompt),
                "gold": document.gold,
                "answers": sides,
            }
            for document, sides in (changes[index] for index in drawn)
        ],
    }


def _end(prompt: str) -> str:
    return prompt if len(prompt) <= _PROMPT_CHARACTERS else f"… {prompt[-_PROMPT_CHARACTERS:]}"


def _side(point: GridPoint, measured: Measured, metric: str) -> dict[str, Any]:
    """One answer: as it is compared; as text, whole where it was generated, the first of several; and its value.

    The value is NaN where it is no number.
    """
    predictions, value = measured.predictions, measured.values.get(metric)
    answer = text = str(predictions.get(metric.partition(",")[2], next(iter(predictions.values()), "")))
    match measured.answers:
        case [[str(text), *_], *_]:
            pass
    number = value if isinstance(value, int | float) else math.nan
    return {"at": f"α = {point.alpha:g}", "answer": answer, "text": text, "value": number}
