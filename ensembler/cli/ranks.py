"""Several processes on the command line: all do the same, the first one speaks."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, TypeVar

from ensembler.errors import ConfigError, EnsemblerError, PromptError, RankError
from ensembler.launch import local_rank, num_ranks, this_rank

if TYPE_CHECKING:
    from ensembler.engine.distributed import World

Result = TypeVar("Result")


@contextmanager
def launched(timeout: float) -> Iterator[World | None]:
    """Meet the other processes that a launcher started, and mute all but the first; None where there are no others."""
    if num_ranks() == 1:
        yield None
        return
    from ensembler.engine.distributed import World

    world = World(timeout)
    signal.signal(signal.SIGTERM, world.terminated)
    if world.rank == 0:
        yield world
    else:
        with open(os.devnull, "w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
            yield world
    world.close()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def on_each(world: World | None, function: Callable[[], Result]) -> Result:
    """Let every process call `function`, for the files of its own machine; where one fails, all are told."""
    return function() if world is None else world.together(function)


def on_first(world: World | None, function: Callable[[], Result]) -> Result:
    """Let the first process call `function`, to read standard input or write files; all get its result, or error."""
    return function() if world is None else world.first(function)


@contextmanager
def naming_rank() -> Iterator[None]:
    """Let the process that failed report its error; the first reports errors in what all were given."""
    try:
        yield
    except EnsemblerError as error:
        if num_ranks() == 1 or isinstance(error, ConfigError | PromptError):
            raise
        raise RankError(f"process {this_rank()}: {error}", reporter=this_rank()) from error


def use_own_gpu() -> None:
    """Processes on one machine each take their GPU for what is placed on 'cuda'."""
    import torch

    if num_ranks() > 1 and local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(local_rank())


def this_command() -> str:
    """Return the command line as it was typed."""
    return shlex.join(["ensembler", *sys.argv[1:]])
