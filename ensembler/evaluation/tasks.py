"""A task of lm-evaluation-harness: its documents, prompts, filters, metrics and standard errors are its own."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ensembler.decoding.prompts import check_template_kwargs
from ensembler.errors import ConfigError, RunError
from ensembler.evaluation.documents import Answer, Document, Metric, from_json, to_json
from ensembler.evaluation.fewshot_examples import Examples
from ensembler.evaluation.lm_eval_settings import PromptSettings, silence_lm_eval, silence_output
from ensembler.extras import require
from ensembler.files import digest

_logger = logging.getLogger(__name__)

_LOCAL = ("json", "csv", "parquet", "text", "arrow")
_TEMPLATES = ("doc_to_text", "doc_to_target", "doc_to_choice")
_FIELD = re.compile(r"\{\{\s*(\w+)\s*\}\}")


def _check_fields(task: Any, doc: Any, source: str) -> None:
    """Raise ConfigError where a row of a local file has nothing under a field that a template prints.

    A field missing from a row is null to `datasets`, and "None" in a template of lm-eval's.
    """
    if task.config.dataset_path not in _LOCAL or not isinstance(doc, Mapping):
        return
    templates = {name: text for name in _TEMPLATES if isinstance(text := getattr(task.config, name), str)}
    for name, template in templates.items():
        for field_name in [template] if template in doc else _FIELD.findall(template):
            if field_name in doc and doc[field_name] is None:
                raise ConfigError(f"{source} has no field {field_name!r}, which the task's {name} uses; mend the row")


def _check_gold(task: Any, documents: list[Document]) -> None:
    """Warn of documents whose right answer is none of their choices, since lm-eval counts them as wrong.

    Raises ConfigError where all are such.
    """
    without = [document for document in documents if document.choices and not document.gold]
    if not without:
        return
    first = without[0]
    fault = (
        f"{first.name}: the right answer {task.doc_to_target(first.requests[0].doc)!r} is neither one of the choices "
        f"{list(first.choices)} nor an index of them"
    )
    if len(without) == len(documents):
        raise ConfigError(f"{fault}; the same goes for all other documents")
    _logger.warning("%s; %d of %d documents are such, and count as wrong", fault, len(without), len(documents))


_SPLITS = {"test": "test_docs", "validation": "validation_docs", "train": "training_docs"}
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of functions, another in every process
_NUM_RESAMPLES = 100  # of a standard error by bootstrap, where an aggregation may take many milliseconds


@dataclass(frozen=True, eq=False)
class TextTask:
    """A task of lm-eval, as `load_tasks` or `make_task_from_file` return it.

    `task`: lm-eval's own, to which the `settings` are applied. `chat`: a function that writes a chat as one text,
    `apply_chat_template` of a model; see `for_model`.
    """

    task: Any
    settings: PromptSettings = field(default_factory=PromptSettings)
    chat: Callable[..., str] | None = None
    _known: dict[str, list[Document]] = field(default_factory=dict, repr=False)
    _leaked: dict[str, bool] = field(default_factory=dict, repr=False)  # documents drawn as their own examples: mended?
    _asked: dict[str, str] = field(default_factory=dict, repr=False)  # what `Examples` has read of documents

    def __post_init__(self) -> None:
        self.settings.apply(self.task)

    def for_model(self, model: Any) -> TextTask:
        """Return the task with prompts in the chat template of lm-eval's `model`, where the settings want one."""
        if not self.settings.apply_chat_template:
            return self
        with silence_lm_eval():
            try:
                template = model.chat_template(self.settings.apply_chat_template)
            except ValueError as error:  # none of this name
                raise ConfigError(f"{error} Give --apply-chat-template another name, or none") from error
        if template is None:
            raise ConfigError("the anchor's tokenizer has no chat template; leave --apply-chat-template out")
        model.tokenizer.chat_template = template  # lm-eval chooses by name, and then writes with the default one
        if self.settings.chat_template_kwargs:
            check_template_kwargs(template, self.settings.chat_template_kwargs)
            model.chat_template_args = {**model.chat_template_args, **self.settings.chat_template_kwargs}
        return replace(self, chat=model.apply_chat_template, _known={}, _leaked={}, _asked={})

    @property
    def name(self) -> str:
        """The task's name, as in lm-eval."""
        return str(self.task.task_name)

    @property
    def version(self) -> str:
        """The version of the task's prompts and metrics; figures of two versions are not to be compared."""
        return str(self.task.VERSION)

    @property
    def num_fewshot(self) -> int:
        """The number of solved examples before each question."""
        return int(self.task.config.num_fewshot or 0)

    @property
    def notes(self) -> tuple[str, ...]:
        """The number of few-shot examples, for readers of the figures, and where they are not those of lm-eval."""
        notes = [f"{self.num_fewshot} examples in each prompt"]
        for is_mended, such in (
            (True, "in lm-eval's prompts; here other examples take their place"),
            (False, "here as in lm-eval's prompts, since another split has them too"),
        ):
            if num := sum(one is is_mended for one in self._leaked.values()):
                notes.append(f"{num:,} questions stand among their own solved examples {such}")
        return tuple(notes)

    @cached_property
    def splits(self) -> dict[str, int]:
        """The number of documents (before `limit`) of each of the splits that the task has."""
        return {one: len(self._docs(one)) for one, docs in _SPLITS.items() if getattr(self.task, f"has_{docs}")()}

    @property
    def default_split(self) -> str:
        """The split that lm-eval evaluates: test, or validation where there is no test."""
        return "test" if self.task.has_test_docs() else "validation"

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics that the task declares, for each of its filters, in its order; pass@k by its k."""
        settings = getattr(self.task, "_metric_fn_kwargs", {})
        names: list[str] = []
        for name in self.task.aggregation():
            ks = (settings.get(name) or {}).get("k")
            names += [name] if ks is None else [f"pass@{k}" for k in ([ks] if isinstance(ks, int) else ks)]
        return tuple(self._metric(name, each.name) for each in self.task._filters for name in names)

    def describe(self) -> dict[str, Any]:
        """Return, as JSON, version, few-shot examples, limit, style of prompts, and a hash of lm-eval's settings."""
        config = json.loads(json.dumps(self.task.dump_config(), default=str))
        data = config.get("dataset_kwargs") or {}
        if "data_files" in data:  # where files lie is no part of a task
            data["data_files"] = _names(data["data_files"])
        content = _ADDRESS.sub("", json.dumps(config))
        found = {"version": self.version, "fewshot": self.num_fewshot, **self.settings.describe()}
        return {**found, "config": digest(content, 16)}

    def documents(self, split: str | None = None) -> list[Document]:
        """Return the documents of a split with their requests, prompts made by lm-eval.

        Two calls give the same prompts: few-shot examples are drawn anew with lm-eval's seed. They are those that
        lm-eval draws. An example that asks the document's own question is replaced by another, unless it is of another
        split than the one that lm-eval evaluates; there is a warning of either. Raises ConfigError.
        """
        split = split or self.default_split
        if split not in self.splits:
            raise ConfigError(f"task {self.name} has no split {split!r}; it has {', '.join(self.splits)}")
        if split not in self._known:
            with silence_lm_eval():
                documents = list(self._documents(split))
            if not documents:
                raise ConfigError(f"the {split} split of task {self.name} is empty; give another one")
            _check_gold(self.task, documents)
            self._check_metrics(documents[0])
            self._known[split] = documents
            for note in self.notes[1:]:
                _logger.warning("task %s: %s", self.name, note)
        return self._known[split]

    def identity(self, document: Document) -> str:
        """Return what a document asks without few-shot examples: equal ones are of equal documents."""
        if not self.num_fewshot:
            return repr([instance.args for instance in document.requests])
        with silence_lm_eval():
            bare = self._instances(document.requests[0].doc, document.split, document.index, num_fewshot=0)
        return repr([instance.args for instance in bare])

    def measure(self, document: Document, answers: Answer) -> tuple[dict[str, Any], dict[str, str]]:
        """Return what one document's answers come to by lm-eval's metrics, and what was answered, by its filters.

        Log-probs without choices answer nothing. Raises RunError where filters or metrics fail.
        """
        instances = [
            replace(instance, resps=_responses(instance, answer), filtered_resps={})
            for instance, answer in zip(document.requests, answers, strict=True)
        ]
        values: dict[str, Any] = {}
        predictions: dict[str, str] = {}
        try:
            with silence_output():
                for pipeline in self.task._filters:
                    pipeline.apply(instances)
                    results = [instance.filtered_resps[pipeline.name] for instance in instances]
                    for name, value in self.task.process_results(instances[0].doc, results).items():
                        values[self._key(name, pipeline.name)] = value
                    if document.choices or instances[0].request_type == "generate_until":
                        predictions[pipeline.name] = _prediction(document, results)
        except Exception as error:  # filters and metrics are programs of the task's authors
            raise RunError(f"{document.name} could not be measured: {type(error).__name__}: {error}") from error
        return {key: to_json(value, f"{key} of {document.name}") for key, value in values.items()}, predictions

    def aggregate(self, key: str, values: Sequence[Any]) -> float:
        """Return the figure of all documents from their `values` (as in rows), by lm-eval's own aggregation."""
        if not values:
            raise ValueError(f"{key} of no documents")
        with silence_output():
            try:
                return float(self._aggregation(key)(from_json(list(values))))
            except OverflowError:  # lm-eval's perplexities of what is all but impossible
                return math.inf

    def standard_error(self, key: str, values: Sequence[Any], *, num_resamples: int = _NUM_RESAMPLES) -> float | None:
        """Return lm-eval's standard error of `aggregate`, or None where it has none, or fewer than two values.

        A formula for means; for the others `num_resamples` draws of a bootstrap (lm-eval's default is 100,000).
        """
        estimate = require("lm_eval.api.metrics", "eval").stderr_for_metric(self._aggregation(key), num_resamples)
        if estimate is None or len(values) < 2:
            return None
        os.environ.setdefault("DISABLE_MULTIPROC", "1")  # to lm-eval: forking a process that runs models may hang
        with silence_output():
            return float(estimate(from_json(list(values))))

    def _documents(self, split: str) -> Iterator[Document]:
        self.task.set_fewshot_seed(seed=require("lm_eval.defaults", "eval").DEFAULT_OTHER_SEED)
        docs = self._docs(split)
        limit = len(docs) if self.settings.limit is None else self.settings.limit
        limit = math.ceil(len(docs) * limit) if limit < 1 else int(limit)
        for index in range(min(limit, len(docs))):
            doc = docs[index]
            _check_fields(self.task, doc, f"{self.name}/{split}/{index}")
            instances = self._instances(doc, split, index)
            has_choices = self.task.OUTPUT_TYPE == "multiple_choice" and self.task.config.doc_to_choice is not None
            choices = tuple(self.task.doc_to_choice(doc)) if has_choices else ()
            if None in choices:
                raise ConfigError(f"{self.name}/{split}/{index} has null among its choices; give it some text")
            choices = tuple(map(str, choices))
            content = json.loads(json.dumps(doc, default=require("lm_eval.utils", "eval").handle_non_serializable))
            prompt, gold = str(instances[0].args[0]), _gold(self.task, doc, choices)
            yield Document(self.name, split, index, content, prompt, tuple(instances), choices, gold)

    def _instances(self, doc: Any, split: str, index: int, num_fewshot: int | None = None) -> list[Any]:
        """The calls of `Task.build_all_requests`, which knows of one split only."""
        sampler = getattr(self.task, "sampler", None)
        if sampler is not None:
            is_evaluated = split == self.default_split
            evaluated = split if is_evaluated else None
            self.task.sampler = examples = Examples.of(self.task, doc, index, self._asked, evaluated=evaluated)
        chat = {"apply_chat_template": self.chat is not None, "chat_template": self.chat}
        try:
            context = self.task.fewshot_context(
                doc,
                num_fewshot=self.num_fewshot if num_fewshot is None else num_fewshot,
                system_instruction=self.settings.system_instruction,
                fewshot_as_multiturn=self.settings.fewshot_as_multiturn,
                gen_prefix=self.task.doc_to_prefix(doc),
                **chat,
            )
            metadata = (self.name, index, self.task.config.repeats)
            made = self.task.construct_requests(doc=doc, ctx=context, metadata=metadata, **chat)
        except Exception as error:  # templates and functions are programs of the task's authors
            known = f" (the document has {', '.join(doc)})" if isinstance(doc, dict) else ""
            raise ConfigError(
                f"{self.name}/{split}/{index}: no prompt could be made ({type(error).__name__}: {error}); "
                f"check the fields in the task's templates{known}, and that there are enough examples for few-shot"
            ) from error
        finally:
            if sampler is not None:
                self.task.sampler = sampler
        if sampler is not None and examples.num_found:
            self._leaked[f"{self.name}/{split}/{index}"] = examples.replaces
        return sorted(made, key=lambda instance: instance.idx) if isinstance(made, list) else [made]

    def _check_metrics(self, document: Document) -> None:
        """Raise ConfigError unless the metrics come of the task's output, as one document shows.

        Functions of the task's own, and code that a model wrote, are not run for it.
        """
        config, configurable = self.task.config, require("lm_eval.api.task", "eval").ConfigurableTask
        if not isinstance(self.task, configurable) or config.process_results is not None or config.unsafe_code:
            return
        examples = {"loglikelihood_rolling": -1.0, "loglikelihood": [-1.0, False]}
        answers = [examples.get(one.request_type, ["1"] * (one.repeats or 1)) for one in document.requests]
        try:
            values, _ = self.measure(document, answers)
        except RunError:
            return  # of an answer that no model gave; a true one is told when it is measured
        for metric in self.metrics:
            value = values.get(metric.key)
            if metric.key not in values or (metric.is_mean and not isinstance(value, int | float | dict)):
                raise ConfigError(
                    f"metric {metric.name} of task {document.task} does not fit its output; lm-eval makes "
                    f"{value!r} of it for one document: choose another metric or output_type"
                )

    def _docs(self, split: str) -> Any:
        with silence_lm_eval():
            docs = getattr(self.task, _SPLITS[split])()
        return docs if hasattr(docs, "__getitem__") else list(docs)

    def _key(self, name: str, filter_name: str) -> str:
        return f"{name},{filter_name}" if len(self.task._filters) > 1 else name

    def _metric(self, name: str, filter_name: str) -> Metric:
        higher = self.task.higher_is_better().get(name) is not False  # None where a task does not say
        is_mean = self._aggregation(name) is require("lm_eval.api.metrics", "eval").mean
        return Metric(self._key(name, filter_name), name, filter_name, higher, is_mean)

    def _aggregation(self, key: str) -> Any:
        """lm-eval's own of a metric, with its filter or without; the mean where it has none, as in its evaluator."""
        name = key.rpartition(",")[0] if len(self.task._filters) > 1 and "," in key else key
        return self.task.aggregation().get(name, require("lm_eval.api.metrics", "eval").mean)


