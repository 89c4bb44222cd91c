"""The work of one ensemble: its grid, and documents in batches. All is checked and read; nothing is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ensembler.engine.grid import Grid, GridPoint, make_grid
from ensembler.errors import ConfigError
from ensembler.evaluation.documents import (
    PROMPTS,
    TEST,
    Answer,
    Answerer,
    Document,
    EncodedDocument,
    PlannedTask,
    Task,
    choose_metric,
    split_documents,
    to_json,
)
from ensembler.evaluation.methods import Run, levels
from ensembler.evaluation.results_file import Results
from ensembler.extras import require
from ensembler.files import digest
from ensembler.preflight import CheckedEnsemble
from ensembler.rules import RULES

LOG_PROB = "log_prob"  # the value of a prompt
AUTO = "auto"  # the batch size that fits into memory
_PERPLEXITIES = frozenset({"perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"})


@dataclass(frozen=True)
class PlanOptions:
    """Settings of a run besides its grid and its tasks.

    `validation`: a number of documents or a split (`split_documents`). By `select`
    "metric", α is chosen by the metric of the validation documents, with `one_standard_error` by that rule; by
    "perplexity", by the likelihood of the reported documents' prompts, without labels. `metric`: a key of the tasks'
    metrics instead of their first. `cluster`: a field of the documents; those with one value are counted together.
    `margin`: the largest difference, in the unit of the table, within which methods count as alike. `seed`: of the draw
    of validation documents and of the bootstrap. `verify_weights`: see `describe_ensemble`. Raises ConfigError.
    """

    validation: str | None = None
    select: str = "metric"
    one_standard_error: bool = False
    metric: str | None = None
    cluster: str | None = None
    margin: float | None = None
    batch_size: int | str = 8
    seed: int = 0
    verify_weights: bool = False

    def __post_init__(self) -> None:
        if self.select not in ("metric", "perplexity"):
            raise ConfigError(f"alpha cannot be selected by {self.select!r}; give metric or perplexity")
        if self.select == "perplexity" and self.validation is not None:
            raise ConfigError("the choice by the prompts' perplexity takes no validation examples; give one of the two")
        if self.one_standard_error and self.validation is None:
            raise ConfigError("the one-standard-error rule needs validation examples; give --validation")
        if self.validation == "1" and self.one_standard_error:
            raise ConfigError("one validation example has no standard error; give --validation two or more")
        if self.margin is not None and not self.margin > 0:
            raise ConfigError(f"a margin of {self.margin:g} leaves no room; give a number above 0")

    @property
    def chooses(self) -> bool:
        """Return whether α is chosen at all."""
        return self.validation is not None or self.by_perplexity

    @property
    def by_perplexity(self) -> bool:
        """Return whether α is chosen by the likelihood of the prompts."""
        return self.select == "perplexity"


class Plan:
    """The documents, points and settings of one run.

    Raises ConfigError or PromptError for what cannot be asked of this ensemble.
    """

    def __init__(
        self, run: Run, checked: CheckedEnsemble, answerer: Answerer, tasks: Sequence[Task], options: PlanOptions
    ) -> None:
        self.rule = checked.config.get_rule()
        if checked.contract.is_text:  # a grid has one anchor then, and no other member is a point of it
            run = run.by_rule(self.rule.name)
        self.run, self.checked, self.answerer, self.options = run, checked, answerer, options
        self.points = make_grid(run.rules, run.alphas)
        ones = make_grid(run.rules, [1.0])
        # Member logits depend on no point: those that are compared cost nothing beside those that were asked for.
        alone = [
            point
            for point in levels(self.rule).values()
            if not checked.contract.is_text or point.rule == self.rule.name
        ]
        self.grid = list(dict.fromkeys([*self.points, *ones, *alone]))
        for points in (self.points, self.grid):  # raises for duplicates
            Grid.of(points, self.rule, checked.contract, checked.config.outside)
        self._encoded: dict[str, EncodedDocument] = {}
        self.tasks = [self._plan(task) for task in tasks]
        of_perplexity = options.by_perplexity or any(one.metric.key in _PERPLEXITIES for one in self.tasks)
        if checked.contract.is_text and of_perplexity:
            raise ConfigError(
                "perplexity was asked for, and scores of members with different tokenizers are not normalised; choose "
                "a task and a metric that compare answers"
            )

    @property
    def name(self) -> str:
        """The name of the run."""
        return self.run.name

    def _plan(self, task: Task) -> PlannedTask:
        options = self.options
        subsets = split_documents(task, options.validation, seed=options.seed)
        if options.by_perplexity:
            subsets[PROMPTS] = tuple(map(prompts_of, subsets[TEST]))
        planned = PlannedTask(task, choose_metric(task, options.metric), subsets)
        if options.cluster is not None:
            planned.clusters(options.cluster)
        documents = [document for of_split in planned.by_split() for document in of_split]
        found = {document.name: self.answerer.encode(document) for document in documents}
        self._encoded |= found
        return replace(
            planned,
            num_cut=sum(found[one.name].num_cut for one in documents if one.split != PROMPTS),
            num_prompt_tokens=sum(found[one.name].num_scored for one in subsets[PROMPTS]),
        )

    def documents(self) -> Iterator[tuple[Document, str]]:
        """Yield all documents with their subset, in the order of the results."""
        for task in self.tasks:
            for subset, documents in task.subsets.items():
                for document in documents:
                    yield document, subset

    @cached_property
    def names(self) -> frozenset[str]:
        """The names of all documents."""
        return frozenset(document.name for document, _ in self.documents())

    def is_finished(self, results: Results) -> bool:
        """Return whether all documents are measured."""
        return self.names <= results.done(self.name)

    def formula(self, point: GridPoint) -> tuple[object, ...]:
        """Return what a point computes: two points with the same are one method."""
        rule = self.rule if point.rule == self.rule.name else RULES[point.rule]
        weights = {role: round(weight, 9) for role, weight in rule.weights(point.alpha).items() if weight}
        return (rule.cutoff, *sorted(weights.items()))

    def batches(self, size: int) -> list[list[Document]]:
        """Return the documents in batches of `size`, of one split and similar length, the longest first.

        Too little memory shows at once. A batch, and so the rounding of its answers, depends on no earlier run.
        """
        found = []
        for task in self.tasks:
            for documents in task.by_split():
                ordered = sorted(documents, key=lambda one: -self._encoded[one.name].length)
                found += [ordered[start : start + size] for start in range(0, len(ordered), size)]
        return found

    @property
    def longest(self) -> list[Document]:
        """The longest document of each task."""
        found = [[one for documents in task.subsets.values() for one in documents] for task in self.tasks]
        return [max(documents, key=lambda one: self._encoded[one.name].length) for documents in found]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All that answers depend on, as JSON: a store is gone on with only where they are the same."""
        options = self.options
        return {
            **self.answerer.describe(verify_weights=options.verify_weights),
            "rules": list(self.run.rules),
            "alphas": list(self.run.alphas),
            "tasks": {task.task.name: self._task_settings(task) for task in self.tasks},
            "batch size": options.batch_size,
            "seed": options.seed,
        }

    def _task_settings(self, task: PlannedTask) -> dict[str, Any]:
        """Of the documents those that are reported: others may choose α otherwise, see `Store.begin_run`."""
        documents = [document for of_split in task.by_split() for document in of_split]
        documents = [document for document in documents if document.split == task.task.default_split]
        described = [
            [one.name, one.content, repr([getattr(each, "args", "") for each in one.requests])] for one in documents
        ]
        return {
            **task.task.describe(),
            "documents": digest(json.dumps(described), 16),
            "tokens": digest(repr([self._encoded[one.name].digest for one in documents]), 16),
        }

    def measure(self, document: Document, answers: Answer) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the values and predictions of a document's answers. Raises RunError."""
        if document.split == PROMPTS:
            return {LOG_PROB: to_json(sum(answers), document.name)}, {}
        task = next(one.task for one in self.tasks if one.task.name == document.task)
        return task.measure(document, answers)


def prompts_of(document: Document) -> Document:
    """Return a document that asks how probable the prompts of another are, each different one once.

    Raises ConfigError where their likelihood cannot choose α.
    """
    remedy = "give --validation in place of --select perplexity"
    if document.requests[0].request_type == "loglikelihood_rolling":
        raise ConfigError(f"{document.name} is scored by its text's likelihood, which cannot choose alpha; {remedy}")
    texts = [text for text in dict.fromkeys(request.args[0] for request in document.requests) if text]
    if not texts:
        raise ConfigError(f"{document.name} has an empty prompt, whose likelihood is the same at every alpha; {remedy}")
    instance = require("lm_eval.api.instance", "eval").Instance
    metadata = (document.task, document.index, 1)
    requests = tuple(
        instance("loglikelihood_rolling", {}, (text,), number, metadata=metadata) for number, text in enumerate(texts)
    )
    return Document(document.task, PROMPTS, document.index, {}, texts[0], requests)
