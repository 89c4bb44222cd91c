"""The implementations by name, whether one can run on a device, and which is taken where none is asked for."""

from __future__ import annotations

import importlib
from functools import lru_cache
from types import ModuleType

import torch

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


def chosen(impl: str | None, device: torch.device) -> str:
    """Return the name of the implementation to use; raise RuntimeError if the one asked for cannot run there."""
    if impl is None:
        return _fastest(device)
    reason = why_not(impl, device)
    if reason is not None:
        raise RuntimeError(f"impl={impl!r} cannot run on {device}: {reason}")
    return impl


@lru_cache
def _fastest(device: torch.device) -> str:
    """The implementation for a device where none is asked for; found once, since a missing Triton is slow to miss."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return "torch"  # the kernels are compiled for NVIDIA's sm_80 and later, and tested for no other
    return next((name for name in ("triton", "cuda") if why_not(name, device) is None), "torch")
