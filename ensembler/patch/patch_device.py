"""The device that patches are computed on: the size of its blocks, and memory of the host that it copies with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ensembler.errors import ConfigError, RunError

CPU = torch.device("cpu")
BLOCK_ELEMENTS = 128 * 1024  # half a megabyte in fp32: a block and its factors stay in a core's own cache
_DEVICE_ELEMENTS = 2**23  # 32 MiB in fp32: copies and launches cost little beside the work
_MOST_STREAMS = 8


def find_device(name: str) -> torch.device:
    """Return the CPU or the CUDA device of this name. Raises ConfigError where there is none."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    num = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type != "cpu" and not (device.type == "cuda" and (device.index or 0) < num):
        raise ConfigError(
            f"--device {name}: there is no such device for patches here ({num} CUDA devices were found); give cpu, or "
            "cuda, cuda:1 ... where there is one"
        )
    return device


def block_elements(device: torch.device) -> int:
    """Return how many values of a weight are changed at a time."""
    return BLOCK_ELEMENTS if device.type == "cpu" else _DEVICE_ELEMENTS


def num_workers(device: torch.device) -> int:
    """Return how many tensors are on their way at once: one for each thread of torch, on a GPU at most 8."""
    num = torch.get_num_threads()
    return num if device.type == "cpu" else min(num, _MOST_STREAMS)


def use_own_stream(device: torch.device) -> None:
    """Give this thread a stream of its own on a GPU: its copies run beside the copies and sums of other threads."""
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


def host_memory(num_bytes: int, device: torch.device) -> Tensor:
    """Return new bytes of the host, pinned for a GPU. torch keeps pinned memory for the next that asks for it."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """Return values of the host on a device, without waiting for it. Pinned ones must stay until it has them."""
    return values.to(device, non_blocking=True)


def on_host(values: Tensor) -> Tensor:
    """Return values in memory of the host, in a row; wait for a GPU to have computed and copied them."""
    if values.device.type != "cuda":
        return values
    found = host_memory(values.nbytes, values.device).view(values.dtype).view(values.shape)
    found.copy_(values, non_blocking=True)
    torch.cuda.current_stream(values.device).synchronize()
    return found


def is_finite(sums: Sequence[Tensor]) -> bool:
    """Return whether no sum is NaN or infinite; wait for their device once."""
    return not sums or math.isfinite(torch.stack(list(sums)).double().sum())


@contextmanager
def memory_of(device: torch.device) -> Iterator[None]:
    """Raise RunError where the memory of a GPU does not do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(f"{device} has too little memory free for this; free some, or use --device cpu") from error
