"""Blocks of rows small enough to stay in a core's cache, and the combination of one block in scratch that is reused.

What is not finite is found from the row maximum, which is needed anyway: a sum that holds +inf or NaN is where the
plain sum and the stated meaning may differ, and only such a row goes through the reference. −inf alone is right as is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ensembler_kernels import reference
from ensembler_kernels.combination import Combination

ELEMENTS_PER_THREAD = 1 << 16  # 256 KB of fp32: a block of two or three buffers fits the second-level cache
ELEMENTS_ON_DEVICE = 1 << 24  # elsewhere than on a CPU, launches count and caches do not
LANE = 128  # columns whose maximum is taken together; finding an argmax then reads one lane instead of the row


def blocks(logits: Sequence[Tensor]) -> Iterator[tuple[slice, list[Tensor]]]:
    """Yield row slices and the members' rows (n, V_i) in them, n being fit for the cache."""
    rows = logits[0].shape[0]
    size = rows_per_block(logits[0])
    for start in range(0, rows, size):
        here = slice(start, min(start + size, rows))
        yield here, [z[here] for z in logits]


def rows_per_block(anchor: Tensor) -> int:
    """The number of rows of `anchor` (rows, V) that are handled together."""
    rows, width = anchor.shape
    on_cpu = anchor.device.type == "cpu"
    elements = ELEMENTS_PER_THREAD * torch.get_num_threads() if on_cpu else ELEMENTS_ON_DEVICE
    return max(1, min(rows, elements // width))


class Scratch:
    """Named fp32 buffers (n, W) for blocks of one shape, made on first use; W is the width, up to a multiple of LANE.

    Columns from the width on are −inf, and whoever writes to a buffer leaves them so, or says that it does not.
    """

    def __init__(self, logits: Sequence[Tensor]) -> None:
        self.width = logits[0].shape[-1]
        self._shape = rows_per_block(logits[0]), -(-self.width // LANE) * LANE
        self._device = logits[0].device
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, rows: int) -> Tensor:
        """Return the first rows of a buffer (n, W)."""
        if name not in self._buffers:
            self._buffers[name] = torch.empty(self._shape, device=self._device)
            self._buffers[name][:, self.width :] = -math.inf
        return self._buffers[name][:rows]


def fill(block: Sequence[Tensor], how: Combination, alpha: Tensor, out: Tensor, ratio: Tensor) -> None:
    """Write the combination of a block (n, V_i) at `alpha` (n,) to `out` (n, V), fp32; `ratio` (n, >= V) is scratch.

    Values are those of the reference but where it forbids or replaces +inf and NaN: `mend` does that.
    """
    shared, width, held = how.shared_width(block), block[0].shape[-1], how.held_width(block)
    base, differs = out[:, :shared], any(how.slope)
    anchor = block[0][:, :shared]
    if differs and anchor.dtype == torch.float32 and how.constant[0] == 1 and not any(how.constant[1:]):
        base = anchor  # saves a pass
    else:
        weighted_sum(block, how.constant, base)
    if differs:
        log_ratio(block, how, ratio[:, :shared])
        term = ratio[:, :shared].mul_(alpha.unsqueeze(-1))  # not addcmul: the bits, and so the ties, of the reference
        torch.add(base, term, out=out[:, :shared])
    if shared < held:
        weighted_sum([z[:, shared:held] for z in block], how.constant, out[:, shared:held])
    if held < width:
        out[:, held:width] = -math.inf
    if how.cutoff is not None:
        _cut(block[0], how.cutoff, alpha, out)


def mend(block: Sequence[Tensor], how: Combination, alpha: Tensor, z: Tensor, largest: Tensor) -> list[int]:
    """Write rows of `z` (n, V) anew by the reference where `largest` (n,) is +inf or NaN; return which they are."""
    for row in (bad := [row for row, value in enumerate(largest.tolist()) if not value < math.inf]):
        z[row] = reference.combine([member[row : row + 1] for member in block], how, alpha[row])[0]
    return bad


def weighted_sum(block: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
    """Write Σ weight · z to `out` (n, width), fp32; a weight of 1 leaves the bits of z as they are."""
    width = out.shape[-1]
    terms = [(z[:, :width], weight) for z, weight in zip(block, weights, strict=True) if weight]
    if not terms:
        out.zero_()
        return
    (first, weight), *others = terms
    if others and weight == 1 and first.dtype == others[0][0].dtype == torch.float32:
        torch.add(first, others[0][0], alpha=others[0][1], out=out)
        del others[0]
    else:
        out.copy_(first)  # converts: arithmetic on bf16 inputs would round to bf16 before it is written
        if weight != 1:
            out.mul_(weight)
    for z, weight in others:
        out.add_(z, alpha=weight)


def log_ratio(block: Sequence[Tensor], how: Combination, out: Tensor) -> None:
    """Write Σ slope · z to `out` (n, shared), of normalised members where `how` asks for it."""
    weighted_sum(block, how.slope, out)
    if how.normalises(block):
        shared = out.shape[-1]
        for z, slope in zip(block, how.normalised_slope, strict=True):
            if slope:
                out.sub_(slope * z[:, :shared].float().logsumexp(-1, keepdim=True))


def lane_maxima(z: Tensor) -> Tensor:
    """Return the maximum of every LANE columns of `z` (n, W), (n, W / LANE)."""
    return z.view(z.shape[0], -1, LANE).amax(-1)


def argmax(z: Tensor, lanes: Tensor) -> Tensor:
    """Return the lowest id with the largest value of each row of `z` (n, W), given its lane maxima, (n,) int64."""
    lane = lanes.argmax(-1, keepdim=True)
    inside = z.view(z.shape[0], -1, LANE).gather(1, lane.unsqueeze(-1).expand(-1, 1, LANE)).squeeze(1)
    return (lane * LANE).squeeze(-1).add_(inside.argmax(-1))


def _cut(anchor: Tensor, cutoff: float, alpha: Tensor, z: Tensor) -> None:
    """Forbid in `z` what `anchor` finds implausible, in rows with α ≠ 0."""
    scores = anchor.to(torch.float32, copy=True).masked_fill_(z == -math.inf, -math.inf)
    implausible = scores < scores.amax(-1, keepdim=True) + math.log(cutoff)
    z.masked_fill_(implausible & (alpha != 0).unsqueeze(-1), -math.inf)
