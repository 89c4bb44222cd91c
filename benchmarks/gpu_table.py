"""Section `table` of `gpu.py`: what the operations take on the device and on the host, beside the chain and the floor.

V = 128,256, bf16, three members of base-change. The floor of an operation is the bytes that it has to read and write,
at the bandwidth of a large copy that is timed in turn with it.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from ensembler_kernels import Combination, Weights, combine, combine_logprob, combine_sample, make_noise
from ensembler_kernels.implementations import fastest, load, why_not
from gpu_options import Options, Row
from kernel_chains import greedy_chain, log_softmax_chain, multinomial_chain, scoring_chain
from kernel_timing import CpuClock, CudaClock, Loop, Spread, captured, interleaved, make_members

BASE_CHANGE = Combination((1.0, 0.0, 0.0), (0.0, 1.0, -1.0))
ALPHA, ALPHAS, TEMPERATURE = 0.7, [k / 10 for k in range(16)], 0.8
GOALS = {  # device time over the floor, at most; stated for an H100
    ("combine", 8): 1.5, ("combine", 64): 1.1, ("combine", 512): 1.05,
    ("argmax", 8): 3.0, ("argmax", 64): 1.3, ("argmax", 512): 1.15,
    ("sample", 8): 4.0, ("sample", 64): 1.8, ("sample", 512): 1.6,
    ("log-probs of 16 α", 8): 8.0, ("log-probs of 16 α", 64): 2.5, ("log-probs of 16 α", 512): 2.5,
}  # fmt: skip
CUDA_OVER_TRITON = 1.15

Clock = CpuClock | CudaClock


@dataclass
class Operation:
    """`launched(impl, weights, k)` runs it on the k-th set of inputs, `chain(k)` what people write.

    `made()` makes the weights; `moved`: the bytes that it has to read and write.
    """

    name: str
    moved: int
    chain: Callable[[int], object]
    made: Callable[[], Weights]
    launched: Callable[[str | None, Weights, int], object]

    def call(self, impl: str) -> Callable[[int], object]:
        """Return the call of an implementation on the k-th set, with weights of its own.

        The one that is taken where none is asked for is not asked for: that is the fast path.
        """
        weights = self.made()
        asked = None if fastest(weights.table.device) is load(impl) else impl
        return lambda at: self.launched(asked, weights, at)


class Shape:
    """The inputs of a number of rows: as many sets as fill the L2 cache three times, at least two."""

    def __init__(self, rows: int, options: Options) -> None:
        device, self.rows, self.width = options.device, rows, 1000 if options.small else 128_256
        self.is_small = options.small  # then it says whether it runs, not how fast
        self.set_bytes = 3 * 2 * rows * self.width
        cache = 0
        if device.type == "cuda" and not options.small:
            cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 50 * 2**20)
        self.num_sets = max(2, -(-3 * cache // self.set_bytes))
        self.num_calls = 3 if options.small else 60 if rows < 512 else 12
        members = make_members(self.num_sets * rows, self.width, torch.bfloat16, device)
        self.sets = [[z[at * rows : (at + 1) * rows] for z in members] for at in range(self.num_sets)]
        self.targets = torch.arange(rows, device=device) % self.width
        self.noise = make_noise(0, torch.arange(rows, device=device))
        self.device = device

    def operations(self) -> list[Operation]:
        sets, targets, noise, rows = self.sets, self.targets, self.noise, self.rows

        def one() -> Weights:
            return Weights.of((BASE_CHANGE, ALPHA)).to(self.device)

        def grid() -> Weights:
            return Weights.of((BASE_CHANGE, ALPHAS)).to(self.device)

        return [
            Operation(
                "combine", self.set_bytes + 4 * rows * self.width, lambda at: log_softmax_chain(sets[at], ALPHA), one,
                lambda impl, weights, at: combine(sets[at], weights, impl=impl),
            ),
            Operation(
                "argmax", self.set_bytes + 12 * rows, lambda at: greedy_chain(sets[at], ALPHA), one,
                lambda impl, weights, at: combine_sample(sets[at], weights, impl=impl),
            ),
            Operation(
                "sample", self.set_bytes + 12 * rows, lambda at: multinomial_chain(sets[at], ALPHA, TEMPERATURE), one,
                lambda impl, weights, at: combine_sample(
                    sets[at], weights, temperature=TEMPERATURE, noise=noise, impl=impl
                ),
            ),
            Operation(
                "log-probs of 16 α", self.set_bytes + 5 * rows * len(ALPHAS),
                lambda at: scoring_chain(sets[at], ALPHAS, targets), grid,
                lambda impl, weights, at: combine_logprob(sets[at], weights, targets, impl=impl),
            ),
        ]  # fmt: skip


def table(options: Options) -> Iterator[Row]:
    """Yield a row per operation, number of rows and way, and one for the first call of each operation."""
    names = ("triton", "cuda") if options.device.type == "cuda" else ("torch", "reference")
    reasons = {name: why_not(name, options.device) for name in names}
    yield from (Row(name, {"impl": name, "left_out": why}, {"note": why}) for name, why in reasons.items() if why)
    impls = [name for name, why in reasons.items() if why is None]
    clock: Clock | None = None
    with tempfile.TemporaryDirectory() as cache, patch.dict(os.environ, TRITON_CACHE_DIR=cache):  # first calls compile
        for rows in (1, 8) if options.small else (1, 8, 64, 512):
            if not options.has_time(f"table: {num(rows)}"):
                continue
            clock = clock or make_clock(options)
            shape = Shape(rows, options)
            for operation in shape.operations():
                if options.has_time(f"table: {operation.name}, {num(rows)}"):
                    yield from _measured(operation, shape, impls, clock, repeats=3 if options.small else 9)


def make_clock(options: Options) -> Clock:
    return CudaClock(options.device) if options.device.type == "cuda" else CpuClock()


def _measured(operation: Operation, shape: Shape, impls: list[str], clock: Clock, repeats: int) -> Iterator[Row]:
    """Time one operation on one shape: implementations, their graphs, the chain and the copy in turn."""
    loops = {"copy": clock.copy_loop()[0], "chain": Loop(operation.chain, shape.num_sets, shape.num_calls)}
    graphs: dict[str, dict[str, Any]] = {}
    for impl in impls:
        case, shared = _case(operation, shape, impl), _shared(operation, shape, impl)
        try:
            call = operation.call(impl)
            first = _first_call(call)
            loops[impl] = Loop(call, shape.num_sets, shape.num_calls)
            clock.settle(loops[impl])
        except Exception as error:  # whatever it is, the other ways are measured, and the script fails in the end
            loops.pop(impl, None)
            yield Row(case, shared | {"error": repr(error)}, {"note": f"failed: {error!r}"[:100]})
            continue
        yield Row(case, shared | {"first_call_ms": round(1e3 * first, 3)}, {"first call ms": f"{1e3 * first:.0f}"})
        if isinstance(clock, CudaClock):
            try:
                replay, is_equal = captured(call, shape.num_sets)
                graphs[impl] = {} if is_equal else {"error": "the graph's result is not the eager one"}
                loops[f"{impl} graph"] = Loop(replay, 1, max(1, shape.num_calls // shape.num_sets))
                clock.settle(loops[f"{impl} graph"])
            except Exception as error:
                loops.pop(f"{impl} graph", None)
                graphs[impl] = {"error": f"capture: {error!r}"}
    clock.settle(loops["chain"])

    device = interleaved({name: partial(clock.device, loop) for name, loop in loops.items()}, repeats)
    host = interleaved({name: partial(clock.host, loop) for name, loop in loops.items()}, repeats)
    bandwidth = clock.copy_loop()[1] / device["copy"].median
    for impl in ("chain", *(impl for impl in impls if impl in loops)):
        fields = _shared(operation, shape, impl) | {"repeats": repeats, "calls": loops[impl].num_calls}
        fields |= {"host_us": host[impl].microseconds, "is_host_bound": loops[impl].is_host_bound}
        fields |= _judged(operation, shape, impl, device, bandwidth) | graphs.get(impl, {})
        yield Row(_case(operation, shape, impl), fields, _cells(fields))


def _judged(
    operation: Operation, shape: Shape, impl: str, device: dict[str, Spread], bandwidth: float
) -> dict[str, Any]:
    """Return what the device takes, beside the floor, the chain, Triton and the goal, where there is one."""
    own, floor = device[impl], operation.moved / bandwidth
    judged: dict[str, Any] = {
        "device_us": own.microseconds,
        "bytes": operation.moved,
        "copy_gb_per_second": round(bandwidth / 1e9, 3),
        "floor_us": round(1e6 * floor, 4),
        "times_floor": round(own.median / floor, 3),
        "times_chain": round(own.median / device["chain"].median, 4),
    }
    if graph := device.get(f"{impl} graph"):  # a replay is a call on every set
        judged["graph_us"] = [round(us / shape.num_sets, 3) for us in graph.microseconds]
    goal = GOALS.get((operation.name, shape.rows))
    if goal is not None and impl != "chain" and not shape.is_small:
        judged |= {"goal": goal, "is_goal_met": own.median <= goal * floor}
    if impl == "cuda" and "triton" in device:
        over = own.median / device["triton"].median
        judged |= {"times_triton": round(over, 3), "is_within_15_percent": over <= CUDA_OVER_TRITON}
    return judged


def _cells(fields: dict[str, Any]) -> dict[str, str]:
    lower, median, upper = fields["device_us"]
    cells = {
        "floor µs": f"{fields['floor_us']:.2f}",
        "device µs": f"{median:.1f} [{lower:.1f}, {upper:.1f}]" + (" *" if fields["is_host_bound"] else ""),
        "× floor": f"{fields['times_floor']:.2f}",
        "× chain": f"{fields['times_chain']:.2f}",
        "host µs": f"{fields['host_us'][1]:.1f}",
    }
    if "goal" in fields:
        cells["goal"] = f"{fields['goal']}: {'met' if fields['is_goal_met'] else 'MISSED'}"
    if "times_triton" in fields:
        verdict = "within 15 %" if fields["is_within_15_percent"] else "MORE than 15 % over"
        cells["× triton"] = f"{fields['times_triton']:.2f}: {verdict}"
    if "graph_us" in fields:
        cells["graph µs"] = f"{fields['graph_us'][1]:.1f}"
    if "error" in fields:
        cells["note"] = str(fields["error"])[:100]
    return cells


def _first_call(call: Callable[[int], object]) -> float:
    start = time.perf_counter()
    call(0)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _case(operation: Operation, shape: Shape, impl: str) -> str:
    return f"{operation.name}, {num(shape.rows)}, {impl}"


def num(rows: int) -> str:
    return f"{rows} row{'s' if rows > 1 else ''}"


def _shared(operation: Operation, shape: Shape, impl: str) -> dict[str, Any]:
    return {
        "operation": operation.name, "rows": shape.rows, "impl": impl, "width": shape.width, "dtype": "bfloat16",
        "members": 3, "sets": shape.num_sets,
    }  # fmt: skip
