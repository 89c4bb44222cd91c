"""Options that say on which tasks an ensemble is evaluated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ensembler.errors import ConfigError

if TYPE_CHECKING:
    from ensembler.evaluation.tasks import TextTask

_MOST_TOKENS = 256  # as in lm-eval
_DEFAULT_CHAT = "default"
Command = TypeVar("Command", bound=Callable[..., Any])


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
    gen_kwargs: str | None = None
    data: Path | None = None
    prompt: str | None = None
    choices: str | None = None
    answer: str | None = None
    metric: str | None = None
    confirm_run_unsafe_code: bool = False

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
        from ensembler.evaluation.prompt_settings import PromptSettings
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
        from ensembler.evaluation.prompt_settings import PromptSettings
        from ensembler.evaluation.task_files import make_task_from_file

        return make_task_from_file(
            data,
            prompt=self.prompt,
            answer=self.answer,
            choices=self.choices,
            metric=self.metric,
            settings=PromptSettings.of(self),
            max_new_tokens=_MOST_TOKENS if context is None else min(_MOST_TOKENS, context // 2),
        )


_TASK_OPTIONS = (
    click.option("--task", multiple=True, metavar="TASK", help="A task of lm-eval, or a YAML file of one; repeat it."),
    click.option(
        "--include-path", type=click.Path(path_type=Path), metavar="DIR", help="YAML files that win over lm-eval's."
    ),
    click.option("--num-fewshot", type=int, metavar="N", help="Solved examples in each prompt.  [default: the task's]"),
    click.option(
        "--limit", type=float, metavar="N", help="The first N documents of each split, below 1 a share; N drawn images."
    ),
    click.option(
        "--apply-chat-template",
        is_flag=False,
        flag_value=_DEFAULT_CHAT,
        metavar="[NAME]",
        help="Write prompts as chats, in the template of the anchor's tokenizer.",
    ),
    click.option(
        "--fewshot-as-multiturn/--no-fewshot-as-multiturn",
        default=None,
        help="Solved examples as turns of the chat, or all in one.  [default: turns]",
    ),
    click.option("--system-instruction", metavar="TEXT", help="Put before each prompt, or as the chat's system turn."),
    click.option(
        "--gen-kwargs", metavar="NAME=VALUE,...", help="Settings of generation in place of the task's: temperature=0.8."
    ),
    click.option("--data", type=click.Path(path_type=Path), metavar="FILE", help="In place of --task: JSON lines."),
    click.option("--prompt", metavar="TEXT", help="With --data: what is asked; {field} is a field of the row."),
    click.option("--choices", metavar="A,B,...", help="With --data: the answers to choose from; may hold fields."),
    click.option("--answer", metavar="TEXT", help="With --data: the right answer, {field}; or its index from 0."),
    click.option(
        "--metric",
        metavar="METRIC",
        help="One of the task's, its first by default; with --data acc, exact_match, flexible_number or perplexity.",
    ),
    click.option(
        "--confirm-run-unsafe-code",
        is_flag=True,
        help="Let tasks such as HumanEval run what a model wrote, unconfined.",
    ),
)


def task_options(function: Command) -> Command:
    """Add the options that say which tasks, as one `TaskOptions` under `tasks`; `ensemble_options` stands above."""

    @wraps(function)
    def collected(*args: Any, **kwargs: Any) -> Any:
        tasks = TaskOptions(**{field.name: kwargs.pop(field.name) for field in fields(TaskOptions)})
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
    result: Command = command
    return result
