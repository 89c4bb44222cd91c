"""A benchmark's files: summary.json, pictures, and one self-contained HTML page."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ensembler.evaluation.bench import tables
from ensembler.evaluation.bench.pictures import draw_against, draw_metrics
from ensembler.evaluation.bench.recipe import Recipe
from ensembler.evaluation.bench.summary import BenchTask
from ensembler.evaluation.bench.verdict import verdict
from ensembler.evaluation.report import render
from ensembler.evaluation.rows_folder import write_whole
from ensembler.evaluation.summary import finite

SUMMARY = "summary.json"


def write_bench(
    out: Path,
    recipe: Recipe,
    tasks: Sequence[BenchTask],
    *,
    command: str,
    settings: Mapping[str, Any],
    changed: Callable[[BenchTask], Sequence[Mapping[str, Any]]],
) -> list[str]:
    """Write the files of a finished benchmark and return their names. Raises OutputError.

    `changed` returns what `changed_by` found of a task's images.
    """
    content = {
        "name": recipe.name,
        "command": command,
        "tasks": [{**finite(task.to_dict()), "verdict": verdict(task)} for task in tasks],
        "settings": settings,
    }
    write_whole(out / SUMMARY, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    pictures = {
        "metrics.png": ("The metric with its 95 % interval", draw_metrics(tasks)),
        "speed.png": ("The metric against speed", draw_against(tasks, "tokens_per_second", "tokens/s")),
        "memory.png": ("The metric against memory", _draw_memory(tasks)),
    }
    drawn = {file: (title, picture) for file, (title, picture) in pictures.items() if picture is not None}
    for file, (_, picture) in drawn.items():
        write_whole(out / file, picture)
    page = render(
        "bench_report.html.jinja",
        name=recipe.name,
        description=recipe.description,
        pictures=[(title, base64.b64encode(picture).decode()) for title, picture in drawn.values()],
        tasks=[{**_task(task), "changed": changed(task)} for task in tasks],
        command=command,
        settings=json.dumps(settings, indent=2, ensure_ascii=False),
    )
    write_whole(out / "report.html", page)
    return [SUMMARY, *drawn, "report.html"]


def _draw_memory(tasks: Sequence[BenchTask]) -> bytes | None:
    """Of the devices where there are any, else of the host."""
    on_device = draw_against(tasks, "peak_device_bytes", "peak memory of the devices, MB", 1e6)
    return on_device or draw_against(tasks, "peak_host_bytes", "peak memory of the host, MB", 1e6)


def _task(task: BenchTask) -> dict[str, Any]:
    return {
        "name": task.name,
        "heading": tables.heading(task),
        "verdict": verdict(task),
        "columns": tables.columns(task),
        "rows": tables.rows(task),
        "notes": tables.notes(task),
        "differences": tables.differences(task),
    }
