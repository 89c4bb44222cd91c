"""The C interface of the built libraries (interface.h, problem.h) as ctypes: structures, functions, errors."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ensembler_kernels.cuda.build import HARNESS, LIBRARY

MAX_MEMBERS = 8
MAX_RUNS = 32
MAX_BLOCKS = 8 * 132
"""Blocks of 128 threads that a launch is given in all: 8 for each of the 132 multiprocessors of an H100."""

_MIXED = 3
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SLOT = 8
_KERNELS = ("combine", "sample", "logprob", "normaliser", "threshold")


def _fields(kind: type[Any], names: str) -> list[tuple[str, type[Any]]]:
    return [(name, kind) for name in names.split()]


class Member(ctypes.Structure):
    _fields_ = (
        *_fields(ctypes.c_void_p, "data"),
        *_fields(ctypes.c_int64, "row_stride position_stride"),
        *_fields(ctypes.c_int32, "limit dtype"),
    )


class Run(ctypes.Structure):
    _fields_ = (*_fields(ctypes.c_int32, "first count is_even"),)


class Problem(ctypes.Structure):
    _fields_ = (
        ("members", Member * MAX_MEMBERS),
        ("runs", Run * MAX_RUNS),
        *_fields(ctypes.c_int32, "num_members dtype outputs splits layers num_rows positions width shared held raw"),
        *_fields(ctypes.c_int32, "table_stride point_stride temperature_stride"),
        *_fields(ctypes.c_void_p, "table rows log_sums thresholds temperature noise targets"),
        *_fields(ctypes.c_void_p, "partials beaten counters out tokens logprobs greedy totals"),
    )


class Library:
    """One built library. Raises OSError if it cannot be loaded, or was built from other sources than these."""

    def __init__(self, path: Path) -> None:
        functions = ctypes.CDLL(str(path))
        try:
            built_for = functions.ens_problem_size()
            self._launch = {name: getattr(functions, f"ens_{name}") for name in _KERNELS}
            self._error = functions.ens_error
            self._tile: int = functions.ens_tile()
            self.best_floats: int = functions.ens_best_size() // 4
        except AttributeError as error:
            raise OSError(f"{path} was built from other sources ({error}): build it again") from None
        if built_for != ctypes.sizeof(Problem):
            raise OSError(f"{path} was built from other sources (Problem of {built_for} bytes): build it again")
        self._error.restype = ctypes.c_char_p
        for function in self._launch.values():
            function.argtypes = [ctypes.c_void_p, ctypes.c_void_p]

    def num_splits(self, outputs: int, width: int) -> int:
        """Return the number of blocks that share an output: one for each tile until the GPU is full."""
        tiles = -(-(width + _SLOT - 1) // self._tile)  # slots may start that many ids before a row
        return max(1, min(tiles, MAX_BLOCKS // max(outputs, 1)))

    def launch(self, name: str, problem: Problem, device: torch.device) -> None:
        """Queue a kernel on torch's current stream of a device; RuntimeError if CUDA refuses it."""
        if not problem.outputs:  # CUDA refuses an empty grid
            return
        if device.type != "cuda":
            code = self._launch[name](ctypes.byref(problem), None)
        elif device.index == torch.cuda.current_device():
            code = self._launch[name](ctypes.byref(problem), torch.cuda.current_stream(device).cuda_stream)
        else:
            with torch.cuda.device(device):
                code = self._launch[name](ctypes.byref(problem), torch.cuda.current_stream(device).cuda_stream)
        if code:
            raise RuntimeError(f"{name} failed on {device}: {self._error(code).decode()}")


def path_for(device: torch.device) -> Path:
    """Return the library whose pointers are on that device: the CUDA one, or for the CPU the host harness."""
    return LIBRARY if device.type == "cuda" else HARNESS


@lru_cache(maxsize=2)
def load(path: Path) -> Library:
    """Load a library once per process."""
    return Library(path)


def dtype_code(dtypes: set[torch.dtype]) -> int:
    """Return the code of the dtype that all members have, or of a mixture."""
    return _DTYPES[next(iter(dtypes))] if len(dtypes) == 1 else _MIXED
