"""Gumbel noise by Philox-4x32-10, in place; `reference.gumbel` says which noise it is."""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
SPREAD = 20.5  # the noise lies between −2.85 and 16.64: a token this far below the best can never be drawn


def sample(scaled: Tensor, top: Tensor, seed: int, rows: Tensor) -> Tensor:
    """Return argmax(scaled + noise) of each row of `scaled` (n, V), (n,) int64.

    `top` (n,) holds the maxima, `rows` (n,) the numbers of the rows, on which the noise depends.
    """
    n, width = scaled.shape
    counters = torch.nn.functional.pad(rows.unsqueeze(-1), (0, 2))
    row, token = (scaled >= (top - SPREAD).unsqueeze(-1)).nonzero(as_tuple=True)
    if row.numel() * 4 > n * width:  # one block of Philox makes the noise of four tokens, so here all are as cheap
        return (scaled + noise(seed, counters, width)).argmax(-1)
    scores = torch.full_like(scaled, -torch.inf)
    scores[row, token] = scaled[row, token] + noise_at(seed, counters[row], token)
    return scores.argmax(-1)


def noise(seed: int, counters: Tensor, width: int) -> Tensor:
    """Return the noise of every token, (n, width) fp32; `counters` (n, 3) int64 are Philox's, after that of tokens."""
    num_groups = (width + 3) // 4
    group = torch.arange(num_groups, device=counters.device).repeat(counters.shape[0])
    words = _philox(group, counters.repeat_interleave(num_groups, 0), seed)
    return _to_gumbel(torch.stack(words, dim=-1).view(counters.shape[0], -1)[:, :width])


def noise_at(seed: int, counters: Tensor, tokens: Tensor) -> Tensor:
    """Return the noise of one token (n,) each, (n,) fp32: what `noise` has in the column of that token."""
    words = _philox(tokens >> 2, counters, seed)
    return _to_gumbel(torch.stack(words).gather(0, (tokens & 3).unsqueeze(0)).squeeze(0))


def uniform(seed: int, counters: Tensor) -> Tensor:
    """Return numbers above 0 and below 1, (n,) fp64 with 52 bits; `counters` (n, 4) int64 are Philox's."""
    words = _philox(counters[:, 0], counters[:, 1:], seed)
    return ((words[0] >> 6) * 2.0**26 + (words[1] >> 6)).double().add_(0.5).mul_(2.0**-52)


def _to_gumbel(bits: Tensor) -> Tensor:
    uniform = (bits >> 9).float().add_(0.5).mul_(2.0**-23)
    return uniform.log_().neg_().log_().neg_()


def _philox(c0: Tensor, others: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The words at counters c0 (n,) and `others` (n, 3), int64 (n,)."""
    c0, (c1, c2, c3) = c0.clone(), (other.clone() for other in others.unbind(-1))
    product0, product1 = torch.empty_like(c0), torch.empty_like(c0)
    key0, key1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        torch.mul(c0, 0xD2511F53, out=product0)  # int64 wraps around; the 64 bits are right
        torch.mul(c2, 0xCD9E8D57, out=product1)
        torch.bitwise_right_shift(product1, 32, out=c0).bitwise_and_(_LOW).bitwise_xor_(c1).bitwise_xor_(key0)
        torch.bitwise_right_shift(product0, 32, out=c2).bitwise_and_(_LOW).bitwise_xor_(c3).bitwise_xor_(key1)
        torch.bitwise_and(product1, _LOW, out=c1)
        torch.bitwise_and(product0, _LOW, out=c3)
        key0, key1 = (key0 + 0x9E3779B9) & _LOW, (key1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3
