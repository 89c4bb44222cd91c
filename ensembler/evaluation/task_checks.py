"""Is a task sound? Found on its first documents, before a model runs: lm-eval itself lets these pass, or fails late."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ensembler.errors import ConfigError, RunError
from ensembler.evaluation.documents import Answer, Document, Metric

_LOCAL = ("json", "csv", "parquet", "text", "arrow")
_TEMPLATES = ("doc_to_text", "doc_to_target", "doc_to_choice")
_FIELD = re.compile(r"\{\{\s*(\w+)\s*\}\}")


def check_fields(task: Any, doc: Any, source: str) -> None:
    """Raise ConfigError where a row of a local file has nothing under a field that a template prints.

    A field missing from a row is null to `datasets`, and "None" in a template of lm-eval's.
    """
    if task.config.dataset_path not in _LOCAL or not isinstance(doc, Mapping):
        return
    for name in _TEMPLATES:
        template = getattr(task.config, name)
        if not isinstance(template, str):
            continue
        for field in [template] if template in doc else _FIELD.findall(template):
            if field in doc and doc[field] is None:
                raise ConfigError(f"{source} has no field {field!r}, which the task's {name} uses; mend the row")


def check_gold(task: Any, documents: list[Document]) -> None:
    """Raise ConfigError where no document names a right answer among its choices: lm-eval counts all as wrong."""
    if not any(document.choices for document in documents) or any(document.gold for document in documents):
        return
    first = documents[0]
    raise ConfigError(
        f"{first.name}: the right answer {task.doc_to_target(first.requests[0].doc)!r} is neither one of the choices "
        f"{list(first.choices)} nor an index of them; the same goes for all other documents"
    )


def check_metrics(metrics: Iterable[Metric], document: Document, measure: Callable[[Document, Answer], Any]) -> None:
    """Raise ConfigError unless the declared metrics come of the task's output, as its first document shows."""
    try:
        values, _ = measure(document, [_any_answer(request) for request in document.requests])
    except RunError:
        return  # of an answer that no model gave; a true one is told when it is measured
    for metric in metrics:
        value = values.get(metric.key)
        if metric.key not in values or (metric.is_mean and not isinstance(value, int | float | dict)):
            raise ConfigError(
                f"metric {metric.name} of task {document.task} does not fit its output; lm-eval makes "
                f"{value!r} of it for one document: choose another metric or output_type"
            )


def _any_answer(request: Any) -> Any:
    if request.request_type == "loglikelihood_rolling":
        return -1.0
    return [-1.0, False] if request.request_type == "loglikelihood" else ["1"] * (request.repeats or 1)
