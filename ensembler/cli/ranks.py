"""Several processes on the command line: all do the same, the first one speaks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, TypeVar

from ensembler.launch import num_ranks

if TYPE_CHECKING:
    from ensembler.distributed import World

Result = TypeVar("Result")


@contextmanager
def launched(timeout: float) -> Iterator[World | None]:
    """Meet the other processes that a launcher started, and mute all but the first; None where there are no others."""
    if num_ranks() == 1:
        yield None
        return
    from ensembler.distributed import World

    world = World(timeout)
    if world.rank == 0:
        yield world
    else:
        with open(os.devnull, "w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
            yield world
    world.close()


def on_each(world: World | None, function: Callable[[], Result]) -> Result:
    """What every process finds out by itself, from the files of its own machine; where one fails, all are told."""
    return function() if world is None else world.together(function)


def on_first(world: World | None, function: Callable[[], Result]) -> Result:
    """What reads standard input or writes files is done once; every process gets the result, or the error."""
    return function() if world is None else world.first(function)
