"""Settings of lm-eval: prompts and generation of its tasks; no chatter and no processes of its own."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, fields
from typing import Any

from ensembler.errors import ConfigError
from ensembler.extras import require


@dataclass(frozen=True)
class PromptSettings:
    """Settings with the names and meanings of lm-eval's options. Raises ConfigError.

    `num_fewshot` changes tasks that do not fix it to 0. `limit`: so many documents of each split from its start, or a
    share of them below 1. `gen_kwargs`: in place of the task's, as "temperature=0.8,do_sample=true" or a mapping.
    `fewshot_as_multiturn`: by default where there is a chat template. `chat_template_kwargs`: its variables (lm-eval's
    model argument chat_template_args).
    """

    num_fewshot: int | None = None
    limit: float | None = None
    gen_kwargs: str | Mapping[str, Any] | None = None
    apply_chat_template: bool | str | None = False
    fewshot_as_multiturn: bool | None = None
    system_instruction: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ConfigError(f"{self.num_fewshot} few-shot examples are not possible; give 0 or more")
        check_limit(self.limit)
        chat, turns = self.apply_chat_template or False, self.fewshot_as_multiturn
        object.__setattr__(self, "apply_chat_template", chat)
        object.__setattr__(self, "fewshot_as_multiturn", bool(chat) if turns is None else turns)
        if turns and not chat:
            raise ConfigError("fewshot_as_multiturn was given without apply_chat_template; add it")
        if self.chat_template_kwargs and not chat:
            raise ConfigError("chat_template_kwargs was given without apply_chat_template; add it")
        given = self.gen_kwargs
        if isinstance(given, str) and not all(one.find("=") > 0 for one in given.split(",")):
            raise ConfigError(f"{given!r} are no settings of generation; give NAME=VALUE,... (temperature=0.8)")

    @classmethod
    def of(cls, options: object) -> PromptSettings:
        """Return the settings that `options` has as attributes of these names."""
        return cls(**{each.name: getattr(options, each.name) for each in fields(cls)})

    def apply(self, task: Any) -> None:
        """Set the few-shot examples and the generation of lm-eval's `task`, as lm-eval's evaluator does."""
        fixed, given = task.config.num_fewshot, self.gen_kwargs
        if fixed is None or (fixed and self.num_fewshot is not None):
            task.set_config(key="num_fewshot", value=self.num_fewshot or 0)
        if given and task.OUTPUT_TYPE == "generate_until":
            if isinstance(given, str):
                given = require("lm_eval.utils", "eval").simple_parse_args_string(given)
            task.set_config(key="generation_kwargs", value=given, update=True)

    def describe(self) -> dict[str, Any]:
        """Return, as JSON, those that lm-eval's task does not hold: limit, and the style of prompts if it is given."""
        names = ("apply_chat_template", "fewshot_as_multiturn", "system_instruction")
        style = {name: getattr(self, name) for name in names}
        if self.chat_template_kwargs:
            style["chat_template_kwargs"] = json.dumps(self.chat_template_kwargs, sort_keys=True)
        return {"limit": self.limit, **({"style": style} if list(style.values()) != [False, False, None] else {})}


def check_limit(limit: float | None) -> None:
    """Raise ConfigError unless a limit is None, a number of documents, or a share below 1."""
    if limit is not None and (limit <= 0 or (limit > 1 and limit != int(limit))):
        raise ConfigError(f"a limit of {limit:g} documents is not possible; give a number from 1, or a share below 1")


@contextmanager
def silence_output() -> Iterator[None]:
    """Within, nothing is printed, nor is what is logged without a handler. Cheap enough for every document."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


@contextmanager
def silence_lm_eval() -> Iterator[None]:
    """Within, nothing is printed, lm-eval logs errors only, and datasets shows no bars."""
    datasets = require("datasets", "eval")
    logger = logging.getLogger("lm_eval")
    level, had_bars = logger.level, not datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with silence_output():
            yield
    finally:
        logger.setLevel(level)
        if had_bars:
            datasets.enable_progress_bars()
