"""The C interface of the built libraries (interface.h, problem.h) as ctypes: structures, functions, errors."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import torch

from ensembler_kernels.cuda.build import HARNESS, LIBRARY

MAX_MEMBERS = 8
MAX_ALPHAS = 32

_MIXED = 3
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Member(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("position_stride", ctypes.c_int64),
        ("constant", ctypes.c_float),
        ("slope", ctypes.c_float),
        ("dtype", ctypes.c_int32),
        ("in_normaliser", ctypes.c_int32),
    )


class Problem(ctypes.Structure):
    _fields_ = (
        ("members", Member * MAX_MEMBERS),
        ("num_members", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("positions", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("shared", ctypes.c_int32),
        ("held", ctypes.c_int32),
        ("num_alphas", ctypes.c_int32),
        ("alpha_step", ctypes.c_int32),
        ("row_step", ctypes.c_int32),
        ("alphas", ctypes.c_void_p),
        ("normalisers", ctypes.c_void_p),
        ("thresholds", ctypes.c_void_p),
    )


_POINTER = ctypes.c_void_p
_ARGUMENTS = {
    "ens_combine": [_POINTER] * 2,
    "ens_sample": [_POINTER] * 6,
    "ens_logprob": [_POINTER] * 6,
    "ens_normalisers": [_POINTER] * 2,
    "ens_anchor_max": [_POINTER] * 2,
}
"""Pointers of each function; the stream follows them."""


class Library:
    """One built library. Raises OSError if it cannot be loaded, or was built from other sources than these."""

    def __init__(self, path: Path) -> None:
        self._functions = ctypes.CDLL(str(path))
        for name, arguments in _ARGUMENTS.items():
            getattr(self._functions, name).argtypes = [*arguments, _POINTER]
        self._functions.ens_error.restype = ctypes.c_char_p
        self.partial_size: int = self._functions.ens_partial_size()
        built_for = self._functions.ens_problem_size()
        if built_for != ctypes.sizeof(Problem):
            raise OSError(f"{path} was built from other sources (Problem of {built_for} bytes): build it again")

    def num_splits(self, width: int) -> int:
        """Blocks per row, and partial results per row."""
        count: int = self._functions.ens_num_splits(width)
        return count

    def call(self, name: str, problem: Problem, *tensors: torch.Tensor) -> None:
        """Queue one operation on torch's current stream of the tensors' device; RuntimeError if CUDA refuses it."""
        device = tensors[0].device
        pointers = [tensor.data_ptr() for tensor in tensors]
        if device.type == "cuda":
            with torch.cuda.device(device):
                code = getattr(self._functions, name)(
                    ctypes.byref(problem), *pointers, torch.cuda.current_stream(device).cuda_stream
                )
        else:
            code = getattr(self._functions, name)(ctypes.byref(problem), *pointers, None)
        if code:
            raise RuntimeError(f"{name} failed on {device}: {self._functions.ens_error(code).decode()}")


def path_for(device: torch.device) -> Path:
    """The library whose pointers are on that device: the CUDA one, or for the CPU the host harness."""
    return LIBRARY if device.type == "cuda" else HARNESS


@lru_cache(maxsize=2)
def load(path: Path) -> Library:
    """Load a library once per process."""
    return Library(path)


def dtype_code(dtypes: set[torch.dtype]) -> int:
    """The code of the dtype that all members have, or of a mixture."""
    return _DTYPES[next(iter(dtypes))] if len(dtypes) == 1 else _MIXED
