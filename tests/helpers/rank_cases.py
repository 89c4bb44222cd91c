"""Several processes on loopback, forked from a test, each a rank of an ensemble."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

from helpers.tiny import random_ids
from transformers import PreTrainedModel

from ensembler import EnsembleForCausalLM
from ensembler.engine.distributed import World
from ensembler.errors import EnsemblerError

ROLES = ("source_ft", "target_pt", "source_pt")
OPTIONS = {"max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 3}
IDS = random_ids(3, 6)
Task = Callable[[World], Any]


def run_ranks(size: int, task: Task, *, timeout: float = 60.0, wait: tuple[int, ...] | None = None) -> list[Any]:
    """Call `task` in `size` forked processes and return what each returned, or the text of the error that it raised.

    `wait`: the ranks that will answer (default: all).
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")  # the models of a test, and torch, are there at once
    pipes = [fork.Pipe(duplex=False) for _ in range(size)]
    processes = [
        fork.Process(target=_one_rank, args=(rank, size, port, task, timeout, pipes[rank][1])) for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        answers = range(size) if wait is None else wait
        return [pipes[rank][0].recv() if pipes[rank][0].poll(90) else None for rank in answers]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _one_rank(rank: int, size: int, port: int, task: Task, timeout: float, result: Any) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        world = World(timeout)
        result.send(task(world))
        time.sleep(1)  # rank 0 holds the store in which the others call the roll
    except EnsemblerError as error:
        result.send(error.args[0])
        time.sleep(1)
    except BaseException:
        result.send(traceback.format_exc())
    os._exit(0)


def spread(
    world: World, members: dict[str, PreTrainedModel], whole: EnsembleForCausalLM, **changes: Any
) -> EnsembleForCausalLM:
    """The ensemble `whole` over the ranks of `world`: its members are given out as they are loaded otherwise."""
    groups = [[role] for role in whole.rule.roles]
    mine = [role for index in world.divide(groups, [1] * len(groups)) for role in groups[index]]
    model = EnsembleForCausalLM(
        whole.config, {role: members[role] for role in mine}, whole.contract, world=world, **changes
    )
    model.generation_config = whole.generation_config
    return model
