"""The meaning of the three operations, in plain torch. It knows nothing of rules, models or tokenizers.

Everything takes `dtype`, in which it computes: float64 is the truth that tests measure the implementations against.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ensembler_kernels.combination import Combination


def unavailable(device: torch.device) -> None:
    """It runs everywhere."""
    return


def combine(
    logits: Sequence[Tensor], how: Combination, alpha: float | Tensor, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return Σ_i constant_i · z_i + α · Σ_i slope_i · z_i, computed and returned in `dtype`.

    `logits`: one tensor (rows, V_i) or (rows, positions, V_i) per member, any float dtype; the first is the anchor and
    its width is the width of the result. `alpha`: a number, or a tensor (rows,) with one value per row.

    A token that a member forbids has logit −inf. Where the first sum is −inf or undefined, so is the token: it stays
    forbidden. Where α times the second sum, the log-ratio, is undefined (inf − inf) or +inf, it counts as 0; where it
    overflows though the log-ratio is finite, it is the largest number of `dtype`. NaN given by a member with a weight
    is NaN in the result.

    Ids from `how.shared` on are forbidden, or with `how.neutral` get log-ratio 0: members of the ratio are then
    normalised over the shared ids first, but for those marked in `how.raw`. `how.cutoff`: forbid tokens whose anchor
    probability is below `cutoff` · the largest one, in rows with α ≠ 0 (Li et al. 2023, section 3.2).
    """
    anchor = logits[0]
    shared = how.shared_width(logits)
    base = _first_sum(logits, how, dtype)
    ratio = _weighted_sum(logits, how.slope, shared, dtype)
    if how.normalises(logits):
        ratio = ratio - _log_normaliser(logits, how, shared, dtype)
    alphas = _per_row(alpha, anchor, dtype)
    term = alphas * ratio
    overflow = (term == math.inf) & ratio.isfinite()
    undefined = (term == math.inf) | (term.isnan() & ~_any_nan(logits, how.slope, shared))
    term = term.masked_fill(undefined, 0.0).masked_fill(overflow, torch.finfo(dtype).max)
    combined = torch.cat([base[..., :shared] + term, base[..., shared:]], dim=-1)

    if how.cutoff is not None:
        scores = anchor.to(dtype).masked_fill(combined == -math.inf, -math.inf)
        implausible = scores < scores.amax(-1, keepdim=True) + math.log(how.cutoff)
        combined = combined.masked_fill(implausible & (alphas != 0), -math.inf)
    return combined


def combine_sample(
    logits: Sequence[Tensor],
    how: Combination,
    alpha: float | Tensor,
    temperature: float | Tensor,
    seed: int | Tensor,
    *,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Return one token per row of softmax(z / temperature) and its log-prob, z being the combination.

    `logits`: (rows, V_i) per member. `temperature`: a number or (rows,); 0 takes the most likely token (the lowest id
    of equals) and its log-prob under softmax(z). Above 0 the token is argmax(z / temperature + gumbel), so that a draw
    depends on (seed, row, token id) alone. Returns tokens (rows,) int64, −1 in a row in which everything is −inf, and
    log-probs (rows,), NaN in a row with NaN.
    """
    z = combine(logits, how, alpha, dtype=dtype)
    temperature = torch.as_tensor(temperature, dtype=dtype, device=z.device).expand(z.shape[0]).unsqueeze(-1)
    is_greedy = temperature == 0
    scaled = z / temperature.masked_fill(is_greedy, 1.0)
    scores = torch.where(is_greedy, scaled, scaled + gumbel(seed, z.shape[0], z.shape[1], z.device).to(dtype))
    tokens = scores.argmax(-1)
    logprobs = scaled.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return tokens.masked_fill(z.amax(-1) == -math.inf, -1), logprobs


def combine_logprob(
    logits: Sequence[Tensor],
    how: Combination,
    alphas: Sequence[float] | Tensor,
    targets: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Return log-probs of `targets` (rows,) int64 under every α of `alphas` (K,), and whether each is the argmax.

    `logits`: (rows, V_i) per member. Returns log-probs (K, rows) and flags (K, rows) bool; of equal logits the lowest
    id is the argmax. A row in which everything is −inf, or anything NaN, has log-prob NaN.
    """
    logprobs, greedy = [], []
    for alpha in torch.as_tensor(alphas, dtype=dtype, device=logits[0].device):
        z = combine(logits, how, alpha, dtype=dtype)
        logprobs.append(z.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1))
        greedy.append(z.argmax(-1) == targets)
    return torch.stack(logprobs), torch.stack(greedy)


