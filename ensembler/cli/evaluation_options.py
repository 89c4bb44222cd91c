"""Options that say on which tasks an ensemble is evaluated, and what runs its members."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ensembler.cli.command_class import Decorated, log, section
from ensembler.cli.option_groups import PATH, TEMPLATE_KWARGS
from ensembler.errors import ConfigError
from ensembler.launch import num_ranks

if TYPE_CHECKING:
    from ensembler.evaluation.tasks import TextTask
    from ensembler.serving.choice import BackendChoice

_speed = section("Speed")
_BACKEND = _speed(
    "--backend",
    type=click.Choice(["transformers", "vllm"]),
    default="transformers",
    show_default=True,
    help="What runs the members.",
)
_ENGINE_ARG = _speed(
    "--engine-arg",
    multiple=True,
    metavar="NAME=VALUE",
    help="An argument of vllm.LLM, for --backend vllm: tensor_parallel_size=2; repeat it.",
)


def backend_options(function: Decorated) -> Decorated:
    """Add --backend and --engine-arg; the command gets them as one `BackendChoice` under `backend`."""

    @wraps(function)
    def collected(*args: Any, backend: str, engine_arg: tuple[str, ...], **kwargs: Any) -> Any:
        return function(*args, backend=_choice(backend, engine_arg), **kwargs)

    command: Any = collected
    for option in (_ENGINE_ARG, _BACKEND):
        command = option(command)
    result: Decorated = command
    return result


def _choice(name: str, arguments: tuple[str, ...]) -> BackendChoice:
    from ensembler.serving.choice import VLLM, BackendChoice

    if name == VLLM and num_ranks() > 1:
        raise ConfigError(
            "--backend vllm was given under a launcher; vLLM starts its own processes: run it without, and give "
            "--engine-arg tensor_parallel_size=N for several GPUs"
        )
    return BackendChoice(name, dict(map(_argument, arguments)))


def _argument(text: str) -> tuple[str, Any]:
    """A name and its value, which is JSON where it can be read as that, or else a text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ConfigError(f"--engine-arg {text!r} is not of the form NAME=VALUE (tensor_parallel_size=2)")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


_MOST_TOKENS = 256  # as in lm-eval
_DEFAULT_CHAT = "default"


