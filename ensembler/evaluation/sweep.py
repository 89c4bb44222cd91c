"""The α sweep: tasks, their parts and a grid become chunks of work, and chunks become rows."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from ensembler.engine.grid import Grid, GridPoint, make_grid
from ensembler.errors import ConfigError
from ensembler.evaluation.answering import Answered, Chunk, ScoringChunk, make_chunks
from ensembler.evaluation.backends import Backend, open_backend
from ensembler.evaluation.batches import can_share_contexts
from ensembler.evaluation.examples import Measurement, Rolling
from ensembler.evaluation.metric_values import to_json
from ensembler.evaluation.parts import split_examples
from ensembler.evaluation.provenance import describe_ensemble, versions
from ensembler.evaluation.rows_folder import Row, RowsFolder
from ensembler.evaluation.sweep_tasks import SweepTask, ask, by_split, prompts_of
from ensembler.evaluation.swept_task import SweptTask
from ensembler.preflight import CheckedEnsemble
from ensembler.rules import RULES, Rule
from ensembler.serving.choice import BackendChoice

_MAX_LENGTH = 2048  # where no member sets a limit: HFLM's default
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of functions, another in every process
_FORMAT = 1  # of rows and summary; another number is another version's folder


@dataclass(frozen=True)
class SweepOptions:
    """What a sweep does besides its tasks.

    `rules` and `alphas` make the grid. `validation`: a number of examples or a split (`split_examples`). By
    `select` "metric", α is chosen by the metric of the validation examples, with `one_standard_error` by that rule; by
    "perplexity", by the likelihood of the reported examples' prompts, without labels. `metric`: a key of the tasks'
    metrics instead of their first. `seed`: of sampled texts, of the draw of validation examples and of the bootstrap.
    `backend`: what runs the members. Raises ConfigError.
    """

    rules: tuple[str, ...]
    alphas: tuple[float, ...]
    validation: str | None = None
    select: str = "metric"
    one_standard_error: bool = False
    metric: str | None = None
    batch_size: int = 8
    seed: int = 0
    backend: BackendChoice = field(default_factory=BackendChoice)

    def __post_init__(self) -> None:
        if self.select not in ("metric", "perplexity"):
            raise ConfigError(f"alpha cannot be selected by {self.select!r}; give metric or perplexity")
        if self.select == "perplexity" and self.validation is not None:
            raise ConfigError("the choice by the prompts' perplexity takes no validation examples; give one of the two")
        if self.one_standard_error and self.validation is None:
            raise ConfigError("the one-standard-error rule needs validation examples; give --validation")
        if self.validation == "1" and self.one_standard_error:
            raise ConfigError("one validation example has no standard error; give --validation two or more")

    @property
    def by_perplexity(self) -> bool:
        """Whether α is chosen by the likelihood of the prompts."""
        return self.select == "perplexity"


class Sweep:
    """All work of a sweep, planned: every example encoded, nothing loaded.

    Raises ConfigError or PromptError for what cannot be asked of this ensemble.
    """

    has_pictures: ClassVar[bool] = False  # whether `thumbnail` has any

    def __init__(self, checked: CheckedEnsemble, tasks: Sequence[SweptTask], options: SweepOptions) -> None:
        self.options = options
        self.rule = checked.config.get_rule()
        self.points = make_grid(options.rules, options.alphas)
        self.levels = levels(self.rule)
        ones = make_grid(options.rules, [1.0])
        # Member logits depend on no point: those that are compared cost nothing beside those that were asked for.
        self.grid = list(dict.fromkeys([*self.points, *ones, *self.levels.values()]))
        Grid.of(self.points, self.rule, checked.contract, checked.config.outside)  # raises for duplicates
        Grid.of(self.grid, self.rule, checked.contract, checked.config.outside)
        self.tasks = [self._plan(task) for task in tasks]
        self._asked = {asked.example.id: asked for task in self.tasks for asked in ask(task)}
        options.backend.check(checked)
        self.checked = checked
        self.tokenizer = checked.tokenizer
        self.chunks = [chunk for task in self.tasks for chunk in self._chunks(task)]
        self._ids = {name: ids for chunk in self.chunks for name, ids in chunk.ids().items()}

    def _plan(self, task: SweptTask) -> SweepTask:
        metric = task.choose_metric(self.options.metric)
        parts = split_examples(task, self.options.validation, seed=self.options.seed)
        prompts = tuple(map(prompts_of, parts.test)) if self.options.by_perplexity else ()
        return SweepTask(task, metric, parts, prompts)

    def _chunks(self, task: SweepTask) -> Iterator[Chunk]:
        tokenizer = self.checked.require_tokenizer()
        max_length = self.options.backend.max_length(self.checked)
        for examples in (*by_split(task), task.prompts):
            yield from make_chunks(
                examples,
                tokenizer,
                max_length=_MAX_LENGTH if max_length is None else max_length,
                batch_size=self.options.batch_size,
                share_contexts=can_share_contexts(self.checked.model_configs.values()),
            )

    @property
    def ids(self) -> list[str]:
        """The ids of all examples, in the order of the rows of a finished run."""
        return list(self._asked)

    def formula(self, point: GridPoint) -> tuple[object, ...]:
        """Return what a point computes: two points with the same are one method."""
        rule = self.rule if point.rule == self.rule.name else RULES[point.rule]
        weights = {role: round(weight, 9) for role, weight in rule.weights(point.alpha).items() if weight}
        return (rule.cutoff, *sorted(weights.items()))

    def num_truncated(self, task: SweepTask) -> int:
        """How many requests of a task lost tokens on the left to fit into the members' shortest context."""
        own = {example.id for examples in by_split(task) for example in examples}
        return sum(chunk.num_truncated for chunk in self.chunks if chunk.examples[0].id in own)

    def num_skipped(self, task: SweepTask) -> int:
        """How many examples of a task were left out because they cannot be read."""
        return 0

    def thumbnail(self, name: str) -> str | None:
        """Return a small picture of the example with this id as a data URI, where it is an image."""
        return None

    def open(self) -> AbstractContextManager[Any]:
        """Load the members; a `with` block gets what `run` takes and ends it."""
        return open_backend(self.options.backend, self.checked)

    def num_prompt_tokens(self, task: SweepTask) -> int:
        """How many tokens the prompts of a task have, whose likelihood chooses α."""
        own = {example.id for example in task.prompts}
        encoded = [one for chunk in self.chunks if isinstance(chunk, ScoringChunk) for one in chunk.encoded]
        requests = [request for one in encoded if one.example.id in own for request in one.requests]
        return sum(len(ids) for request in requests for ids in request.continuations)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All that rows depend on, as JSON: a folder of rows is gone on with only where they are the same."""
        options = self.options
        return {
            "format": _FORMAT,
            "versions": versions(),
            "ensemble": describe_ensemble(self.checked),
            "rules": list(options.rules),
            "alphas": list(options.alphas),
            "tasks": {task.task.name: self._task_settings(task) for task in self.tasks},
            "batch size": options.batch_size,
            "backend": options.backend.describe(self.checked),
            "seed": options.seed,
        }

    def _task_settings(self, task: SweepTask) -> dict[str, Any]:
        examples = [example for examples in by_split(task) for example in examples]
        documents = [[example.id, example.doc, repr(example.requests)] for example in examples]
        return {
            "version": task.task.version,
            "fewshot": task.task.num_fewshot,
            "limit": task.task.limit,
            "config": _hash(_ADDRESS.sub("", json.dumps(task.task.describe()["config"]))),
            "documents": _hash(json.dumps(documents)),
            "tokens": _hash(repr([self._ids[example.id] for example in examples])),
        }

    def example_rows(self) -> Iterator[Row]:
        """What is asked, for people to read beside the rows."""
        for asked in self._asked.values():
            example = asked.example
            request = example.requests[0]
            yield {
                "id": example.id,
                "task": asked.task,
                "part": asked.part,
                "prompt": request.text if isinstance(request, Rolling) else request.context,
                "choices": list(example.choices),
                "gold": example.gold,
            }

    def unfinished(self, done: frozenset[str], *, rank: int = 0, num_ranks: int = 1) -> list[Chunk]:
        """Return this process's chunks with examples that are not in `done`: every `num_ranks`-th of all is its own."""
        own = self.chunks[rank::num_ranks]
        return [chunk for chunk in own if any(example.id not in done for example in chunk.examples)]

    def run(self, backend: Any, folder: RowsFolder, chunks: Sequence[Chunk], done: frozenset[str]) -> Iterator[int]:
        """Answer chunk after chunk and append the rows; yield how many examples each had. Raises RunError."""
        for chunk, answered in zip(chunks, self._answer(backend, chunks), strict=True):
            folder.append([row for one in answered if one.example.id not in done for row in self._rows(one)])
            yield len(chunk.examples)

    def _answer(self, backend: Backend, chunks: Sequence[Any]) -> Iterator[list[Answered]]:
        """Answer the chunks that `_chunks` made, one after another."""
        for chunk in chunks:
            yield chunk.answer(backend, self.tokenizer, self.grid, seed=self.options.seed)

    def _rows(self, answered: Answered) -> Iterator[Row]:
        asked = self._asked[answered.example.id]
        measured: dict[str, Measurement] = {}  # many points answer alike
        for point, answers in zip(self.grid, answered.answers, strict=True):
            key = repr(answers)
            if key not in measured:
                measured[key] = asked.measure(answers)
            yield {
                "id": asked.example.id,
                "rule": point.rule,
                "alpha": point.alpha,
                "values": dict(measured[key].values),
                "predictions": dict(measured[key].predictions),
                "answers": to_json(answers, asked.example.id),
            }


def levels(rule: Rule) -> dict[str, GridPoint]:
    """Return the members that are points of a grid too, by role: the anchors, at α = 0, of all rules for such members.

    Of source FT, source PT and target PT these are the first (base-change) and the last (EFT).
    """
    alike = {name: each for name, each in RULES.items() if set(each.roles) == set(rule.roles)}
    found: dict[str, GridPoint] = {}
    for name, each in {**alike, rule.name: rule}.items():
        if each.cutoff is None and dict(each.constant) == {each.anchor: 1.0}:
            found.setdefault(each.anchor, GridPoint(name, 0.0))
    return found


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
