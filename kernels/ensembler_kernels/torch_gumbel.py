"""Gumbel noise by Philox-4x32-10, in place; `reference.gumbel` says which noise it is."""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_SPREAD = 20.5  # the noise lies between −2.85 and 16.64: a token this far below the best can never be drawn


def sample(scaled: Tensor, top: Tensor, seed: int, rows: Tensor) -> Tensor:
    """Return argmax(scaled + noise) of each row of `scaled` (n, V), (n,) int64.

    `top` (n,) holds the maxima, `rows` (n,) the numbers of the rows, on which the noise depends.
    """
    n, width = scaled.shape
    row, token = (scaled >= (top - _SPREAD).unsqueeze(-1)).nonzero(as_tuple=True)
    if row.numel() * 4 > n * width:  # one block of Philox makes the noise of four tokens, so here all are as cheap
        return (scaled + noise(seed, rows, width)).argmax(-1)
    words = _philox(token >> 2, rows[row], seed)
    bits = torch.stack(words).gather(0, (token & 3).unsqueeze(0)).squeeze(0)
    scores = torch.full_like(scaled, -torch.inf)
    scores[row, token] = scaled[row, token] + _to_gumbel(bits)
    return scores.argmax(-1)


def noise(seed: int, rows: Tensor, width: int) -> Tensor:
    """Return the noise of every token in rows of these numbers (n,), (n, width) fp32."""
    num_groups = (width + 3) // 4
    group = torch.arange(num_groups, device=rows.device).repeat(rows.shape[0])
    words = _philox(group, rows.repeat_interleave(num_groups), seed)
    return _to_gumbel(torch.stack(words, dim=-1).view(rows.shape[0], -1)[:, :width])


def _to_gumbel(bits: Tensor) -> Tensor:
    uniform = (bits >> 9).float().add_(0.5).mul_(2.0**-23)
    return uniform.log_().neg_().log_().neg_()


def _philox(c0: Tensor, c1: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The words at counters (c0, c1, 0, 0), int64 of their shape (n,)."""
    c0, c1, c2, c3 = c0.clone(), c1.clone(), torch.zeros_like(c0), torch.zeros_like(c0)
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
