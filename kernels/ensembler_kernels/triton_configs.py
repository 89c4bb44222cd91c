"""Launch configurations of the Triton kernels: how many token ids one program takes, and how many warps share them.

Every configuration gives a thread at least 8 token ids, because 8 values of two bytes are one 16-byte load. One program
takes one block of one row, so one row of 128,256 ids is 126 programs of 1,024 ids: about one for each of an
H100's 132 multiprocessors. None of it has been timed on a GPU yet: the autotuner chooses at the first call.
"""

import triton  # type: ignore[import-untyped]  # Triton has no type stubs

ALL_CONFIGS = [
    triton.Config({"BLOCK": 1024}, num_warps=4),
    triton.Config({"BLOCK": 2048}, num_warps=4),
    triton.Config({"BLOCK": 2048}, num_warps=8),
    triton.Config({"BLOCK": 4096}, num_warps=8),
]
CONFIGS = ALL_CONFIGS[:1] if triton.knobs.runtime.interpret else ALL_CONFIGS  # the interpreter has nothing to time

AUTOTUNE_KEY = ["width", "row_bucket", "NUM_MEMBERS"]

PREPASS_BLOCK = 2048
"""Block of the two pre-passes, with Triton's default of 4 warps: 16 ids per thread."""


def row_bucket(rows: int) -> int:
    """The power of two at or above `rows`, at most 64: batch sizes that share one tuned configuration."""
    return min(1 << max(rows - 1, 0).bit_length(), 64)
