"""Shared by the benchmarks of kernels: members, spreads, and clocks for CPU and GPU. It needs torch alone."""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Spread:
    """Quartiles of seconds per call."""

    lower: float
    median: float
    upper: float

    @property
    def microseconds(self) -> list[float]:
        """The three quartiles in µs, as rows hold them."""
        return [round(1e6 * seconds, 3) for seconds in (self.lower, self.median, self.upper)]


def interleaved(timed: Mapping[Key, Callable[[], float]], repeats: int) -> dict[Key, Spread]:
    """Take the seconds that each function returns, in turn, so that a disturbance meets all of them.

    `repeats` rounds, at least 2, after one to warm up.
    """
    seconds: dict[Key, list[float]] = {name: [] for name in timed}
    for _ in range(repeats + 1):
        for name, measure in timed.items():
            seconds[name].append(measure())
    return {name: Spread(*statistics.quantiles(times[1:], n=4)) for name, times in seconds.items()}


def seconds_of(call: Callable[[], object]) -> float:
    """Return what a call on the CPU takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Loop:
    """Calls of one operation in a row, on sets of inputs that take turns; a set's result is kept until its next turn.

    Without turns the logits of a few rows would sit in the L2 cache, and the allocator would hand out the same output.
    """

    def __init__(self, call: Callable[[int], object], num_sets: int, num_calls: int) -> None:
        self.call, self.num_calls = call, num_calls
        self.is_host_bound = False  # the device waited for the host, so its time is that of the host too
        self.host_seconds = 0.0
        self._results: list[object] = [None] * num_sets
        self._at = 0

    def run(self) -> None:
        for _ in range(self.num_calls):
            self._results[self._at] = self.call(self._at)
            self._at = (self._at + 1) % len(self._results)


class CpuClock:
    """Seconds per call on the CPU, where the host is the device."""

    def settle(self, loop: Loop) -> None:
        """Warm up."""
        loop.run()

    def device(self, loop: Loop) -> float:
        """Return seconds per call."""
        return seconds_of(loop.run) / loop.num_calls

    host = device

    def copy_loop(self) -> tuple[Loop, int]:
        """Return copies of 64 MB, and the bytes that one reads and writes."""
        return _copy_loop(torch.device("cpu"), 2**26)


class CudaClock:
    """Seconds per call on a GPU: of the device by events, of the host without waiting for the device.

    A kernel of a few rows takes the device less time than its launch takes the host, so events around a plain loop
    would time the host. Here large copies keep the device busy until the host has launched the whole loop; they also
    empty the L2 cache. Where the first call began before the last was launched, `is_host_bound` of the loop says so.
    """

    def __init__(self, device: torch.device, copied: int = 2**29) -> None:
        self._blocker, self._moved = _copy_loop(device, copied)
        self._blocker.run()
        self._copy_seconds = 1e-6
        self._copy_seconds = min(self._timed(self._blocker, 0.0) for _ in range(3))

    def copy_loop(self) -> tuple[Loop, int]:
        """Return large copies, whose bandwidth is the floor's, and the bytes that one reads and writes."""
        return self._blocker, self._moved

    def settle(self, loop: Loop) -> None:
        """Warm up, and shorten the loop until its launches fit into the device's queue (about 1,000)."""
        loop.run()
        while True:
            loop.host_seconds = self.host(loop)
            self.device(loop)
            if not loop.is_host_bound or loop.num_calls <= 4:
                return
            loop.num_calls //= 2

    def device(self, loop: Loop) -> float:
        """Return seconds per call between events."""
        return self._timed(loop, 2 * loop.num_calls * loop.host_seconds + 1e-4)

    def host(self, loop: Loop) -> float:
        """Return seconds per call until the host may go on; less than the device takes, if nothing waits for it."""
        torch.cuda.synchronize()
        seconds = seconds_of(loop.run) / loop.num_calls
        torch.cuda.synchronize()
        return seconds

    def _timed(self, loop: Loop, blocked: float) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        for _ in range(math.ceil(blocked / self._copy_seconds)):
            self._blocker.call(0)
        start.record()
        loop.run()
        end.record()
        loop.is_host_bound = start.query()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / loop.num_calls


def captured(call: Callable[[int], object], num_sets: int) -> tuple[Callable[[int], object], bool]:
    """Capture a call on each set in one CUDA graph; return its replay, and whether it equals the last eager call."""
    expected = call(num_sets - 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call(at) for at in range(num_sets)]

    def replay(_: int) -> list[object]:
        graph.replay()
        return results

    replay(0)
    torch.cuda.synchronize()
    return replay, all(torch.equal(a, b) for a, b in zip(tensors(expected), tensors(results[-1]), strict=True))


def tensors(result: Any) -> list[Tensor]:
    """Return the tensors of what an operation returns."""
    return [part for part in ([result] if isinstance(result, Tensor) else result) if part is not None]


def _copy_loop(device: torch.device, size: int) -> tuple[Loop, int]:
    source = torch.zeros(size // 4, device=device)
    target = torch.empty_like(source)
    return Loop(lambda _: target.copy_(source), 1, 4), 2 * size


def make_members(rows: int, width: int, dtype: torch.dtype, device: torch.device, num: int = 3) -> list[Tensor]:
    """Return logits (rows, width) of `num` members that resemble one another, as those of one family do."""
    generator = torch.Generator(device).manual_seed(width + rows)
    common = 3 * torch.randn(rows, width, generator=generator, device=device)
    return [(common + 0.5 * torch.randn(rows, width, generator=generator, device=device)).to(dtype) for _ in range(num)]


def device_name(device: torch.device) -> str:
    """Return what the device is called by whoever made it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = Path("/proc/cpuinfo")
    names = [line for line in cpu.read_text().splitlines() if line.startswith("model name")] if cpu.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()
