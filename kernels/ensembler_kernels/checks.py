"""Arguments of the operations, checked and brought to the form that the implementations take."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ensembler_kernels.combination import Combination

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST = torch.finfo(torch.float32).max


def check_logits(logits: Sequence[Tensor], how: Combination, dims: tuple[int, ...] = (2,)) -> None:
    """Raise ValueError unless there is one tensor (rows[, positions], V_i) per member, all alike but for V_i."""
    if len(logits) != len(how.constant):
        raise ValueError(f"expected logits of {len(how.constant)} members, got {len(logits)}")
    anchor = logits[0]
    if anchor.dim() not in dims:
        wanted = " or ".join("(rows, positions, V)" if dim == 3 else "(rows, V)" for dim in dims)
        raise ValueError(f"expected logits {wanted}, got shape {tuple(anchor.shape)}")
    for i, z in enumerate(logits):
        if z.shape[:-1] != anchor.shape[:-1] or not z.shape[-1]:
            leading = ", ".join(str(size) for size in anchor.shape[:-1])
            raise ValueError(f"member {i}: expected shape ({leading}, V) as the anchor has, got {tuple(z.shape)}")
        if z.dtype not in DTYPES:
            raise ValueError(f"member {i}: expected float32, bfloat16 or float16, got {z.dtype}")
        if z.numel() // z.shape[-1] >= 2**31:
            raise ValueError(f"member {i}: expected fewer than 2^31 rows and positions, got shape {tuple(z.shape)}")
        if z.device != anchor.device:
            raise ValueError(f"member {i}: expected the anchor's device {anchor.device}, got {z.device}")


def per_row(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """Return a number, or a tensor (rows,), as fp32 (rows,) on the device of `like` (rows, ...)."""
    rows = like.shape[0]
    if not isinstance(value, Tensor):
        return torch.full((rows,), _finite(name, value), dtype=torch.float32, device=like.device)
    if (value.dim() == 1 and value.shape[0] != rows) or value.dim() > 1:
        shape = tuple(value.shape)
        raise ValueError(f"{name}: expected a number or one value per row, shape ({rows},), got shape {shape}")
    _check_finite(name, value)
    return value.to(like.device, torch.float32).expand(rows)


def per_grid(alphas: Sequence[float] | Tensor, like: Tensor) -> Tensor:
    """Return the α grid as fp32 (K,) on the device of `like`."""
    if not isinstance(alphas, Tensor):
        alphas = torch.tensor([_finite("alphas", alpha) for alpha in alphas], dtype=torch.float32)
    _check_finite("alphas", alphas)
    if alphas.dim() != 1 or not alphas.shape[0]:
        raise ValueError(f"alphas: expected a grid of shape (K,), got shape {tuple(alphas.shape)}")
    return alphas.to(like.device, torch.float32)


def check_temperature(temperature: float | Tensor) -> None:
    """Raise ValueError for a temperature below 0; a tensor is looked at only where that costs no synchronisation."""
    if isinstance(temperature, Tensor):
        if temperature.device.type != "cpu" or torch.compiler.is_compiling():
            return
        temperature = temperature.min().item() if temperature.numel() else 0.0
    if not 0 <= temperature <= _LARGEST:
        raise ValueError(f"temperature: expected 0 or a finite number above 0, got {temperature}")


def checked_seed(seed: int | Tensor) -> Tensor:
    """Return the seed as an int64 tensor without dimensions; numbers from 2⁶³ to 2⁶⁴ keep their 64 bits."""
    if isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"seed: expected one integer, got shape {tuple(seed.shape)} of {seed.dtype}")
        return seed.to(torch.int64).reshape(())
    if torch.compiler.is_compiling():
        return torch.tensor(seed, dtype=torch.int64)
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected an integer of 64 bits, got {seed}")
    return torch.tensor(seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64)


def check_targets(targets: Tensor, anchor: Tensor) -> None:
    """Raise ValueError unless targets are int64 (rows,), on the anchor's device and below its width."""
    rows, width = anchor.shape
    if targets.shape != (rows,):
        raise ValueError(f"targets: expected one per row, shape ({rows},), got shape {tuple(targets.shape)}")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets: expected int64, got {targets.dtype}")
    if targets.device != anchor.device:
        raise ValueError(f"targets: expected the anchor's device {anchor.device}, got {targets.device}")
    if torch.compiler.is_compiling():
        return  # the operation itself looks, when it runs
    check_range(targets, width)


def check_range(targets: Tensor, width: int) -> None:
    """Raise ValueError unless every target is an id in [0, width)."""
    outside = (targets < 0) | (targets >= width)
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(f"targets: expected ids in [0, {width}), got {int(targets[row])} in row {row}")


def check_sampled(tokens: Tensor, logprobs: Tensor) -> None:
    """Raise ValueError naming the first row that had no token to give."""
    bad = (tokens < 0) | logprobs.isnan()
    if bad.any():
        row = int(bad.nonzero()[0])
        what = "has no token to choose: all its combined logits are -inf" if tokens[row] < 0 else "holds NaN"
        raise ValueError(f"row {row} {what}")


def check_scored(logprobs: Tensor, alphas: Tensor) -> None:
    """Raise ValueError naming the first row whose target has no probability that could be told."""
    bad = logprobs.isnan()
    if bad.any():
        k, row = bad.nonzero()[0].tolist()
        raise ValueError(f"row {row} at alpha {alphas[k]:g}: all its combined logits are -inf, or one of them is NaN")


def _check_finite(name: str, value: Tensor) -> None:
    """Raise ValueError for inf or NaN in a tensor that can be looked at without a synchronisation."""
    if value.device.type == "cpu" and not torch.compiler.is_compiling() and not value.isfinite().all():
        raise ValueError(f"{name}: expected finite numbers, got {value.tolist()}")


def _finite(name: str, value: float) -> float:
    number = float(value)
    if torch.compiler.is_compiling():  # a number that changes between calls is a symbol here
        return number
    if math.isnan(number) or abs(number) > _LARGEST:
        raise ValueError(f"{name}: expected a finite float32 number, got {value}")
    return number
