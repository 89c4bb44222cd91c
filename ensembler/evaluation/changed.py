"""Test documents that α changed, for a page: how many, and some of them beside the anchor's answer."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ensembler.engine.grid import GridPoint
from ensembler.evaluation.documents import Document
from ensembler.evaluation.figures import MethodFigure, TaskFigures
from ensembler.evaluation.parts import TEST
from ensembler.evaluation.results_file import Measured, Results
from ensembler.evaluation.study import Study

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
            documents = {document.name: document for document in planned.parts[TEST]}
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
