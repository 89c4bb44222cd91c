"""The meaning of the combination, in plain torch. It knows nothing of rules, models or tokenizers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def combine(
    logits: Sequence[Tensor],
    constant: Sequence[float],
    slope: Sequence[float],
    alpha: float | Tensor,
    *,
    shared: int | None = None,
    neutral: bool = False,
    raw: Sequence[bool] | None = None,
    cutoff: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return Σ_i constant_i · z_i + α · Σ_i slope_i · z_i, computed and returned in `dtype`.

    `logits`: one tensor (rows, V_i) or (rows, positions, V_i) per member, any float dtype; the first is the anchor and
    its width is the width of the result. `constant`, `slope`: one number per member. `alpha`: a number, or a tensor
    (rows,) with one value per row.

    A token that a member forbids has logit −inf. Where the first sum is −inf or undefined, so is the token: it stays
    forbidden. Where α times the second sum, the log-ratio, is undefined (inf − inf) or +inf, it counts as 0. NaN given
    by a member with a weight is NaN in the result.

    `shared`: ids from here on are not held by every member (default: the smallest width). They are forbidden, or with
    `neutral` get log-ratio 0: members of the ratio are then normalised over the shared ids first, but for those
    marked in `raw`. `cutoff`: forbid tokens whose anchor probability is below `cutoff` · the largest one, in rows
    with α ≠ 0 (Li et al. 2023, section 3.2).
    """
    if not len(logits) == len(constant) == len(slope):
        raise ValueError(f"{len(logits)} members with {len(constant)} constants and {len(slope)} slopes")
    anchor = logits[0]
    width = min(z.shape[-1] for z in logits)
    shared = width if shared is None else min(shared, width)
    normalise = neutral and shared < anchor.shape[-1]

    base = _weighted_sum(logits, constant, shared, dtype)
    base = base.masked_fill((base == math.inf) | (base.isnan() & ~_any_nan(logits, constant, shared)), -math.inf)
    ratio = _weighted_sum(logits, slope, shared, dtype)
    if normalise:
        ratio = ratio - _log_normaliser(logits, slope, shared, dtype, raw)
    alphas = _per_row(alpha, anchor, dtype)
    term = alphas * ratio
    overflow = (term == math.inf) & ratio.isfinite()
    undefined = (term == math.inf) | (term.isnan() & ~_any_nan(logits, slope, shared))
    term = term.masked_fill(undefined, 0.0).masked_fill(overflow, torch.finfo(dtype).max)
    combined = base + term
    if shared < anchor.shape[-1]:
        combined = torch.cat([combined, _outside(logits, constant, shared, neutral, dtype)], dim=-1)

    if cutoff is not None:
        scores = anchor.to(dtype).masked_fill(combined == -math.inf, -math.inf)
        implausible = scores < scores.amax(-1, keepdim=True) + math.log(cutoff)
        combined = combined.masked_fill(implausible & (alphas != 0), -math.inf)
    return combined


def _weighted_sum(logits: Sequence[Tensor], weights: Sequence[float], shared: int, dtype: torch.dtype) -> Tensor:
    """Σ weight · z over members with a weight; a weight of 1 leaves the bits of z as they are."""
    total = None
    for z, weight in zip(logits, weights, strict=True):
        if weight:
            term = z[..., :shared].to(device=logits[0].device, dtype=dtype) * weight
            total = term if total is None else total + term
    return torch.zeros_like(logits[0][..., :shared], dtype=dtype) if total is None else total


def _any_nan(logits: Sequence[Tensor], weights: Sequence[float], shared: int) -> Tensor:
    """True where a member with a weight gave NaN itself, as opposed to an inf − inf of the sum."""
    found = torch.zeros((), dtype=torch.bool, device=logits[0].device)
    for z, weight in zip(logits, weights, strict=True):
        if weight:
            found = found | z[..., :shared].isnan().to(logits[0].device)
    return found


def _log_normaliser(
    logits: Sequence[Tensor], slope: Sequence[float], shared: int, dtype: torch.dtype, raw: Sequence[bool] | None
) -> Tensor:
    """Σ slope · logsumexp of the shared logits, over members that are distributions."""
    is_raw = raw or [False] * len(logits)
    normalisers = [z[..., :shared].to(logits[0].device, dtype).logsumexp(-1, keepdim=True) for z in logits]
    weights = [0.0 if skip else weight for weight, skip in zip(slope, is_raw, strict=True)]
    return _weighted_sum(normalisers, weights, 1, dtype)


def _per_row(alpha: float | Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """α as a tensor that multiplies `like`: one value per row stands in front of positions and vocabulary."""
    alphas = torch.as_tensor(alpha, dtype=dtype, device=like.device)
    if alphas.dim() == 0:
        return alphas
    if alphas.dim() != 1 or alphas.shape[0] != like.shape[0]:
        raise ValueError(f"alpha has shape {tuple(alphas.shape)} for {like.shape[0]} rows; expected one value per row")
    return alphas.view(-1, *[1] * (like.dim() - 1))


def _outside(
    logits: Sequence[Tensor], constant: Sequence[float], shared: int, neutral: bool, dtype: torch.dtype
) -> Tensor:
    """The ids from `shared` up to the anchor's width: forbidden, or the first sum where its members have them."""
    anchor = logits[0]
    outside = torch.full_like(anchor[..., shared:], -math.inf, dtype=dtype)
    if neutral:
        held = min(z.shape[-1] for z, weight in zip(logits, constant, strict=True) if weight)
        held = min(held, anchor.shape[-1])
        outside[..., : held - shared] = _weighted_sum(logits, constant, held, dtype)[..., shared:]
    return outside
