"""Read the environment in which torchrun and `accelerate launch` start a process. Loads no torch."""

from __future__ import annotations

import os

RANK_TIMEOUT = 300.0  # seconds of silence after which a process counts as lost


def num_ranks() -> int:
    """The number of processes that a launcher started for this run: 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def this_rank() -> int:
    """The number of this process among them, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Its number on this machine: that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))
