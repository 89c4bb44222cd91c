"""Log-probs of an equally spaced α grid: one multiplication per α and token in place of an exponential.

With a = Σ constant · z and d = Σ slope · z, the sum over tokens that α_k = α_0 + k·δ needs is that of

    exp(a + α_k d) = exp(a + α_0 d) · exp(δ d)^k.

The largest logit M(α) of a row is convex in α, so it lies below its chord over the grid: relative to the chord no term
exceeds 1 and nothing overflows. What underflows is checked. The same convexity finds M(α) for all α from few tokens:
one that is nowhere above the best token of the first α, or of the last, is nowhere the largest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ensembler_kernels.torch_blocks import LANE, RuleWeights, Scratch, argmax, lane_maxima, log_ratio, weighted_sum

_LOG2E = math.log2(math.e)  # torch's exp2 takes a quarter of the time of its exp
_MATTERS = -83.0  # log2 of the smallest term that counts, where the sum itself is at least 2**_SMALLEST_SUM
_SMALLEST_SUM = -58.0
_NORMAL = -110.0  # log2 of a term that is still far from underflow (2**-126)


def scored(
    block: Sequence[Tensor], rule: RuleWeights, alphas: Tensor, targets: Tensor, scratch: Scratch
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return log-probs, greedy flags and log Σ exp z, (K, n), of a block (n, V_i), or None where only exact will do.

    `alphas` (K,), K >= 2, is equally spaced. None: something is not finite, or matters and would underflow.
    """
    a, d, first, last = (scratch.take(name, targets.shape[0]) for name in ("base", "ratio", "z", "last"))
    _split(block, rule, a, d)
    torch.add(a, d, alpha=float(alphas[0]), out=first)
    torch.add(a, d, alpha=float(alphas[-1]), out=last)
    lanes = lane_maxima(first), lane_maxima(last)
    tops = lanes[0].amax(-1), lanes[1].amax(-1)
    if not (tops[0].isfinite() & tops[1].isfinite()).all():
        return None
    largest, best = _largest(a, d, alphas, first, last, lanes)

    rise = (tops[1] - tops[0]) / (alphas.shape[0] - 1)
    chord = tops[0] + torch.arange(alphas.shape[0], device=rise.device).unsqueeze(-1) * rise.double()
    held = rule.held
    if ((largest - chord) * _LOG2E < _SMALLEST_SUM).any() or _underflows(first[:, :held], last[:, :held], tops):
        return None
    sums = _sums(first, d, alphas, rise, last)
    if not sums.isfinite().all():
        return None
    chosen = targets.unsqueeze(-1)
    logits = a.gather(-1, chosen).T.double() + alphas.double().unsqueeze(-1) * d.gather(-1, chosen).T.double()
    totals = chord + sums.double().log()
    return (logits - totals).clamp_(max=0.0).float(), best == targets, totals.float()


def _split(block: Sequence[Tensor], rule: RuleWeights, a: Tensor, d: Tensor) -> None:
    """Write Σ constant · z to `a` and the log-ratio to `d`, (n, W) fp32; ids that are forbidden keep −inf and 0."""
    weighted_sum(block, rule.constant, a[:, : rule.held])
    a[:, rule.held :] = -math.inf
    log_ratio(block, rule, d[:, : rule.shared])
    d[:, rule.shared :] = 0.0


def _largest(
    a: Tensor, d: Tensor, alphas: Tensor, first: Tensor, last: Tensor, lanes: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the largest logit under each α, (K, n), and the lowest id that has it, (K, n), from lanes that may."""
    n = a.shape[0]
    bar_first = first.gather(-1, argmax(last, lanes[1]).unsqueeze(-1))
    bar_last = last.gather(-1, argmax(first, lanes[0]).unsqueeze(-1))
    may = (lanes[0] >= bar_first - _slack(bar_first)) & (lanes[1] >= bar_last - _slack(bar_last))
    lane = may.any(0).nonzero().squeeze(-1)
    here_a, here_d = (buffer.view(n, -1, LANE)[:, lane].view(n, -1) for buffer in (a, d))
    here = here_a + alphas.view(-1, 1, 1) * here_d
    inside = here.argmax(-1)
    largest = here.gather(-1, inside.unsqueeze(-1)).squeeze(-1)
    return largest, lane[inside // LANE] * LANE + inside % LANE


def _slack(bar: Tensor) -> Tensor:
    """Return the distance below `bar` at which rounding may have put a logit."""
    return 1e-3 + 1e-5 * bar.abs()


def _underflows(first: Tensor, last: Tensor, tops: tuple[Tensor, Tensor]) -> bool:
    """Return whether a token starts where exp underflows but comes to matter; `first` becomes log2 of its terms."""
    first.sub_(tops[0].unsqueeze(-1)).mul_(_LOG2E)
    if first.amin() >= _NORMAL:
        return False
    matters = last > (tops[1] + _MATTERS / _LOG2E).unsqueeze(-1)
    return bool((matters & (first < _NORMAL)).any())


def _sums(terms: Tensor, d: Tensor, alphas: Tensor, rise: Tensor, factor: Tensor) -> Tensor:
    """Return Σ exp(z(α_k) − chord_k) over each row, (K, n), from log2 of the first terms; `factor` is scratch."""
    num = alphas.shape[0]
    step = float(alphas[-1].double() - alphas[0].double()) / (num - 1)
    torch.mul(d, step * _LOG2E, out=factor).sub_((rise * _LOG2E).unsqueeze(-1)).exp2_()
    terms.exp2_()
    sums = torch.empty(num, terms.shape[0], device=terms.device)
    for k in range(num):
        if k:
            terms.mul_(factor)
        torch.sum(terms, -1, out=sums[k])
    return sums
