"""Documents of tasks, divided into those that choose α and those that report it. Knows nothing of models."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from ensembler.engine.grid import GridPoint
from ensembler.errors import ConfigError, RunError

# Names of right or wrong: acc_norm, exact_match, pass@1, prompt_level_strict_acc ...
_SHARE = re.compile(r"(^|_)(acc|accuracy|em|exact|match|pass|correct|verify)([_@]|$)")

Answer = list[Any]
"""The answers to a document's requests at one point, as JSON: [log-prob in nats, is it the greedy one] of a
continuation, a log-prob of a whole text, a list of texts of a generation."""


@dataclass(frozen=True, eq=False)
class Document:
    """One document of a split of a task.

    `content` is the document as JSON; `prompt`, `choices` and `gold` (the right answer) are for people to read.
    `requests`: what is asked of the members; of texts lm-eval's own instances.
    """

    task: str
    split: str
    index: int
    content: Mapping[str, Any]
    prompt: str
    requests: tuple[Any, ...] = field(repr=False)
    choices: tuple[str, ...] = ()
    gold: str | None = None

    @property
    def name(self) -> str:
        """The name of the document, the same in every run: task/split/index."""
        return f"{self.task}/{self.split}/{self.index}"


@dataclass(frozen=True)
class Metric:
    """A figure of a task.

    `key` names it in rows: "acc", or "exact_match,flexible-extract" in a task with several filters. `is_mean`: it is
    the mean of one number per document, and not computed from all of them at once, as F1 is.
    """

    key: str
    name: str
    filter: str
    higher_is_better: bool
    is_mean: bool

    @property
    def is_percent(self) -> bool:
        """Return whether it is by its name a share of right answers, shown in percent; known before anything runs."""
        return self.is_mean and _SHARE.search(self.name) is not None


class EncodedDocument(NamedTuple):
    """A document as the members read it.

    `length` of its longest request in tokens, those it may generate among them (0 where there are none), a `digest` of
    what they read, `num_scored` tokens whose log-prob is asked for, and `num_cut` requests that lost tokens on the left
    to fit into the context.
    """

    length: int
    digest: str
    num_scored: int = 0
    num_cut: int = 0


class Task(Protocol):
    """Documents by split, and how their answers become a figure; `tasks.TextTask` says what each method returns."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def default_split(self) -> str: ...
    @property
    def splits(self) -> Mapping[str, int]: ...
    @property
    def metrics(self) -> tuple[Metric, ...]: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    def describe(self) -> dict[str, Any]: ...
    def documents(self, split: str | None = None) -> list[Document]: ...
    def identity(self, document: Document) -> str: ...
    def measure(self, document: Document, answers: Answer) -> tuple[dict[str, Any], dict[str, str]]: ...
    def aggregate(self, key: str, values: Sequence[Any]) -> float: ...
    def standard_error(self, key: str, values: Sequence[Any]) -> float | None: ...


class Answerer(Protocol):
    """Members that answer documents at all points of a grid; see `text_answers.TextAnswerer`."""

    def describe(self, *, verify_weights: bool = False) -> dict[str, Any]: ...
    def encode(self, document: Document) -> EncodedDocument: ...
    def open(self) -> AbstractContextManager[None]: ...
    def largest_batch(self, document: Document, points: Sequence[GridPoint]) -> int: ...
    def answer(
        self, batches: Iterable[Sequence[Document]], points: Sequence[GridPoint]
    ) -> Iterator[list[list[Answer]]]: ...
    def thumbnail(self, document: Document) -> str | None: ...


VALIDATION, TEST, REPEATED, PROMPTS = SUBSETS = ("validation", "test", "repeated", "prompts")
"""Documents that choose α, that report it, that would choose but are reported too; prompts that choose it."""


