"""The meaning of the operations, in plain torch. It knows nothing of rules, models or tokenizers.

Everything takes `dtype`, in which it computes: float64 is the truth that tests measure the implementations against.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ensembler_kernels.results import Sampled, Scored
from ensembler_kernels.weights import Weights


def unavailable(device: torch.device) -> None:
    """It runs everywhere."""
    return


def combine(
    logits: Sequence[Tensor], weights: Weights, rows: Tensor | None = None, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return z = Σ_i constant_i · z_i + α · Σ_i slope_i · z_i for every output, (outputs, V), in `dtype`.

    `logits`: one tensor (rows, V_i) or (rows, positions, V_i) per member, any float dtype; a row and a position are a
    row. `rows` (outputs,): the row that each output reads (None: each its own). V is the width of the anchors.

    A token that a member forbids has logit −inf. Where the first sum is −inf, +inf or undefined, the token is
    forbidden. Where α times the second sum, the log-ratio, is undefined (inf − inf) or +inf, it counts as 0; where it
    overflows though the log-ratio is finite, it is the largest number of `dtype`. NaN given by a member with a weight
    is NaN in the result, and so is all of an output whose row does not exist. A member whose weight is 0 is not read.

    Ids that are not shared by all members are forbidden; with `neutral` they get log-ratio 0, if the members of the
    first sum hold them: members of the ratio are then normalised over the shared ids first, but for `raw` ones. A
    cut-off forbids tokens whose probability under the first sum is below cutoff · that of the most probable token that
    is allowed, in outputs with α ≠ 0 and without NaN (Li et al. 2023, section 3.2).
    """
    widths = [z.shape[-1] for z in logits]
    shared, held, width = weights.shared_width(widths), weights.held_width(widths), weights.width(widths)
    members, exists = _members(logits, rows, dtype)
    constant, slope, alpha, cutoff = _columns(weights, members[0], dtype)

    base = _weighted_sum(members, constant, held, pad_with_forbidden=True)
    base = base.masked_fill((base == math.inf) | (base.isnan() & ~_any_nan(members, constant, held)), -math.inf)
    ratio = _weighted_sum(members, slope, shared)
    if weights.normalises(widths):
        normaliser = torch.zeros_like(alpha)
        for z, of_member, is_raw in zip(members, slope, weights.raw, strict=True):
            if not is_raw:
                log_sum = z[:, :shared].logsumexp(-1, keepdim=True)
                normaliser = normaliser + log_sum.masked_fill(of_member == 0, 0.0) * of_member
        ratio = ratio - normaliser
    term = alpha * ratio
    overflow = (term == math.inf) & ratio.isfinite()
    undefined = (term == math.inf) | (term.isnan() & ~_any_nan(members, slope, shared))
    term = term.masked_fill(undefined, 0.0).masked_fill(overflow, torch.finfo(dtype).max)
    combined = base + pad(term, (0, held - shared))
    if weights.cuts:
        scores = base.masked_fill(combined == -math.inf, -math.inf).masked_fill(combined.isnan(), math.nan)
        implausible = scores < scores.amax(-1, keepdim=True) + cutoff
        combined = combined.masked_fill(implausible & (alpha != 0), -math.inf)
    combined = pad(combined, (0, width - held), value=-math.inf)
    return combined.masked_fill(~exists.unsqueeze(-1), math.nan)