def _responses(instance: Any, answer: Any) -> list[Any]:
    """An answer as the responses that lm-eval keeps: one for each repeat."""
    repeats = instance.repeats or 1
    if instance.request_type == "generate_until":
        if len(answer) != repeats:
            raise ValueError(f"{len(answer)} texts for {repeats} repeats")
        return list(answer)
    return [tuple(answer) if isinstance(answer, list | tuple) else answer] * repeats


def _gold(task: Any, doc: Any, choices: Sequence[str]) -> str | None:
    """The right answer as text (several joined by " | "), or None: some tasks have none, or one that is no text."""
    try:
        target = task.doc_to_text(doc) if getattr(task, "multiple_input", 0) else task.doc_to_target(doc)
        targets = target if isinstance(target, list) else [target]
        if choices:
            indices = [one if isinstance(one, int) else choices.index(one) for one in targets]
            if min(indices) < 0:  # as hidden labels are written
                return None
            targets = [choices[one] for one in indices]
        return " | ".join(map(str, targets)) or None
    except Exception:  # any task may refuse; the text is for people to read
        return None


def _prediction(document: Document, results: Sequence[Any]) -> str:
    """The choice of the highest log-prob (the first of equals, as in lm-eval), or the filtered text."""
    if not document.choices:
        return str(results[0])
    log_probs = [float(result[0]) for result in results[: len(document.choices)]]
    return document.choices[log_probs.index(max(log_probs))]


def _names(files: Any) -> Any:
    """Paths of data files without their folders, in the structure that they have."""
    if isinstance(files, dict):
        return {split: _names(each) for split, each in files.items()}
    return [_names(each) for each in files] if isinstance(files, list) else Path(str(files)).name
