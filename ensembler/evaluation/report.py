"""A sweep as one self-contained HTML page: the picture, the tables, examples that α changed, how to run it again."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensembler.decoding.points import GridPoint
from ensembler.evaluation.metric_values import from_json
from ensembler.evaluation.pictures import draw_sweep
from ensembler.evaluation.rows_folder import Row, RowsFolder, read_examples, write_whole
from ensembler.evaluation.summary import Choice, TaskSummary, label, to_json
from ensembler.evaluation.sweep import Sweep
from ensembler.evaluation.sweep_tasks import TEST
from ensembler.evaluation.sweep_texts import choice_lines, columns, curve_rows, difference_rows, heading, method_rows
from ensembler.extras import require

_NUM_EXAMPLES = 10
_PROMPT_CHARACTERS = 700  # of a prompt's end


def make_report(
    summaries: Sequence[TaskSummary],
    rows: Mapping[str, Sequence[Row]],
    examples: Mapping[str, Row],
    picture: bytes,
    *,
    command: str,
    settings: Mapping[str, Any],
    thumbnail: Callable[[str], str | None] = lambda name: None,
) -> str:
    """Return the page. `rows` and `examples` are by id, as the folder of results has them.

    `thumbnail` returns a small picture of the example with an id as a data URI, where it is an image.
    """
    return render(
        "sweep_report.html.jinja",
        summaries=summaries,
        lines=[line for summary in summaries for line in choice_lines(summary)],
        picture=base64.b64encode(picture).decode(),
        tasks=[_task(summary, rows, examples, thumbnail) for summary in summaries],
        command=command,
        settings=json.dumps(settings, indent=2, ensure_ascii=False),
    )


def render(template: str, **values: Any) -> str:
    """Return one of this package's pages; values are escaped."""
    jinja2 = require("jinja2", "eval")
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    return str(jinja2.Environment(loader=folder, autoescape=True).get_template(template).render(**values))


def _task(
    summary: TaskSummary,
    rows: Mapping[str, Sequence[Row]],
    examples: Mapping[str, Row],
    thumbnail: Callable[[str], str | None],
) -> dict[str, Any]:
    points = {_point(row) for row in next(iter(rows.values()))}
    return {
        "summary": summary,
        "heading": heading(summary),
        "columns": columns(summary),
        "methods": method_rows(summary),
        "differences": difference_rows(summary),
        "changed": [
            _changed(summary, choice, rows, examples, thumbnail)
            for choice in summary.choices
            if choice.alpha != 0 and GridPoint(choice.rule, 0.0) in points
        ],
        "curve": curve_rows(summary),
    }


def _point(row: Row) -> GridPoint:
    return GridPoint(row["rule"], row["alpha"])


@dataclass(frozen=True)
class _Change:
    """A test example whose answer α changed."""

    id: str
    before: Row
    after: Row


def _changed(
    summary: TaskSummary,
    choice: Choice,
    rows: Mapping[str, Sequence[Row]],
    examples: Mapping[str, Row],
    thumbnail: Callable[[str], str | None],
) -> dict[str, Any]:
    """The examples that a rule answers otherwise at its α than at 0: how many, and some of them, drawn evenly."""
    anchor, chosen = GridPoint(choice.rule, 0.0), GridPoint(choice.rule, choice.alpha)
    filter_name = summary.metric.partition(",")[2]
    changes, num_better, num_worse = [], 0, 0
    for name, of_example in rows.items():
        if (examples[name]["part"], examples[name]["task"]) != (TEST, summary.task):
            continue
        by_point = {_point(row): row for row in of_example}
        before, after = by_point[anchor], by_point[chosen]
        if _answer(before, filter_name) != _answer(after, filter_name):
            changes.append(_Change(name, before, after))
        gain = _gain(before, after, summary)
        num_better += gain > 0
        num_worse += gain < 0
    drawn = random.Random(0).sample(changes, min(_NUM_EXAMPLES, len(changes)))
    order = {name: place for place, name in enumerate(rows)}
    return {
        "title": f"{label(chosen)} beside α = 0",
        "counts": f"α changed {len(changes):,} of {summary.num_test:,} answers; by {summary.metric}, {num_better:,} "
        f"examples are better and {num_worse:,} worse. {len(drawn)} of the changed ones, drawn at random:",
        "before": label(anchor),
        "after": label(chosen),
        "examples": [
            {
                "id": change.id,
                "picture": thumbnail(change.id),
                "prompt": _end(examples[change.id]["prompt"]),
                "gold": examples[change.id]["gold"] or "",
                "before": _text(change.before, filter_name),
                "after": _text(change.after, filter_name),
                "before_class": _colour(change.before, summary),
                "after_class": _colour(change.after, summary),
            }
            for change in sorted(drawn, key=lambda change: order[change.id])
        ],
    }


def _answer(row: Row, filter_name: str) -> str:
    predictions = row["predictions"]
    return str(predictions.get(filter_name, next(iter(predictions.values()), "")))


def _text(row: Row, filter_name: str) -> str:
    """The whole text that was generated, the first of several; of choices the chosen one."""
    (first, *_) = row["answers"] or [None]
    is_text = isinstance(first, list) and first and isinstance(first[0], str)
    return str(first[0]) if is_text else _answer(row, filter_name)


def _gain(before: Row, after: Row, summary: TaskSummary) -> float:
    a, b = (from_json(row["values"].get(summary.metric)) for row in (before, after))
    if not isinstance(a, int | float) or not isinstance(b, int | float):
        return 0.0  # a metric of all examples at once tells nothing of one
    return (b - a) if summary.higher_is_better else (a - b)


def _colour(row: Row, summary: TaskSummary) -> str:
    value = row["values"].get(summary.metric)
    return "right" if value == 1 else "wrong" if value == 0 else ""


def _end(prompt: str) -> str:
    return prompt if len(prompt) <= _PROMPT_CHARACTERS else f"… {prompt[-_PROMPT_CHARACTERS:]}"


def write_results(
    sweep: Sweep, folder: RowsFolder, rows: Mapping[str, Sequence[Row]], summaries: Sequence[TaskSummary]
) -> None:
    """Write summary.json, sweep.png and report.html beside the rows of a finished sweep. Raises OutputError."""
    picture = draw_sweep(summaries)
    command = folder.command
    write_whole(folder.path / "sweep.png", picture)
    write_whole(folder.path / "summary.json", to_json(summaries, sweep, command))
    page = make_report(
        summaries,
        rows,
        read_examples(folder.path),
        picture,
        command=command,
        settings=sweep.settings,
        thumbnail=sweep.thumbnail,
    )
    write_whole(folder.path / "report.html", page)