@dataclass(frozen=True)
class TaskOptions:
    """The tasks as given on the command line; `load` finds them."""

    task: tuple[str, ...] = ()
    include_path: Path | None = None
    num_fewshot: int | None = None
    limit: float | None = None
    apply_chat_template: str | None = None
    fewshot_as_multiturn: bool | None = None
    system_instruction: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    gen_kwargs: str | None = None
    data: Path | None = None
    prompt: str | None = None
    choices: str | None = None
    answer: str | None = None
    metric: str | None = None
    confirm_run_unsafe_code: bool = False
    strict: bool = True

    @property
    def metric_key(self) -> str | None:
        """The metric asked for of the tasks; that of a data file is its only one, and said to its making."""
        return self.metric if self.data is None else None

    def load(self, default: Path | None = None, context: int | None = None) -> list[TextTask]:
        """Return the tasks; without any given, the one at `default`. Raises ConfigError or PromptError.

        `context`: the shortest of the members, in tokens; generated answers to a data file take half of it at most.
        """
        if self.data is not None:
            return [self._from_file(self.data, context)]
        given = {"--prompt": self.prompt, "--choices": self.choices, "--answer": self.answer}
        beside = next((option for option, value in given.items() if value is not None), None)
        if beside is not None:
            raise ConfigError(f"{beside} was given without --data; name the file of rows that it is for")
        names = self.task or (() if default is None else (str(default),))
        if not names:
            raise ConfigError("no task was given; give --task with a name or a YAML file, or --data with a file")
        from ensembler.evaluation.lm_eval_settings import PromptSettings
        from ensembler.evaluation.task_loading import load_tasks

        return load_tasks(
            names,
            PromptSettings.of(self),
            include_path=self.include_path,
            confirm_run_unsafe_code=self.confirm_run_unsafe_code,
        )

    def _from_file(self, data: Path, context: int | None) -> TextTask:
        beside = "--task" if self.task else "--include-path" if self.include_path is not None else None
        if beside is not None:
            raise ConfigError(f"{beside} and --data were both given; give one of them")
        if self.prompt is None or self.answer is None:
            missing = "--prompt" if self.prompt is None else "--answer"
            raise ConfigError(f"--data was given without {missing}; give it with fields of the rows, as '{{question}}'")
        from ensembler.evaluation.lm_eval_settings import PromptSettings
        from ensembler.evaluation.task_files import make_task_from_file

        return make_task_from_file(
            data,
            prompt=self.prompt,
            answer=self.answer,
            choices=self.choices,
            metric=self.metric,
            settings=PromptSettings.of(self),
            max_new_tokens=_MOST_TOKENS if context is None else min(_MOST_TOKENS, context // 2),
            skip=None if self.strict else (lambda message: log.warning("skipped: %s", message)),
        )


tasks_section = section("Tasks")
_TASK_OPTIONS = (
    tasks_section("--task", multiple=True, metavar="TASK", help="A task of lm-eval, or a YAML file of one; repeat it."),
    tasks_section("--include-path", type=PATH, metavar="DIR", help="YAML files that win over lm-eval's."),
    tasks_section("--num-fewshot", type=int, metavar="N", help="Solved examples in a prompt.  [default: the task's]"),
    tasks_section(
        "--limit", type=float, metavar="N", help="The first N documents of each split, below 1 a share; N drawn images."
    ),
    tasks_section(
        "--apply-chat-template",
        is_flag=False,
        flag_value=_DEFAULT_CHAT,
        metavar="[NAME]",
        help="Write prompts as chats, in the template of the anchor's tokenizer.",
    ),
    tasks_section(
        "--fewshot-as-multiturn/--no-fewshot-as-multiturn",
        default=None,
        help="Solved examples as turns of the chat, or all in one.  [default: turns]",
    ),
    tasks_section("--chat-template-kwargs", **TEMPLATE_KWARGS),
    tasks_section("--system-instruction", metavar="TEXT", help="Put before each prompt, or as the chat's system turn."),
    tasks_section(
        "--gen-kwargs", metavar="NAME=VALUE,...", help="Settings of generation in place of the task's: temperature=0.8."
    ),
    tasks_section("--data", type=PATH, metavar="FILE", help="In place of --task: JSON lines."),
    tasks_section("--prompt", metavar="TEXT", help="With --data: what is asked; {field} is a field of the row."),
    tasks_section("--choices", metavar="A,B,...", help="With --data: the answers to choose from; may hold fields."),
    tasks_section("--answer", metavar="TEXT", help="With --data: the right answer, {field}; or its index from 0."),
    tasks_section(
        "--metric",
        metavar="METRIC",
        help="One of the task's, its first by default; with --data acc, exact_match, flexible_number or perplexity.",
    ),
    tasks_section(
        "--confirm-run-unsafe-code",
        is_flag=True,
        help="Let tasks such as HumanEval run what a model wrote, unconfined.",
    ),
)


def task_options(function: Decorated) -> Decorated:
    """Add the options that say which tasks, as one `TaskOptions` under `tasks`; `ensemble_options` stands above."""

    @wraps(function)
    def collected(*args: Any, **kwargs: Any) -> Any:
        tasks = TaskOptions(**{one.name: kwargs.pop(one.name) for one in fields(TaskOptions) if one.name != "strict"})
        chat, given = tasks.apply_chat_template, kwargs["given"]
        named = (given.ensemble, given.source_ft, given.source_pt, given.target_pt, given.member)
        if chat not in (None, _DEFAULT_CHAT) and not any(named):
            raise ConfigError(
                f"no ensemble was given: --apply-chat-template took {chat!r} as the name of a template; put the "
                f"ensemble before it, or write --apply-chat-template={_DEFAULT_CHAT}"
            )
        return function(*args, tasks=tasks, **kwargs)

    command: Any = collected
    for option in reversed(_TASK_OPTIONS):
        command = option(command)
    result: Decorated = command
    return result
