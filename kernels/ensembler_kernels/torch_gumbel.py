"""Draws by Philox-4x32-10 in integer tensors; `reference.gumbel` says which noise they are made of.

argmax(z + gumbel) is the argmax of exp(z) / e with e = −log u: an exponential race, which saves a logarithm.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
# Tokens below which the noise of several outputs is made at once: for more, one key for all tokens is faster.
_TOGETHER = 1 << 12
# Gumbel noise lies between −2.85 and 16.64: a token whose share of the best p is below this can never be drawn.
_LEAST = math.exp(-20.5)


def race(p: Tensor, best: Tensor, noise: Tensor) -> Tensor:
    """Return a draw from each row of probabilities `p` (n, V), (n,) int64; `best` (n, 1) are the largest.

    `noise` (n, 4) int64: seed, prompt, sample, position. That of equal rows is made once.
    """
    n, width = p.shape
    may = p >= _LEAST * best
    if int(may.sum()) * 4 > n * width:  # one block of Philox makes the noise of four tokens, so here all are as cheap
        streams, which = torch.unique(noise, dim=0, return_inverse=True) if n > 1 else (noise, None)
        few = max(1, _TOGETHER // width)
        waits = torch.cat([_waits(chunk, width) for chunk in torch.split(streams, few)])
        return (p / (waits if which is None else waits[which])).argmax(-1)
    row, token = may.nonzero(as_tuple=True)
    scores = torch.zeros_like(p)
    scores[row, token] = p[row, token] / _waits_at(noise[row], token)
    return scores.argmax(-1)


def _waits(noise: Tensor, width: int) -> Tensor:
    """Return −log u of every token, (n, width) fp32."""
    num_groups = (width + 3) // 4
    group = torch.arange(num_groups, device=noise.device).repeat(noise.shape[0])
    words = _philox(group, *_keys(noise.repeat_interleave(num_groups, 0) if noise.shape[0] > 1 else noise))
    return _to_waits(torch.stack([word >> 9 for word in words], dim=-1).view(noise.shape[0], -1)[:, :width])


def _waits_at(noise: Tensor, tokens: Tensor) -> Tensor:
    """Return −log u of one token (n,) each, (n,) fp32: what `_waits` has in the column of that token."""
    words = _philox(tokens >> 2, *_keys(noise))
    return _to_waits(torch.stack(words).gather(0, (tokens & 3).unsqueeze(0)).squeeze(0) >> 9)


def _keys(noise: Tensor) -> tuple[Tensor, Tensor]:
    """The counters (position, sample, prompt) and the seed that `noise` (n, 4) says."""
    return noise[:, 1:].flip(-1) & _LOW, noise[:, 0]


def uniform(seed: int, counters: Tensor) -> Tensor:
    """Return numbers above 0 and below 1, (n,) fp64 with 52 bits; `counters` (n, 4) int64 are Philox's."""
    words = _philox(counters[:, 0], counters[:, 1:], torch.tensor([seed], device=counters.device))
    return ((words[0] >> 6) * 2.0**26 + (words[1] >> 6)).double().add_(0.5).mul_(2.0**-52)


def _to_waits(bits: Tensor) -> Tensor:
    """−log u of 23 random bits: the upper ones of a word."""
    return bits.float().add_(0.5).mul_(2.0**-23).log_().neg_()


def _philox(c0: Tensor, others: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The words at counters c0 (n,) and `others` (n, 3) or (1, 3), int64 (n,); `seed` (n,) or (1,)."""
    c0, (c1, c2, c3) = c0.clone(), (other.expand_as(c0).clone() for other in others.unbind(-1))
    product0, product1 = torch.empty_like(c0), torch.empty_like(c0)
    key: Tensor | int = int(seed) if seed.numel() == 1 else seed
    key0, key1 = key & _LOW, (key >> 32) & _LOW
    for _ in range(10):
        torch.mul(c0, 0xD2511F53, out=product0)  # int64 wraps around; the 64 bits are right
        torch.mul(c2, 0xCD9E8D57, out=product1)
        torch.bitwise_right_shift(product1, 32, out=c0).bitwise_and_(_LOW).bitwise_xor_(c1).bitwise_xor_(key0)
        torch.bitwise_right_shift(product0, 32, out=c2).bitwise_and_(_LOW).bitwise_xor_(c3).bitwise_xor_(key1)
        torch.bitwise_and(product1, _LOW, out=c1)
        torch.bitwise_and(product0, _LOW, out=c3)
        key0, key1 = (key0 + 0x9E3779B9) & _LOW, (key1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3