def combine_sample(
    logits: Sequence[Tensor],
    weights: Weights,
    rows: Tensor | None = None,
    temperature: Tensor | None = None,
    noise: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Sampled:
    """Return one token per output, argmax(z / temperature + gumbel), and its log-prob under softmax(z / temperature).

    `temperature` (outputs,) or (1,); 0 takes the most likely token (the lowest id of equals) and its log-prob under
    softmax(z). `noise` (outputs, 4) int64: seed, prompt, sample, position, on which the noise of a token depends, and
    on nothing else (see `gumbel`); None: greedy throughout. Token −1 where everything is −inf; log-prob NaN where the
    output holds NaN.
    """
    z = combine(logits, weights, rows, dtype=dtype)
    scaled = scores = z
    if noise is not None:
        assert temperature is not None  # `dispatch` gives both or none
        by = temperature.to(z.device, dtype).expand(z.shape[0]).unsqueeze(-1)
        scaled = z / by.masked_fill(by == 0, 1.0)
        scores = torch.where(by == 0, scaled, scaled + gumbel(noise.to(z.device), z.shape[1]).to(dtype))
    tokens = scores.argmax(-1)
    logprobs = scaled.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return Sampled(tokens.masked_fill(z.amax(-1) == -math.inf, -1), logprobs)


def combine_logprob(
    logits: Sequence[Tensor],
    weights: Weights,
    targets: Tensor,
    rows: Tensor | None = None,
    log_z: bool = False,
    *,
    dtype: torch.dtype = torch.float32,
) -> Scored:
    """Return the log-probs (K, n) of `targets` (n,) int64 under each of K points, and whether each is the argmax.

    `rows` (n,): the row that each target reads (None: each its own). Of equal logits the lowest id is the argmax. NaN
    where a row is all −inf or holds NaN, and for a target or a row that does not exist. `log_z`: also
    log Σ_v Π_i p_i(v)^w_i (K, n), w being the weights at α: the p_i are normalised over all ids of a member, or those
    of the ratio as in `combine`, and raw members are scores.
    """
    widths = [z.shape[-1] for z in logits]
    members, _ = _members(logits, rows, dtype)
    exists = (targets >= 0) & (targets < weights.width(widths))
    at = targets.clamp(0, weights.width(widths) - 1).unsqueeze(-1)
    logprobs, greedy, totals = [], [], []
    for point in weights.table:
        z = combine(logits, weights.replace_table(point.unsqueeze(0)), rows, dtype=dtype)
        logprobs.append(z.log_softmax(-1).gather(-1, at).squeeze(-1).masked_fill(~exists, math.nan))
        greedy.append((z.argmax(-1) == targets) & ~logprobs[-1].isnan())
        if log_z:
            totals.append(z.logsumexp(-1) - _log_normalisers(members, weights, point.to(dtype)))
    return Scored(torch.stack(logprobs), torch.stack(greedy), torch.stack(totals) if log_z else None)


def gumbel(noise: Tensor, width: int) -> Tensor:
    """Return Gumbel noise (outputs, width) fp32 by Philox-4x32-10.

    `noise` (outputs, 4) int64: seed, prompt, sample, position; of each number the low 32 bits count, of the seed 64.
    Word v mod 4 of counter (v ÷ 4, position, sample, prompt) under the seed as key belongs to token v.
    u = ((bits >> 9) + ½) · 2⁻²³ is exact in fp32 and never 0 or 1 (with 24 bits the largest would round to 1, and its
    noise be +inf: a token at random, once in 2²⁴ draws); the noise is −log(−log u).
    """
    seed, prompt, sample, position = noise.unsqueeze(-1).unbind(1)
    counter = torch.arange((width + 3) // 4, device=noise.device).expand(noise.shape[0], -1)
    words = philox(counter, position & _LOW, sample & _LOW, prompt & _LOW, seed)
    bits = torch.stack(words, dim=-1).flatten(-2)[:, :width]
    uniform = ((bits >> 9).float() + 0.5) * 2.0**-23
    return -(-uniform.log()).log()


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four 32-bit words, as int64, of Philox-4x32-10 (Salmon et al. 2011, section 3.3)."""
    key0, key1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 wraps around; the 64 bits are right
        c0, c1 = ((product1 >> 32) & _LOW) ^ c1 ^ key0, product1 & _LOW
        c2, c3 = ((product0 >> 32) & _LOW) ^ c3 ^ key1, product0 & _LOW
        key0, key1 = (key0 + 0x9E3779B9) & _LOW, (key1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


_LOW = 0xFFFFFFFF


def _members(logits: Sequence[Tensor], rows: Tensor | None, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Return the rows that outputs read, (outputs, V_i) of each member, and whether each exists, (outputs,)."""
    flat = [z.reshape(-1, z.shape[-1]).to(dtype) for z in logits]
    if rows is None:
        return flat, torch.ones(flat[0].shape[0], dtype=torch.bool, device=flat[0].device)
    exists = (rows >= 0) & (rows < flat[0].shape[0])
    index = rows.where(exists, 0).long()
    return [z[index] for z in flat], exists


def _columns(weights: Weights, like: Tensor, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Return constants and slopes of each member, α and cut-offs, each (outputs, 1)."""
    columns = weights.table.to(like.device, dtype).expand(like.shape[0], -1).unsqueeze(-1).unbind(1)
    num = weights.num_members
    return list(columns[:num]), list(columns[num : 2 * num]), columns[-2], columns[-1]


def _weighted_sum(
    members: Sequence[Tensor], weights: Sequence[Tensor], width: int, *, pad_with_forbidden: bool = False
) -> Tensor:
    """Return Σ weight · z (outputs, width); a weight of 1 leaves the bits of z as they are, one of 0 skips z."""
    total = torch.zeros(members[0].shape[0], width, dtype=members[0].dtype, device=members[0].device)
    for z, weight in zip(members, weights, strict=True):
        term = z[:, :width].masked_fill(weight == 0, 0.0) * weight
        if pad_with_forbidden and term.shape[-1] < width:
            absent = torch.where(weight == 0, 0.0, -math.inf).to(term.dtype)
            term = torch.cat([term, absent.expand(-1, width - term.shape[-1])], dim=-1)
        total = total + term
    return total


def _any_nan(members: Sequence[Tensor], weights: Sequence[Tensor], width: int) -> Tensor:
    """Return (outputs, width): a member with a weight gave NaN itself, as opposed to an inf − inf of the sum."""
    found = torch.zeros(members[0].shape[0], width, dtype=torch.bool, device=members[0].device)
    for z, weight in zip(members, weights, strict=True):
        nan = z[:, :width].isnan() & (weight != 0)
        found = found | pad(nan, (0, width - nan.shape[-1]))
    return found


def _log_normalisers(members: Sequence[Tensor], weights: Weights, point: Tensor) -> Tensor:
    """Return Σ_i w_i · log Σ exp z_i (n,) over the members that `combine` has not normalised."""
    total = torch.zeros(members[0].shape[0], dtype=members[0].dtype, device=members[0].device)
    num = weights.num_members
    normalised = weights.normalises([z.shape[-1] for z in members])
    for i, z in enumerate(members):
        weight = point[i] if normalised else point[i] + point[-2] * point[num + i]
        if not weights.raw[i] and weight != 0:
            total = total + weight * z.logsumexp(-1)
    return total
