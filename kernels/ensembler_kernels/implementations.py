"""The implementations by name, whether one can run on a device, and which is taken where none is asked for.

An implementation is a module with these functions. `dispatch` has checked the arguments: logits on one device,
(rows, V_i) or (rows, positions, V_i), any strides, fp32, bf16 or fp16 mixed; `rows` int32 (outputs,) or None;
`weights.table` contiguous; `temperature` fp32, one per output or one for all, and `noise` int64 (outputs, 4), both
contiguous or both None; `targets` int64 (n,), contiguous; all on that device. Kernels of a GPU wait for nothing, and
can be captured in a CUDA graph after one call with the same weights.

    unavailable(device) -> str | None                            the reason why it cannot run there, in one line
    combine(logits, weights, rows) -> Tensor                     fp32, contiguous, (outputs, V)
    combine_sample(logits, weights, rows, temperature, noise) -> Sampled
    combine_logprob(logits, weights, targets, rows, log_z) -> Scored
"""

from __future__ import annotations

import importlib
import warnings
from functools import lru_cache
from types import ModuleType

import torch

from ensembler_kernels.combination import Combination
from ensembler_kernels.weights import Weights

MODULES = {
    "reference": "ensembler_kernels.reference",
    "torch": "ensembler_kernels.torch_ops",
    "triton": "ensembler_kernels.triton_ops",
    "cuda": "ensembler_kernels.cuda",
}


def load(name: str) -> ModuleType:
    """Return the module of an implementation."""
    if name not in MODULES:
        raise ValueError(f"impl: expected one of {', '.join(MODULES)}, got {name!r}")
    return importlib.import_module(MODULES[name])


def why_not(name: str, device: torch.device) -> str | None:
    """Return in one line why an implementation cannot run on a device, or None if it can."""
    try:
        module = load(name)
    except ImportError as error:
        return f"it cannot be imported ({error})"
    except (OSError, RuntimeError) as error:  # a Triton or a driver that is there and broken
        return f"it cannot be started ({error})"
    reason: str | None = module.unavailable(device)
    return reason


def chosen(impl: str | None, device: torch.device) -> ModuleType:
    """Return the implementation to use; raise RuntimeError if the one asked for cannot run there."""
    if impl is None:
        return fastest(device)
    reason = why_not(impl, device)
    if reason is not None:
        raise RuntimeError(f"impl={impl!r} cannot run on {device}: {reason}")
    return load(impl)


@lru_cache
def fastest(device: torch.device) -> ModuleType:
    """Return the implementation for a device where none is asked for: on a GPU the first that launches a kernel.

    One warning says why a faster one was passed over.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return load("torch")  # the kernels are tested on NVIDIA's alone
    failed = []
    for name in ("triton", "cuda"):
        reason = why_not(name, device) or _failed_launch(name, device)
        if reason is None:
            break
        failed.append(f"{name} {reason}")
    else:
        name = "torch"
    if failed:
        warnings.warn(f"logits are combined by {name} on {device}: {'; '.join(failed)}", stacklevel=2)
    return load(name)


def _failed_launch(name: str, device: torch.device) -> str | None:
    """Launch a small kernel and return in one line why that fails (no C compiler, an old GPU), or None."""
    weights = Weights.of((Combination((1.0,), (0.0,)), 0.0), device=device)
    try:
        load(name).combine([torch.zeros(1, 16, dtype=torch.bfloat16, device=device)], weights, None)
        torch.cuda.synchronize(device)
    except Exception as error:  # Triton's compiler, the C compiler it starts and the driver raise what they like
        return f"cannot launch a kernel ({' '.join(str(error).split())[:200]})"
    return None
