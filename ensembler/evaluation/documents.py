"""One document of a task, and the protocols of tasks and of what answers them. Knows nothing of models."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from ensembler.engine.grid import GridPoint

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


class Reading(NamedTuple):
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
    """Documents by split, and how their answers become a figure, such as `tasks.TextTask`."""

    @property
    def name(self) -> str:
        """The name of the task."""

    @property
    def version(self) -> str:
        """The version of its documents and metrics; figures of two versions are not to be compared."""

    @property
    def default_split(self) -> str:
        """The split that is reported."""

    @property
    def splits(self) -> Mapping[str, int]:
        """The number of documents of each split."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Its metrics; the first counts if no other is asked for."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for readers of its figures: few-shot examples, documents that were left out."""

    def describe(self) -> dict[str, Any]:
        """Return what was evaluated, as JSON; part of what rows depend on."""

    def documents(self, split: str | None = None) -> list[Document]:
        """Return the documents of a split, by default of the one that is reported. Raises ConfigError."""

    def identity(self, document: Document) -> str:
        """Return what tells documents apart: two with the same hold the same question."""

    def measure(self, document: Document, answers: Answer) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the values of a document's answers by metric key, and what was answered by filter. Raises RunError."""

    def aggregate(self, key: str, values: Sequence[Any]) -> float:
        """Return the figure of a metric from the values of all documents."""

    def standard_error(self, key: str, values: Sequence[Any]) -> float | None:
        """Return the standard error of a figure; None where there is none."""


class Answerer(Protocol):
    """Members that answer documents at all points of a grid, such as `text_answers.TextAnswerer`."""

    def describe(self) -> dict[str, Any]:
        """Return the ensemble, the backend and the packages that answers depend on, as JSON."""

    def read(self, document: Document) -> Reading:
        """Return how the members read a document. Raises PromptError for what cannot be asked; loads nothing."""

    def open(self) -> AbstractContextManager[None]:
        """Load the members; they end with the `with` block. Raises MemberError or RunError."""

    def largest_batch(self, document: Document, points: Sequence[GridPoint]) -> int:
        """Return how many such documents fit into memory at once, the members being loaded."""

    def answer(
        self, batches: Iterable[Sequence[Document]], points: Sequence[GridPoint]
    ) -> Iterator[list[list[Answer]]]:
        """Yield the answers to one batch after another: of each document, at each point."""

    def thumbnail(self, document: Document) -> str | None:
        """Return a small picture of the document as a data URI, where it shows one."""
