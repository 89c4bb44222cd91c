"""Options that say what runs the members: transformers, or vLLM's engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ensembler.errors import ConfigError
from ensembler.launch import num_ranks

if TYPE_CHECKING:
    from ensembler.serving.choice import BackendChoice

Command = TypeVar("Command", bound=Callable[..., Any])

_BACKEND = click.option(
    "--backend",
    type=click.Choice(["transformers", "vllm"]),
    default="transformers",
    show_default=True,
    help="What runs the members.",
)
_ENGINE_ARG = click.option(
    "--engine-arg",
    multiple=True,
    metavar="NAME=VALUE",
    help="An argument of vllm.LLM, for --backend vllm: tensor_parallel_size=2; repeat it.",
)


def backend_options(function: Command) -> Command:
    """Add --backend and --engine-arg; the command gets them as one `BackendChoice` under `backend`."""

    @wraps(function)
    def collected(*args: Any, backend: str, engine_arg: tuple[str, ...], **kwargs: Any) -> Any:
        return function(*args, backend=_choice(backend, engine_arg), **kwargs)

    command: Any = collected
    for option in (_ENGINE_ARG, _BACKEND):
        command = option(command)
    result: Command = command
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
