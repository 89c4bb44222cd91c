"""Measure the host's time per call of the kernels, on a CPU, with a launch that does nothing.

python benchmarks/kernels_host.py: checks, dispatch, outputs, Triton's binder and caches are all run; left out are the
driver's launch and the questions for the current CUDA stream. The goal is 25 µs per call. Triton compiles for an H100
first, which takes a minute. Rows go to results/kernels_host.jsonl.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))

from ensembler_kernels import (
    Combination,
    Weights,
    checks,
    combine,
    combine_logprob,
    combine_sample,
    implementations,
    make_noise,
    triton_ops,
)
from kernel_timing import interleaved, seconds_of
from measuring import RESULTS, Measured
from triton_stub import launching_into_nothing

BASE_CHANGE = Combination((1.0, 0.0, 0.0), (0.0, 1.0, -1.0))
GOAL = 25.0  # µs
CALLS = 200  # in a row: one clock reading for all


@dataclass(frozen=True, kw_only=True)
class Row(Measured):
    """Microseconds per call: quartiles over repeats of CALLS calls; `launches` per call."""

    operation: str
    rows: int
    quartiles: list[float]
    launches: float
    goal: float = GOAL


def operations(rows: int, width: int) -> dict[str, Callable[[], object]]:
    """Return the calls of a decode step by name, on logits that are never read."""
    logits = [torch.empty(rows, width, dtype=torch.bfloat16) for _ in range(3)]
    one = Weights.of((BASE_CHANGE, 0.5))
    grid = Weights.of((BASE_CHANGE, [k / 10 for k in range(16)]))
    noise, targets = make_noise(1, list(range(rows))), torch.zeros(rows, dtype=torch.int64)
    index = torch.arange(rows, dtype=torch.int32)
    return {
        "combine": lambda: combine(logits, one, index),
        "combine + argmax": lambda: combine_sample(logits, one, index),
        "combine + sample": lambda: combine_sample(logits, one, index, temperature=0.7, noise=noise),
        "log-probs of 16 alphas": lambda: combine_logprob(logits, grid, targets, index),
    }


def measured(rows: int, width: int, repeats: int, calls: int) -> list[Row]:
    """Return a row per operation, timed by turns."""
    with (
        launching_into_nothing() as stub,
        patch.object(implementations, "fastest", lambda device: triton_ops),
        patch.object(checks, "_can_be_looked_at", lambda tensor: False),  # on a GPU it is not
        torch.inference_mode(),
    ):
        found, launches = operations(rows, width), {}
        for name, call in found.items():
            before = sum(stub.launched.values())
            call()
            launches[name] = sum(stub.launched.values()) - before

        def seconds(call: Callable[[], object]) -> Callable[[], float]:
            return lambda: seconds_of(lambda: [call() for _ in range(calls)]) / calls

        spreads = interleaved({name: seconds(call) for name, call in found.items()}, repeats)
    return [
        Row(operation=name, rows=rows, quartiles=spreads[name].microseconds, launches=launches[name]) for name in found
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--width", type=int, default=128_256)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--calls", type=int, default=CALLS)
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels_host.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for rows in options.rows:
        for row in measured(rows, options.width, options.repeats, options.calls):
            lower, median, upper = row.quartiles
            print(f"{row.operation:<24} {rows:>3} rows  {median:5.1f} µs ({lower:.1f} to {upper:.1f}), goal {GOAL:g}")
            row.append(options.out)


if __name__ == "__main__":
    main()
