"""Test examples that α changed, for a page: how many, and some of them beside the anchor's answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ensembler.engine.grid import GridPoint
from ensembler.evaluation.metric_values import from_json
from ensembler.evaluation.rows_folder import Row
from ensembler.evaluation.summary import label
from ensembler.evaluation.sweep_tasks import TEST

_NUM_EXAMPLES = 10
_PROMPT_CHARACTERS = 700  # of a prompt's end


@dataclass(frozen=True)
class Answers:
    """The rows of a run and what was asked, by id as in the folder of results, and the task and metric that count.

    `thumbnail` returns a small picture of the example with an id as a data URI, where it is an image.
    """

    task: str
    metric: str
    higher_is_better: bool
    rows: Mapping[str, Sequence[Row]]
    examples: Mapping[str, Row]
    thumbnail: Callable[[str], str | None] = lambda name: None


@dataclass(frozen=True)
class _Change:
    id: str
    before: Row
    after: Row


def changed_by(answers: Answers, rule: str, alpha: float) -> dict[str, Any] | None:
    """Return what a page shows of the examples that a rule answers otherwise at an α than at 0, some drawn evenly.

    None where α is 0, or the rows have no α = 0.
    """
    anchor, chosen = GridPoint(rule, 0.0), GridPoint(rule, alpha)
    if alpha == 0 or anchor not in {_point(row) for row in next(iter(answers.rows.values()))}:
        return None
    filter_name = answers.metric.partition(",")[2]
    changes, num_better, num_worse, num_test = [], 0, 0, 0
    for name, of_example in answers.rows.items():
        if (answers.examples[name]["part"], answers.examples[name]["task"]) != (TEST, answers.task):
            continue
        num_test += 1
        by_point = {_point(row): row for row in of_example}
        before, after = by_point[anchor], by_point[chosen]
        if _answer(before, filter_name) != _answer(after, filter_name):
            changes.append(_Change(name, before, after))
        gain = _gain(before, after, answers)
        num_better += gain > 0
        num_worse += gain < 0
    drawn = random.Random(0).sample(changes, min(_NUM_EXAMPLES, len(changes)))
    order = {name: place for place, name in enumerate(answers.rows)}
    return {
        "title": f"{label(chosen)} beside α = 0",
        "counts": f"α changed {len(changes):,} of {num_test:,} answers; by {answers.metric}, {num_better:,} "
        f"examples are better and {num_worse:,} worse. {len(drawn)} of the changed ones, drawn at random:",
        "before": label(anchor),
        "after": label(chosen),
        "examples": [_shown(change, answers, filter_name) for change in sorted(drawn, key=lambda one: order[one.id])],
    }


def _shown(change: _Change, answers: Answers, filter_name: str) -> dict[str, Any]:
    asked = answers.examples[change.id]
    return {
        "id": change.id,
        "picture": answers.thumbnail(change.id),
        "prompt": _end(asked["prompt"]),
        "gold": asked["gold"] or "",
        "before": _text(change.before, filter_name),
        "after": _text(change.after, filter_name),
        "before_class": _colour(change.before, answers.metric),
        "after_class": _colour(change.after, answers.metric),
    }


def _point(row: Row) -> GridPoint:
    return GridPoint(row["rule"], row["alpha"])


def _answer(row: Row, filter_name: str) -> str:
    predictions = row["predictions"]
    return str(predictions.get(filter_name, next(iter(predictions.values()), "")))


def _text(row: Row, filter_name: str) -> str:
    """The whole text that was generated, the first of several; of choices the chosen one."""
    (first, *_) = row["answers"] or [None]
    is_text = isinstance(first, list) and first and isinstance(first[0], str)
    return str(first[0]) if is_text else _answer(row, filter_name)


def _gain(before: Row, after: Row, answers: Answers) -> float:
    a, b = (from_json(row["values"].get(answers.metric)) for row in (before, after))
    if not isinstance(a, int | float) or not isinstance(b, int | float):
        return 0.0  # a metric of all examples at once tells nothing of one
    return (b - a) if answers.higher_is_better else (a - b)


def _colour(row: Row, metric: str) -> str:
    value = row["values"].get(metric)
    return "right" if value == 1 else "wrong" if value == 0 else ""


def _end(prompt: str) -> str:
    return prompt if len(prompt) <= _PROMPT_CHARACTERS else f"… {prompt[-_PROMPT_CHARACTERS:]}"