@dataclass(frozen=True)
class PlannedTask:
    """A task of a run, the metric that counts, and its documents by subset.

    `num_cut`: requests that were cut to fit. `num_prompt_tokens`: of the prompts whose likelihood chooses α.
    """

    task: Task
    metric: Metric
    subsets: dict[str, tuple[Document, ...]]
    num_cut: int = 0
    num_prompt_tokens: int = 0

    def clusters(self, field: str) -> list[str]:
        """Return what each test document has under a field, as text.

        Raises ConfigError where one has nothing there, or all have the same.
        """
        for document in self.subsets[TEST]:
            if document.content.get(field) is None:
                known = ", ".join(document.content) or "none"
                raise ConfigError(f"{document.name} has no field {field!r} to cluster by; its fields are {known}")
        found = [str(document.content[field]) for document in self.subsets[TEST]]
        if len(set(found)) < 2:
            raise ConfigError(f"all test documents of {self.task.name} have one {field}; give a field with more values")
        return found

    def by_split(self) -> list[list[Document]]:
        """Return the documents by their split, in its order: which of them are validation changes nothing."""
        splits: dict[str, list[Document]] = {}
        subsets = [document for subset in (VALIDATION, TEST, REPEATED) for document in self.subsets[subset]]
        for document in sorted(subsets, key=lambda one: one.index):
            splits.setdefault(document.split, []).append(document)
        return [documents for documents in (*splits.values(), list(self.subsets[PROMPTS])) if documents]


def choose_metric(task: Task, key: str | None) -> Metric:
    """Return the metric that a user asked for by its key, or the task's first; raise ConfigError if unknown."""
    known = {metric.key: metric for metric in task.metrics}
    key = key or task.metrics[0].key
    if key not in known:
        raise ConfigError(f"task {task.name} has no metric {key!r}; it has {', '.join(known)}")
    return known[key]


def split_documents(task: Task, validation: str | None, *, seed: int = 0) -> dict[str, tuple[Document, ...]]:
    """Return the documents of a task by subset.

    `validation` is a number of documents, drawn from the split that lm-eval evaluates, of which the rest is test; or
    another split of the task; or None. Raises ConfigError where nothing would be left, or the two are one split.
    """
    test, chosen = task.documents(), list[Document]()
    if validation is not None and validation.isdecimal():
        if not 0 < int(validation) < len(test):
            raise ConfigError(
                f"validation on {validation} of the {len(test)} examples of task {task.name} leaves none to choose "
                f"from or to report; give a number from 1 to {len(test) - 1}"
            )
        drawn = set(random.Random(seed).sample(range(len(test)), int(validation)))
        chosen = [document for index, document in enumerate(test) if index in drawn]
        test = [document for index, document in enumerate(test) if index not in drawn]
    elif validation == task.default_split:
        others = ", ".join(name for name in task.splits if name != validation)
        raise ConfigError(
            f"the {validation} split of task {task.name} is the one that is reported, so it cannot choose alpha too; "
            f"give as validation a number of its rows, or another split{f' of {others}' if others else ''}"
        )
    elif validation is not None:
        chosen = task.documents(validation)
    # Data sets hold some documents twice; test keeps all of its own. What else a prompt shows does not count.
    reported = {task.identity(document) for document in test} if chosen else set()
    repeated = {document.name for document in chosen if task.identity(document) in reported}
    if chosen and len(repeated) == len(chosen):
        raise ConfigError(
            f"all {len(chosen)} validation examples of task {task.name} are among those that are reported; give as "
            "validation another split, or more examples"
        )
    return {
        VALIDATION: tuple(document for document in chosen if document.name not in repeated),
        TEST: tuple(test),
        REPEATED: tuple(document for document in chosen if document.name in repeated),
        PROMPTS: (),
    }


def to_json(value: Any, source: str) -> Any:
    """Return `value` for a line of strict JSON; `from_json` undoes it, but that a tuple comes back as a list.

    NumPy numbers and arrays become numbers and lists, an infinity or NaN an object such as {"float": "-inf"}. Raises
    RunError, which names `source`, for a value that JSON cannot hold.
    """
    if hasattr(value, "tolist"):  # NumPy's scalars and arrays
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [to_json(item, source) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: to_json(item, source) for key, item in value.items()}
    raise RunError(
        f"{source} has the value {str(value)[:60]!r} ({type(value).__name__}), which no row can hold; "
        "expected numbers, texts and lists of them"
    )


def from_json(value: Any) -> Any:
    """Return what `to_json` was given, as read from JSON."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if isinstance(value, dict):
        if value.keys() == {"float"}:
            return float(value["float"])
        return {key: from_json(item) for key, item in value.items()}
    return value
