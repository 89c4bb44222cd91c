"""Launch configurations of the Triton kernels: fixed by kind, width and number of outputs, never tuned at run time.

A thread has at least 8 token ids, because 8 values of two bytes are one 16-byte load. `combine` and `logprob` give
every block of ids a program of its own. `sample` gives a program several blocks where there are more than fill the GPU,
so that its reductions are paid once. Chosen by arithmetic on registers and bytes in flight (`compile_check.py`), and
not yet measured one by one on a GPU: `python benchmarks/gpu.py --sections tune` does that.
"""

from __future__ import annotations

from typing import NamedTuple

MULTIPROCESSORS = 132  # of an H100
PROGRAMS_EACH = 8  # programs of 128 threads that a multiprocessor is given, of 16 that fit


class Launch(NamedTuple):
    """Ids per block, warps of a program, and programs per row of ids."""

    block: int
    num_warps: int
    splits: int


FEW = 8
CONFIGS = {  # kind: ids per block and warps for FEW outputs, for more
    "combine": ((1024, 4), (2048, 4)),
    "sample": ((1024, 4), (1024, 4)),
    "logprob": ((2048, 8), (2048, 8)),
    "prepass": ((2048, 4), (2048, 4)),
}


def launch(kind: str, outputs: int, width: int) -> Launch:
    """Return how a kernel is launched for `outputs` rows of `width` ids."""
    few, many = CONFIGS[kind]
    block, num_warps = few if outputs <= FEW else many
    splits = -(-width // block)
    if kind == "sample":
        blocks_each = -(-splits // max(1, MULTIPROCESSORS * PROGRAMS_EACH // max(outputs, 1)))
        splits = -(-splits // blocks_each)  # none of them idle
    return Launch(block, num_warps, splits)
