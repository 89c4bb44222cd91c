"""Arguments of the operations, checked and brought to the form that the implementations take."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ensembler_kernels.weights import Weights

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INDICES = (torch.int32, torch.int64)
_CHECKED = "checked"


def rows_of(logits: Sequence[Tensor]) -> int:
    """Return the number of rows, where each position of a row counts as one."""
    anchor = logits[0]
    return anchor.shape[0] * anchor.shape[1] if anchor.dim() == 3 else anchor.shape[0]


def check_call(
    logits: Sequence[Tensor], weights: Weights, rows: Tensor | None, *, per_point: bool = False
) -> Tensor | None:
    """Raise ValueError unless logits, weights and rows fit together; return the rows as int32.

    Logits of the same shapes, dtypes and device as in the last call are not checked again: those of a step repeat.
    """
    if not isinstance(weights, Weights):
        kind = type(weights).__name__
        raise ValueError(f"weights: expected Weights, got a {kind}: make them with Weights.of((combination, alphas))")
    if torch.compiler.is_compiling():
        _check_logits(logits, weights)
    else:
        signature = [(z.shape, z.dtype, z.device) for z in logits]
        if weights.known.get(_CHECKED) != signature:
            _check_logits(logits, weights)
            weights.known[_CHECKED] = signature
    if rows is not None:
        rows = _checked_rows(rows, logits)
    outputs = rows_of(logits) if rows is None else rows.shape[0]
    if not per_point and len(weights) not in (1, outputs):
        remedy = "for every row at every alpha, repeat the alphas and give `rows`"
        raise ValueError(f"weights: expected 1 row, or one for each of {outputs} outputs, got {len(weights)}; {remedy}")
    return rows


def _check_logits(logits: Sequence[Tensor], weights: Weights) -> None:
    """Raise ValueError unless logits are what the weights are for, all alike but for their widths."""
    if len(logits) != weights.num_members:
        raise ValueError(f"expected logits of {weights.num_members} members, got {len(logits)}")
    anchor = logits[0]
    if anchor.dim() not in (2, 3):
        raise ValueError(f"expected logits (rows, V) or (rows, positions, V), got shape {tuple(anchor.shape)}")
    for i, z in enumerate(logits):
        if z.shape[:-1] != anchor.shape[:-1] or not z.shape[-1]:
            leading = ", ".join(str(size) for size in anchor.shape[:-1])
            raise ValueError(f"member {i}: expected shape ({leading}, V) as the first has, got {tuple(z.shape)}")
        if z.dtype not in DTYPES:
            raise ValueError(f"member {i}: expected float32, bfloat16 or float16, got {z.dtype}: convert it")
        if z.numel() // z.shape[-1] >= 2**31:
            raise ValueError(f"member {i}: expected fewer than 2^31 rows and positions, got shape {tuple(z.shape)}")
        if z.device != anchor.device:
            raise ValueError(f"member {i}: expected the device of the first, {anchor.device}, got {z.device}")
    if weights.table.device != anchor.device:
        got = f"got {weights.table.device}: move them with weights.to(device)"
        raise ValueError(f"weights: expected the logits' device {anchor.device}, {got}")


def _checked_rows(rows: Tensor, logits: Sequence[Tensor]) -> Tensor:
    if not isinstance(rows, Tensor):
        raise ValueError(f"rows: expected a tensor of int32 or int64 (outputs,), got a {type(rows).__name__}")
    if rows.dim() != 1 or rows.dtype not in _INDICES or rows.device != logits[0].device:
        wanted = f"int32 or int64 (outputs,) on {logits[0].device}"
        raise ValueError(f"rows: expected {wanted}, got {rows.dtype} {tuple(rows.shape)} on {rows.device}")
    if _can_be_looked_at(rows):
        _check_range("rows", rows, rows_of(logits))
    return rows.to(torch.int32).contiguous()


def check_targets(targets: Tensor, logits: Sequence[Tensor], weights: Weights, rows: Tensor | None) -> Tensor:
    """Return the targets, contiguous; raise ValueError unless they are int64 ids, one per row that is read."""
    count = rows_of(logits) if rows is None else rows.shape[0]
    if targets.shape != (count,):
        raise ValueError(f"targets: expected one per row, shape ({count},), got shape {tuple(targets.shape)}")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets: expected int64, got {targets.dtype}")
    if targets.device != logits[0].device:
        raise ValueError(f"targets: expected the logits' device {logits[0].device}, got {targets.device}")
    if _can_be_looked_at(targets):
        _check_range("targets", targets, weights.width([z.shape[-1] for z in logits]))
    return targets.contiguous()


def per_output(temperature: float | Tensor, noise: Tensor, outputs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return temperature as fp32 (outputs,) or (1,), and the noise, both contiguous and checked."""
    if not isinstance(noise, Tensor):
        kind = type(noise).__name__
        raise ValueError(f"noise: expected a tensor, got a {kind}: make it with make_noise(seed, prompts)")
    if noise.shape != (outputs, 4) or noise.dtype != torch.int64 or noise.device != device:
        got = f"{noise.dtype} {tuple(noise.shape)} on {noise.device}"
        raise ValueError(f"noise: expected int64 ({outputs}, 4) on {device}, got {got}")
    if not isinstance(temperature, Tensor):
        return _constant(temperature, device), noise.contiguous()
    if temperature.dim() > 1 or temperature.numel() not in (1, outputs):
        shape = tuple(temperature.shape)
        raise ValueError(f"temperature: expected a number or one per output, ({outputs},), got shape {shape}")
    if _can_be_looked_at(temperature) and temperature.numel():
        _check_temperature(float(temperature.min()), float(temperature.max()))
    return temperature.reshape(-1).to(device, torch.float32).contiguous(), noise.contiguous()


def _constant(temperature: float, device: torch.device) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.full((1,), temperature, dtype=torch.float32, device=device)
    _check_temperature(temperature, temperature)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.full((1,), temperature, device=device)  # filled by the graph: not to be kept for other calls
    return _kept(float(temperature), device)


@lru_cache(maxsize=64)
def _kept(number: float, device: torch.device) -> Tensor:
    """A number on a device, so that a call with the same temperature copies nothing there."""
    return torch.full((1,), number, dtype=torch.float32, device=device)


def _check_temperature(lowest: float, highest: float) -> None:
    if not (lowest >= 0 and highest <= torch.finfo(torch.float32).max):
        raise ValueError(f"temperature: expected 0 or a finite number above 0, got {lowest if lowest < 0 else highest}")


def _can_be_looked_at(tensor: Tensor) -> bool:
    """Without waiting for a device: there, an index that does not exist gives NaN instead."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_range(name: str, indices: Tensor, end: int) -> None:
    outside = (indices < 0) | (indices >= end)
    if outside.any():
        at = int(outside.nonzero()[0])
        raise ValueError(f"{name}: expected numbers in [0, {end}), got {int(indices[at])} at {at}")
