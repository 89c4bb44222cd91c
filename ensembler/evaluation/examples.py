"""One document of a task: what a model is asked, and what comes of its answers. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Continuation:
    """How probable is `text` after `context`? The answer is (log-prob in nats, whether greedy decoding gives it)."""

    context: str
    text: str


@dataclass(frozen=True)
class Rolling:
    """How probable is a whole text, window after window where it is long? The answer is its log-prob in nats."""

    text: str


@dataclass(frozen=True)
class Generation:
    """What comes after `context`? The answer is a list of `repeats` texts, each cut before its first stop string.

    `settings` are the other settings of the task's sampling by their names in transformers, such as top_p.
    """

    context: str
    max_new_tokens: int
    until: tuple[str, ...]
    do_sample: bool = False
    temperature: float = 0.0
    repeats: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)


Request = Continuation | Rolling | Generation
Answer = tuple[float, bool] | float | list[str]


@dataclass(frozen=True)
class Example:
    """One document of a split of a task.

    `id` is "task/split/index", the same in every run. `doc` holds the document for JSON. `requests` are what a model is
    asked. `choices` and `gold`: the texts to choose from and the right one (several: joined by " | "), where the task
    tells them. `source`: lm-eval's own instances, for `EvalTask.measure`.
    """

    id: str
    doc: Mapping[str, Any]
    requests: tuple[Request, ...]
    choices: tuple[str, ...] = ()
    gold: str | None = None
    source: tuple[Any, ...] = field(default=(), repr=False, compare=False)

    @property
    def index(self) -> int:
        """The document's place in its split."""
        return int(self.id.rpartition("/")[2])


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


@dataclass(frozen=True)
class Measurement:
    """What the answers to one example came to: JSON values by metric key, and what was answered, by filter.

    `predictions` hold the chosen choice or the filtered text, for people to read.
    """

    values: Mapping[str, Any]
    predictions: Mapping[str, str]
