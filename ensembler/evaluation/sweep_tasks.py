"""What a task of a sweep asks: examples by what they are for, and how their answers become values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from ensembler.errors import ConfigError
from ensembler.evaluation.examples import Answer, Example, Measurement, Metric, Rolling
from ensembler.evaluation.metric_values import to_json
from ensembler.evaluation.parts import Parts
from ensembler.evaluation.swept_task import SweptTask

VALIDATION, TEST, PROMPTS = "validation", "test", "prompts"
REPEATED = "repeated"  # examples that neither choose nor report
LOG_PROB = "log_prob"  # the value of the rows of prompts


@dataclass(frozen=True)
class SweepTask:
    """A task of a sweep, its metric, and its examples by what they are for."""

    task: SweptTask
    metric: Metric
    parts: Parts
    prompts: tuple[Example, ...] = ()


@dataclass(frozen=True)
class Asked:
    """An example, its part, and how its answers become values."""

    example: Example
    task: str
    part: str
    measure: Callable[[Sequence[Answer]], Measurement] = field(repr=False)


def prompts_of(example: Example) -> Example:
    """Return the example that asks how probable the prompts of `example` are, each different one once."""
    contexts = []
    for request in example.requests:
        if isinstance(request, Rolling):
            raise ConfigError(
                f"{example.id} is measured by the likelihood of its text, which so cannot choose alpha without it; "
                "give --validation in place of --select perplexity"
            )
        contexts.append(request.context)
    texts = tuple(Rolling(text) for text in dict.fromkeys(contexts) if text)
    if not texts:
        raise ConfigError(
            f"{example.id} has an empty prompt, whose likelihood is the same at every alpha; give --validation in "
            "place of --select perplexity"
        )
    return Example(f"{example.id}/{PROMPTS}", {}, texts)


def by_split(task: SweepTask) -> list[list[Example]]:
    """Return all examples of a task by their split, in its order: what of it is validation changes nothing."""
    splits: dict[str, list[Example]] = {}
    for example in sorted((*task.parts.validation, *task.parts.test, *task.parts.repeated), key=lambda one: one.index):
        splits.setdefault(example.id.split("/")[-2], []).append(example)
    return list(splits.values())


def ask(task: SweepTask) -> Iterator[Asked]:
    """Yield all examples of a task, in the order of the rows of a finished run."""
    for part, examples in (
        (VALIDATION, task.parts.validation),
        (TEST, task.parts.test),
        (REPEATED, task.parts.repeated),
    ):
        for example in examples:
            yield Asked(example, task.task.name, part, _measure_by(task.task, example))
    for example in task.prompts:
        yield Asked(example, task.task.name, PROMPTS, _measure_prompts)


def _measure_by(task: SweptTask, example: Example) -> Callable[[Sequence[Answer]], Measurement]:
    return lambda answers: task.measure(example, answers)


def _measure_prompts(answers: Sequence[Answer]) -> Measurement:
    return Measurement({LOG_PROB: to_json(sum(answers), LOG_PROB)}, {})