def gumbel(seed: int | Tensor, rows: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Return Gumbel noise (rows, width) fp32 that depends on (seed, row, token id) alone.

    u = ((bits >> 9) + ½) · 2⁻²³ is exact in fp32 and never 0 or 1 (with 24 bits the largest would round to 1, and its
    noise be +inf: a token at random, once in 2²⁴ draws); the noise is −log(−log u).
    """
    group = torch.arange((width + 3) // 4, device=device)
    row = torch.arange(rows, device=device).unsqueeze(-1)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    words = philox(group, row, zero, zero, seed)
    bits = torch.stack([word.expand(words[0].shape) for word in words], dim=-1).flatten(-2)[:, :width]
    uniform = ((bits >> 9).float() + 0.5) * 2.0**-23
    return -(-uniform.log()).log()


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: int | Tensor) -> tuple[Tensor, ...]:
    """Return the four 32-bit words (in int64) of Philox-4x32-10 at these counters (Salmon et al. 2011, section 3.3)."""
    low = 0xFFFFFFFF
    key0, key1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 wraps around; the 64 bits are right
        c0, c1 = ((product1 >> 32) & low) ^ c1 ^ key0, product1 & low
        c2, c3 = ((product0 >> 32) & low) ^ c3 ^ key1, product0 & low
        key0, key1 = (key0 + 0x9E3779B9) & low, (key1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def _weighted_sum(logits: Sequence[Tensor], weights: Sequence[float], shared: int, dtype: torch.dtype) -> Tensor:
    """Σ weight · z over members with a weight; a weight of 1 leaves the bits of z as they are."""
    total = None
    for z, weight in zip(logits, weights, strict=True):
        if weight:
            term = z[..., :shared].to(dtype) * weight
            total = term if total is None else total + term
    return torch.zeros_like(logits[0][..., :shared], dtype=dtype) if total is None else total


def _any_nan(logits: Sequence[Tensor], weights: Sequence[float], shared: int) -> Tensor:
    """True where a member with a weight gave NaN itself, as opposed to an inf − inf of the sum."""
    found = torch.zeros((), dtype=torch.bool, device=logits[0].device)
    for z, weight in zip(logits, weights, strict=True):
        if weight:
            found = found | z[..., :shared].isnan()
    return found


def _log_normaliser(logits: Sequence[Tensor], how: Combination, shared: int, dtype: torch.dtype) -> Tensor:
    """Σ slope · logsumexp of the shared logits, over members that are distributions."""
    normalisers = [z[..., :shared].to(dtype).logsumexp(-1, keepdim=True) for z in logits]
    return _weighted_sum(normalisers, how.normalised_slope, 1, dtype)


def _per_row(alpha: float | Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """α as a tensor that multiplies `like`: one value per row stands in front of positions and vocabulary."""
    alphas = torch.as_tensor(alpha, dtype=dtype, device=like.device)
    return alphas if alphas.dim() == 0 else alphas.view(-1, *[1] * (like.dim() - 1))


def _first_sum(logits: Sequence[Tensor], how: Combination, dtype: torch.dtype) -> Tensor:
    """Σ constant · z of the anchor's width: −inf where it is +inf or undefined, and beyond the ids that are held."""
    held = how.held_width(logits)
    base = _weighted_sum(logits, how.constant, held, dtype)
    undefined = base.isnan() & ~_any_nan(logits, how.constant, held)
    base = base.masked_fill((base == math.inf) | undefined, -math.inf)
    return torch.nn.functional.pad(base, (0, logits[0].shape[-1] - held), value=-math.inf)
