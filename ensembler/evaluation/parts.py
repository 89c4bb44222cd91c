"""Which examples choose α and which ones report it: never the same."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ensembler.errors import ConfigError
from ensembler.evaluation.examples import Example
from ensembler.evaluation.swept_task import SweptTask


@dataclass(frozen=True)
class Parts:
    """The examples of a task. `repeated` would be validation, but test has their documents too."""

    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    repeated: tuple[Example, ...] = ()


def split_examples(task: SweptTask, validation: str | None, *, seed: int = 0) -> Parts:
    """Return the parts of a task's examples.

    `validation` is a number of examples, drawn from the split that lm-eval evaluates, of which the rest is test; or
    another split of the task; or None. Raises ConfigError where nothing would be left, or the two are one split.
    """
    test = task.examples()
    if validation is None:
        return Parts((), tuple(test))
    if validation.isdecimal():
        return _draw(task, test, int(validation), seed)
    if validation == task.default_split:
        others = ", ".join(name for name in task.splits if name != validation)
        raise ConfigError(
            f"the {validation} split of task {task.name} is the one that is reported, so it cannot choose alpha too; "
            f"give as validation a number of its rows, or another split{f' of {others}' if others else ''}"
        )
    return _without_repeats(task, task.examples(validation), test)


def _draw(task: SweptTask, examples: Sequence[Example], num: int, seed: int) -> Parts:
    if not 0 < num < len(examples):
        raise ConfigError(
            f"validation on {num} of the {len(examples)} examples of task {task.name} leaves none to choose from or to "
            f"report; give a number from 1 to {len(examples) - 1}"
        )
    drawn = set(random.Random(seed).sample(range(len(examples)), num))
    return _without_repeats(
        task,
        [example for index, example in enumerate(examples) if index in drawn],
        [example for index, example in enumerate(examples) if index not in drawn],
    )


def _without_repeats(task: SweptTask, validation: Sequence[Example], test: Sequence[Example]) -> Parts:
    """Data sets hold some documents twice; test keeps all of its own. Whatever else a prompt shows does not count."""
    reported = {repr(task.bare_requests(example)) for example in test}
    is_repeated = [repr(task.bare_requests(example)) in reported for example in validation]
    kept = tuple(example for example, repeated in zip(validation, is_repeated, strict=True) if not repeated)
    if not kept:
        raise ConfigError(
            f"all {len(validation)} validation examples of task {task.name} are among those that are reported; give as "
            "validation another split, or more examples"
        )
    left_out = tuple(example for example, repeated in zip(validation, is_repeated, strict=True) if repeated)
    return Parts(kept, tuple(test), left_out)
