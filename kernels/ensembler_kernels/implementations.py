"""The implementations by name, whether one can run on a device, and which is taken where none is asked for."""

from __future__ import annotations

import importlib
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
    reason: str | None = module.unavailable(device)
    return reason


def chosen(impl: str | None, device: torch.device) -> str:
    """Return the name of the implementation to use; raise RuntimeError if the one asked for cannot run there."""
    if impl is None:
        candidates = ("triton", "cuda") if device.type == "cuda" else ()
        return next((name for name in candidates if why_not(name, device) is None), "torch")
    reason = why_not(impl, device)
    if reason is not None:
        raise RuntimeError(f"impl={impl!r} cannot run on {device}: {reason}")
    return impl
