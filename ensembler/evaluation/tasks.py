"""A task of lm-evaluation-harness: its documents, prompts, filters, metrics and standard errors are its own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ensembler.errors import ConfigError, RunError
from ensembler.evaluation.examples import Answer, Example, Measurement, Metric, Request
from ensembler.evaluation.metric_values import from_json, to_json
from ensembler.evaluation.quiet import quiet, unprinted
from ensembler.evaluation.standard_errors import NUM_RESAMPLES, standard_error
from ensembler.evaluation.task_checks import check_fields, check_gold, check_metrics
from ensembler.evaluation.task_documents import (
    OtherDocuments,
    choices_of,
    gold_of,
    prediction_of,
    request_of,
    responses_of,
)
from ensembler.extras import require

_SPLITS = {"test": "test_docs", "validation": "validation_docs", "train": "training_docs"}


@dataclass(frozen=True, eq=False)
class EvalTask:
    """A task of lm-eval, as `load_tasks` or `make_task_from_file` return it.

    `task`: lm-eval's own. `limit`: only so many documents of a split, from its start.
    """

    task: Any
    limit: int | None = None

    @property
    def name(self) -> str:
        """The task's name, as in lm-eval."""
        return str(self.task.task_name)

    @property
    def version(self) -> str:
        """The version of the task's prompts and metrics; figures of two versions are not to be compared."""
        return str(self.task.VERSION)

    @property
    def output_type(self) -> str:
        """multiple_choice, loglikelihood, loglikelihood_rolling or generate_until."""
        return str(self.task.OUTPUT_TYPE)

    @property
    def num_fewshot(self) -> int:
        """How many solved examples stand before each question."""
        return int(self.task.config.num_fewshot or 0)

    @cached_property
    def splits(self) -> dict[str, int]:
        """The number of documents (before `limit`) of each of the splits that the task has."""
        has = {
            "test": self.task.has_test_docs,
            "validation": self.task.has_validation_docs,
            "train": self.task.has_training_docs,
        }
        return {split: len(self._docs(split)) for split in _SPLITS if has[split]()}

    @property
    def default_split(self) -> str:
        """The split that lm-eval evaluates: test, or validation where there is no test."""
        return "test" if self.task.has_test_docs() else "validation"

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics that the task declares, for each of its filters, in its order."""
        declared = list(self.task.aggregation())
        return tuple(self._metric(name, each.name) for each in self.task._filters for name in declared)

    def choose_metric(self, key: str | None = None) -> Metric:
        """Return the metric that a user asked for by its key, or the task's first; raise ConfigError if unknown."""
        known = {metric.key: metric for metric in self.metrics}
        if key is not None and key not in known:
            raise ConfigError(f"task {self.name} has no metric {key!r}; it has {', '.join(known)}")
        return known[key] if key is not None else self.metrics[0]

    def metric(self, key: str) -> Metric:
        """Return the metric of a key of `Measurement.values`; one that the task does not declare is a mean."""
        if self._has_filters:
            name, _, filter_name = key.rpartition(",")
        else:
            name, filter_name = key, self.task._filters[0].name
        return self._metric(name, filter_name)

    def describe(self) -> dict[str, Any]:
        """Return what was evaluated, for a summary: name, version, few-shot examples, splits and lm-eval's settings."""
        config = json.loads(json.dumps(self.task.dump_config(), default=str))
        data = config.get("dataset_kwargs") or {}
        if "data_files" in data:  # where files lie is no part of a task
            data["data_files"] = _names(data["data_files"])
        return {
            "name": self.name,
            "version": self.version,
            "output_type": self.output_type,
            "num_fewshot": self.num_fewshot,
            "limit": self.limit,
            "splits": self.splits,
            "config": config,
        }

    def examples(self, split: str | None = None) -> list[Example]:
        """Return the documents of a split with their requests, prompts made by lm-eval.

        Two calls give the same prompts: few-shot examples are drawn anew with lm-eval's seed. In the split that lm-eval
        evaluates they are those that it draws; in another one, an example is never shown to itself. Raises ConfigError.
        """
        split = split or self.default_split
        if split not in self.splits:
            raise ConfigError(f"task {self.name} has no split {split!r}; it has {', '.join(self.splits)}")
        with quiet():
            examples = list(self._examples(split))
        if not examples:
            raise ConfigError(f"the {split} split of task {self.name} is empty; give another one")
        check_gold(self.task, examples)
        if self._metrics_can_be_tried:
            check_metrics(self.metrics, examples[0], self.measure)
        return examples

    def bare_requests(self, example: Example) -> tuple[Request, ...]:
        """Return what an example asks without few-shot examples: equal ones are of equal documents."""
        if not self.num_fewshot:
            return example.requests
        split = example.id.split("/")[-2]
        with quiet():
            instances = self._instances(example.source[0].doc, split, example.index, num_fewshot=0)
        return tuple(request_of(instance) for instance in instances)

    def measure(self, example: Example, answers: Sequence[Answer]) -> Measurement:
        """Return what one document's answers, one per request, come to by lm-eval's filters and metrics.

        Raises RunError where these fail.
        """
        instances = [
            replace(instance, resps=responses_of(instance, answer), filtered_resps={})
            for instance, answer in zip(example.source, answers, strict=True)
        ]
        values: dict[str, Any] = {}
        predictions: dict[str, str] = {}
        try:
            with unprinted():
                for pipeline in self.task._filters:
                    pipeline.apply(instances)
                    results = [instance.filtered_resps[pipeline.name] for instance in instances]
                    for name, value in self.task.process_results(instances[0].doc, results).items():
                        values[self._key(name, pipeline.name)] = value
                    predictions[pipeline.name] = prediction_of(example, results)
        except RunError:
            raise
        except Exception as error:  # filters and metrics are programs of the task's authors
            raise RunError(f"{example.id} could not be measured: {type(error).__name__}: {error}") from error
        return Measurement(
            {key: to_json(value, f"{key} of {example.id}") for key, value in values.items()}, predictions
        )

    def aggregate(self, key: str, values: Sequence[Any]) -> float:
        """Return the figure of all documents from their `values` (as in rows), by lm-eval's own aggregation."""
        if not values:
            raise ValueError(f"{key} of no documents")
        with unprinted():
            try:
                return float(self._aggregation(self.metric(key).name)(from_json(list(values))))
            except OverflowError:  # lm-eval's perplexities of what is all but impossible
                return math.inf

    def standard_error(self, key: str, values: Sequence[Any], *, num_resamples: int = NUM_RESAMPLES) -> float | None:
        """Return lm-eval's standard error of `aggregate`, or None where it has none for this metric.

        A formula for means; for the others `num_resamples` draws of a bootstrap (lm-eval's default is 100,000).
        """
        return standard_error(self._aggregation(self.metric(key).name), from_json(list(values)), num_resamples)

    def _examples(self, split: str) -> Iterator[Example]:
        self.task.set_fewshot_seed(seed=require("lm_eval.defaults", "eval").DEFAULT_OTHER_SEED)
        docs = self._docs(split)
        for index in range(len(docs) if self.limit is None else min(self.limit, len(docs))):
            yield self._example(docs[index], split, index)

    def _example(self, doc: Any, split: str, index: int) -> Example:
        check_fields(self.task, doc, f"{self.name}/{split}/{index}")
        instances = self._instances(doc, split, index)
        choices = choices_of(self.task, doc)
        return Example(
            f"{self.name}/{split}/{index}",
            json.loads(json.dumps(doc, default=require("lm_eval.utils", "eval").handle_non_serializable)),
            tuple(request_of(instance) for instance in instances),
            choices,
            gold_of(self.task, doc, choices),
            tuple(instances),
        )

    def _instances(self, doc: Any, split: str, index: int, num_fewshot: int | None = None) -> list[Any]:
        """The calls of `Task.build_all_requests`, which knows of one split only."""
        sampler = getattr(self.task, "sampler", None)
        if sampler is not None and split != self.default_split:
            self.task.sampler = OtherDocuments(sampler, doc)
        try:
            context = self.task.fewshot_context(
                doc,
                num_fewshot=self.num_fewshot if num_fewshot is None else num_fewshot,
                system_instruction=None,
                apply_chat_template=False,
                fewshot_as_multiturn=False,
                chat_template=None,
                gen_prefix=self.task.doc_to_prefix(doc),
            )
            made = self.task.construct_requests(
                doc=doc,
                ctx=context,
                metadata=(self.name, index, self.task.config.repeats),
                apply_chat_template=False,
                chat_template=None,
            )
        except Exception as error:  # templates and functions are programs of the task's authors
            raise ConfigError(
                f"{self.name}/{split}/{index}: no prompt could be made ({type(error).__name__}: {error}); "
                "check the task's fields, and that there are enough examples for few-shot"
            ) from error
        finally:
            if sampler is not None:
                self.task.sampler = sampler
        return sorted(made, key=lambda instance: instance.idx) if isinstance(made, list) else [made]

    @property
    def _metrics_can_be_tried(self) -> bool:
        """Whether nothing but lm-eval's own metrics is run by it: no function of the task's, no model's code."""
        ours = isinstance(self.task, require("lm_eval.api.task", "eval").ConfigurableTask)
        return ours and self.task.config.process_results is None and not self.task.config.unsafe_code

    def _docs(self, split: str) -> Any:
        with quiet():
            docs = getattr(self.task, _SPLITS[split])()
        return docs if hasattr(docs, "__getitem__") else list(docs)

    @property
    def _has_filters(self) -> bool:
        return len(self.task._filters) > 1

    def _key(self, name: str, filter_name: str) -> str:
        return f"{name},{filter_name}" if self._has_filters else name

    def _metric(self, name: str, filter_name: str) -> Metric:
        return Metric(
            self._key(name, filter_name),
            name,
            filter_name,
            self.task.higher_is_better().get(name) is not False,  # None where a task does not say
            self._aggregation(name) is require("lm_eval.api.metrics", "eval").mean,
        )

    def _aggregation(self, name: str) -> Any:
        """lm-eval's own, the mean where it has none, as its evaluator does."""
        return self.task.aggregation().get(name, require("lm_eval.api.metrics", "eval").mean)


def _names(files: Any) -> Any:
    """Paths of data files without their folders, in the structure that they have."""
    if isinstance(files, dict):
        return {split: _names(each) for split, each in files.items()}
    return [_names(each) for each in files] if isinstance(files, list) else Path(str(files)).name
