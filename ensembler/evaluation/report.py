"""A sweep as one self-contained HTML page: the picture, the tables, examples that α changed, how to run it again."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ensembler.evaluation.changes import Answers, changed_by
from ensembler.evaluation.pictures import draw_sweep
from ensembler.evaluation.rows_folder import Row, RowsFolder, read_examples, write_whole
from ensembler.evaluation.summary import TaskSummary, to_json
from ensembler.evaluation.sweep import Sweep
from ensembler.evaluation.sweep_texts import choice_lines, columns, curve_rows, difference_rows, heading, method_rows
from ensembler.extras import require


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
    """Return the page. `rows`, `examples` and `thumbnail` are those of `Answers`."""
    return render(
        "sweep_report.html.jinja",
        summaries=summaries,
        lines=[line for summary in summaries for line in choice_lines(summary)],
        picture=base64.b64encode(picture).decode(),
        tasks=[
            _task(
                summary,
                Answers(summary.task, summary.metric, summary.higher_is_better, rows, examples, thumbnail),
            )
            for summary in summaries
        ],
        command=command,
        settings=json.dumps(settings, indent=2, ensure_ascii=False),
    )


def render(template: str, **values: Any) -> str:
    """Return one of this package's pages; values are escaped."""
    jinja2 = require("jinja2", "eval")
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    return str(jinja2.Environment(loader=folder, autoescape=True).get_template(template).render(**values))


def _task(summary: TaskSummary, answers: Answers) -> dict[str, Any]:
    changed = [changed_by(answers, choice.rule, choice.alpha) for choice in summary.choices]
    return {
        "summary": summary,
        "heading": heading(summary),
        "columns": columns(summary),
        "methods": method_rows(summary),
        "differences": difference_rows(summary),
        "changed": [one for one in changed if one is not None],
        "curve": curve_rows(summary),
    }


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
