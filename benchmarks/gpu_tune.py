"""Section `tune` of `gpu.py`: the launch table of the Triton kernels against other configurations.

`triton_configs.launch` is replaced while an operation is timed; the table is edited by hand from what is printed.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from unittest.mock import patch

from ensembler_kernels import implementations
from gpu_options import Options, Row
from gpu_table import Clock, Operation, Shape, make_clock, num
from kernel_timing import Loop, tensors
from torch.testing import assert_close

Launch = tuple[int, int, int]  # block, number of warps, splits of a row


def tune(options: Options) -> Iterator[Row]:
    """Yield a row per operation and number of rows: the fastest candidate next to the one of the table."""
    why = implementations.why_not("triton", options.device)
    if why is not None:
        yield Row("tune", {"left_out": why}, {"note": why})
        return
    from ensembler_kernels import triton_configs

    launch, clock = triton_configs.launch, None
    for rows in (1,) if options.small else (1, 8, 64, 512):
        if not options.has_time(f"tune: {num(rows)}"):
            continue
        clock = clock or make_clock(options)
        shape = Shape(rows, options)
        for operation in shape.operations():
            if options.has_time(f"tune: {operation.name}, {num(rows)}"):
                try:
                    yield _tuned(operation, shape, launch, clock, options)
                except Exception as error:  # the others are tried, and the script fails in the end
                    case = f"{operation.name}, {num(rows)}"
                    yield Row(case, {"error": repr(error)}, {"note": repr(error)[:100]})


def _tuned(operation: Operation, shape: Shape, launch: Callable[..., Launch], clock: Clock, options: Options) -> Row:
    case = f"{operation.name}, {num(shape.rows)}"
    asked: list[tuple[str, Launch]] = []

    def of_table(kind: str, *shape: int) -> Launch:
        asked.append((kind, launch(kind, *shape)))
        return asked[-1][1]

    timed = partial(_seconds, operation, shape, launch, clock, options)
    result, failed = operation.call("triton")(0), {}
    seconds = {"table": timed(of_table, result)}
    kind, in_table = asked[0]
    for candidate in _candidates(kind, in_table, shape.width, options.small):
        if options.has_time(f"tune: {case}, {candidate}"):
            try:
                seconds[" ".join(map(str, candidate))] = timed(lambda *_, found=candidate: found, result)
            except Exception as error:  # too many registers, say
                failed[str(candidate)] = repr(error)
    best = min(seconds, key=seconds.__getitem__)
    fields = {
        "operation": operation.name,
        "rows": shape.rows,
        "width": shape.width,
        "in_table": list(in_table),
        "in_table_us": round(1e6 * seconds["table"], 3),
        "fastest": best,
        "fastest_us": round(1e6 * seconds[best], 3),
        "all_us": {name: round(1e6 * of, 3) for name, of in seconds.items()},
        "failed": failed,
    }
    cells = {
        "block warps splits": " ".join(map(str, in_table)),
        "µs": f"{fields['in_table_us']:.2f}",
        "fastest": best,
        "fastest µs": f"{fields['fastest_us']:.2f}",
        "tried": str(len(seconds)),
        "failed": str(len(failed)),
    }
    return Row(case, fields, cells)


def _candidates(kind: str, in_table: Launch, width: int, small: bool) -> list[Launch]:
    """Return other configurations, with at least 8 ids per thread. Only `sample` may split a row into fewer parts."""
    found: dict[Launch, None] = {}
    for block, warps in [(256, 1)] if small else [(1024, 4), (2048, 4), (2048, 8), (4096, 4), (4096, 8)]:
        most = -(-width // block)
        splits = [in_table[2] // 2, in_table[2], 2 * in_table[2]] if kind == "sample" else [most]
        found |= dict.fromkeys((block, warps, max(1, min(most, of))) for of in splits)
    return [candidate for candidate in found if candidate != tuple(in_table)]


def _seconds(
    operation: Operation,
    shape: Shape,
    launch: Callable[..., Launch],
    clock: Clock,
    options: Options,
    replaced: Callable[..., Launch],
    expected: object,
) -> float:
    """Return the median of seconds per call while `replaced` stands for `launch`; raise if the result is another."""
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("ensembler_kernels.") and vars(module).get("launch") is launch:
                stack.enter_context(patch.object(module, "launch", replaced))
        loop = Loop(operation.call("triton"), shape.num_sets, 1 if options.small else shape.num_calls)
        assert_close(tensors(loop.call(0)), tensors(expected), rtol=1e-3, atol=1e-3)
        clock.settle(loop)
        return statistics.median(clock.device(loop) for _ in range(1 if options.small else 5))
