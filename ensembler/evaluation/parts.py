"""Split documents into those that choose α and those that report it: never the same."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ensembler.errors import ConfigError
from ensembler.evaluation.documents import Document, Metric, Task

VALIDATION, TEST, REPEATED, PROMPTS = PARTS = ("validation", "test", "repeated", "prompts")
"""Documents that choose α, that report it, that would choose but are reported too; prompts that choose it."""


@dataclass(frozen=True)
class PlannedTask:
    """A task of a run, the metric that counts, and its documents by part.

    `num_cut`: requests that were cut to fit. `num_prompt_tokens`: of the prompts whose likelihood chooses α.
    """

    task: Task
    metric: Metric
    parts: dict[str, tuple[Document, ...]]
    num_cut: int = 0
    num_prompt_tokens: int = 0

    def clusters(self, field: str) -> list[str]:
        """Return what each test document has under a field, as text.

        Raises ConfigError where one has nothing there, or all have the same.
        """
        for document in self.parts[TEST]:
            if document.content.get(field) is None:
                known = ", ".join(document.content) or "none"
                raise ConfigError(f"{document.name} has no field {field!r} to cluster by; its fields are {known}")
        found = [str(document.content[field]) for document in self.parts[TEST]]
        if len(set(found)) < 2:
            raise ConfigError(f"all test documents of {self.task.name} have one {field}; give a field with more values")
        return found

    def by_split(self) -> list[list[Document]]:
        """Return the documents by their split, in its order: which of them are validation changes nothing."""
        splits: dict[str, list[Document]] = {}
        parts = [document for part in (VALIDATION, TEST, REPEATED) for document in self.parts[part]]
        for document in sorted(parts, key=lambda one: one.index):
            splits.setdefault(document.split, []).append(document)
        return [*splits.values(), *([list(self.parts[PROMPTS])] if self.parts[PROMPTS] else [])]


def choose_metric(task: Task, key: str | None) -> Metric:
    """Return the metric that a user asked for by its key, or the task's first; raise ConfigError if unknown."""
    known = {metric.key: metric for metric in task.metrics}
    if key is not None and key not in known:
        raise ConfigError(f"task {task.name} has no metric {key!r}; it has {', '.join(known)}")
    return known[key] if key is not None else task.metrics[0]


def split_documents(task: Task, validation: str | None, *, seed: int = 0) -> dict[str, tuple[Document, ...]]:
    """Return the documents of a task by part.

    `validation` is a number of documents, drawn from the split that lm-eval evaluates, of which the rest is test; or
    another split of the task; or None. Raises ConfigError where nothing would be left, or the two are one split.
    """
    test = task.documents()
    if validation is None:
        return _parts(task, (), test)
    if validation.isdecimal():
        drawn = set(_draw(task, len(test), int(validation), seed))
        chosen = [document for index, document in enumerate(test) if index in drawn]
        return _parts(task, chosen, [document for index, document in enumerate(test) if index not in drawn])
    if validation == task.default_split:
        others = ", ".join(name for name in task.splits if name != validation)
        raise ConfigError(
            f"the {validation} split of task {task.name} is the one that is reported, so it cannot choose alpha too; "
            f"give as validation a number of its rows, or another split{f' of {others}' if others else ''}"
        )
    return _parts(task, task.documents(validation), test)


def _draw(task: Task, num_documents: int, num: int, seed: int) -> list[int]:
    if not 0 < num < num_documents:
        raise ConfigError(
            f"validation on {num} of the {num_documents} examples of task {task.name} leaves none to choose from or to "
            f"report; give a number from 1 to {num_documents - 1}"
        )
    return random.Random(seed).sample(range(num_documents), num)


def _parts(task: Task, validation: Sequence[Document], test: Sequence[Document]) -> dict[str, tuple[Document, ...]]:
    """Data sets hold some documents twice; test keeps all of its own. What else a prompt shows does not count."""
    reported = {task.identity(document) for document in test} if validation else set()
    is_repeated = [task.identity(document) in reported for document in validation]
    if validation and all(is_repeated):
        raise ConfigError(
            f"all {len(validation)} validation examples of task {task.name} are among those that are reported; give as "
            "validation another split, or more examples"
        )
    pairs = list(zip(validation, is_repeated, strict=True))
    return {
        VALIDATION: tuple(document for document, repeated in pairs if not repeated),
        TEST: tuple(test),
        REPEATED: tuple(document for document, repeated in pairs if repeated),
        PROMPTS: (),
    }
