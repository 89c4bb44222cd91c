"""Documents of lm-eval as what is asked, chosen and answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ensembler.errors import ConfigError
from ensembler.evaluation.examples import Answer, Continuation, Example, Generation, Request, Rolling
from ensembler.extras import require


@dataclass(frozen=True)
class OtherDocuments:
    """A sampler of few-shot examples, as lm-eval calls it, that never gives `doc`."""

    sampler: Any
    doc: Any

    def sample(self, n: int, eval_doc: Any = None) -> Any:
        """Return `n` other documents."""
        return self.sampler.sample(n=n, eval_doc=self.doc)


def request_of(instance: Any) -> Request:
    """Return what an instance of lm-eval's asks; the settings of a generation are read as HFLM reads them."""
    arguments = instance.args
    if instance.request_type == "loglikelihood":
        return Continuation(arguments[0], arguments[1])
    if instance.request_type == "loglikelihood_rolling":
        return Rolling(arguments[0])
    settings = require("lm_eval.models.utils", "eval").normalize_gen_kwargs(arguments[1])
    until = settings.pop("until", None) or []
    do_sample, temperature = settings.pop("do_sample"), settings.pop("temperature", 0.0)
    if do_sample and temperature <= 0:
        raise ConfigError(f"task {instance.task_name} samples at temperature {temperature:g}; set one above 0 in it")
    return Generation(
        arguments[0],
        settings.pop("max_gen_toks"),
        tuple([until] if isinstance(until, str) else until),
        do_sample,
        temperature,
        instance.repeats or 1,
        settings,
    )


def responses_of(instance: Any, answer: Answer) -> list[Any]:
    """Return an answer as the responses that lm-eval keeps: one for each repeat."""
    repeats = instance.repeats or 1
    if not isinstance(answer, list):
        return [answer] * repeats
    if len(answer) != repeats:
        raise ValueError(f"{len(answer)} texts for {repeats} repeats")
    return list(answer)


def choices_of(task: Any, doc: Any) -> tuple[str, ...]:
    """Return the texts to choose from, none where the task is no multiple choice."""
    if task.OUTPUT_TYPE != "multiple_choice" or task.config.doc_to_choice is None:
        return ()
    return tuple(map(str, task.doc_to_choice(doc)))


def gold_of(task: Any, doc: Any, choices: Sequence[str]) -> str | None:
    """Return the right answer as text, or None: some tasks have none, or one that is no text."""
    try:
        target = task.doc_to_text(doc) if getattr(task, "multiple_input", 0) else task.doc_to_target(doc)
        texts = [_text(one, choices) for one in (target if isinstance(target, list) else [target])]
    except Exception:  # any task may refuse; the text is for people to read
        return None
    return " | ".join(texts) or None


def _text(target: Any, choices: Sequence[str]) -> str:
    if not choices:
        return str(target)
    return choices[range(len(choices))[target] if isinstance(target, int) else list(choices).index(target)]


def prediction_of(example: Example, results: Sequence[Any]) -> str:
    """Return the choice of the highest log-prob (the first of equals, as in lm-eval), or the filtered text."""
    if not example.choices:
        return str(results[0])
    log_probs = [float(result[0]) for result in results[: len(example.choices)]]
    return example.choices[log_probs.index(max(log_probs))]
