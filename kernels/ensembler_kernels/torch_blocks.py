"""Blocks of outputs small enough to stay in a core's cache, and their combination in scratch that is reused.

What is not finite is found from the row maximum, which is needed anyway: a sum that holds +inf or NaN is where the
plain sum and the stated meaning may differ, and only such an output goes through the reference. −inf alone is right
as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ensembler_kernels import reference
from ensembler_kernels.weights import Weights

ELEMENTS_PER_THREAD = 1 << 16  # 256 KB of fp32: a block of two or three buffers fits the second-level cache
ELEMENTS_ON_DEVICE = 1 << 24  # elsewhere than on a CPU, launches count and caches do not
LANE = 128  # columns whose maximum is taken together; finding an argmax then reads one lane instead of the row


@dataclass(frozen=True)
class RuleWeights:
    """The numbers that outputs of one rule have in common, for members of certain widths.

    `held`: ids from here on are forbidden; `normalised`: the slope of each member that is normalised first.
    """

    constant: tuple[float, ...]
    slope: tuple[float, ...]
    normalised: tuple[float, ...]
    log_cutoff: float
    shared: int
    held: int
    width: int

    @property
    def cuts(self) -> bool:
        """Return whether a cut-off forbids tokens."""
        return self.log_cutoff > -math.inf


def rule_of(weights: Weights, numbers: Sequence[float], widths: Sequence[int]) -> RuleWeights:
    """Return the numbers of one row of the table, without α, for members of these widths."""
    num = weights.num_members
    constant, slope = tuple(numbers[:num]), tuple(numbers[num : 2 * num])
    normalises = weights.normalises(widths)
    normalised = tuple(s if normalises and not is_raw else 0.0 for s, is_raw in zip(slope, weights.raw, strict=True))
    held = min([weights.held_width(widths), *(width for width, c in zip(widths, constant, strict=True) if c)])
    return RuleWeights(
        constant,
        slope,
        normalised,
        numbers[-1] if weights.cuts else -math.inf,
        weights.shared_width(widths),
        held,
        weights.width(widths),
    )


def split_by_rule(weights: Weights) -> list[tuple[list[float], Tensor | None]]:
    """Return the different rows of the table, α aside, and which outputs have each; None: all of them."""
    table = weights.table
    if table.shape[0] < 2:
        return [(row, None) for row in table.tolist()]
    rules = table.clone()
    rules[:, -2] = 0.0
    if (rules == rules[0]).all():
        return [(rules[0].tolist(), None)]
    found, which = torch.unique(rules, dim=0, return_inverse=True)
    return [(row, (which == index).nonzero().squeeze(-1)) for index, row in enumerate(found.tolist())]


def flatten(logits: Sequence[Tensor]) -> list[Tensor]:
    """Return logits (rows · positions, V_i): views, but of slices that no view can flatten."""
    return [z.reshape(-1, z.shape[-1]) if z.dim() == 3 else z for z in logits]


def existing(indices: Tensor | None, num: int) -> tuple[Any, Tensor | None]:
    """Return indices below `num`, 0 in place of those that are not, and which these are; None: there are none."""
    if indices is None:
        return None, None
    missing = (indices < 0) | (indices >= num)
    return (indices.masked_fill(missing, 0), missing) if missing.any() else (indices, None)


def blocks(
    members: Sequence[Tensor], rows: Tensor | None, outputs: Tensor | None, width: int
) -> Iterator[tuple[slice | Tensor, list[Tensor]]]:
    """Yield which outputs and the members' rows (n, V_i) that they read, n being fit for the cache.

    `outputs` (K,): the outputs to take (None: all). Rows that follow one another are not copied.
    """
    if outputs is not None:
        rows = outputs if rows is None else rows[outputs]
    count = members[0].shape[0] if rows is None else rows.shape[0]
    size = rows_per_block(count, width, members[0].device)
    for start in range(0, count, size):
        here = slice(start, min(start + size, count))
        which = here if outputs is None else outputs[here]
        if rows is None:
            yield which, [z[here] for z in members]
            continue
        yield which, [z[_index(rows[here])] for z in members]


def _index(rows: Tensor) -> slice | Tensor:
    """`rows` as an index: a slice, which copies nothing, where they follow one another on a CPU."""
    if rows.device.type == "cpu":
        first, num = int(rows[0]), rows.shape[0]
        if num == 1 or torch.equal(rows, torch.arange(first, first + num, dtype=rows.dtype)):
            return slice(first, first + num)
    return rows.long()


def rows_per_block(rows: int, width: int, device: torch.device) -> int:
    """Return the number of rows of a width that are handled together."""
    elements = ELEMENTS_PER_THREAD * torch.get_num_threads() if device.type == "cpu" else ELEMENTS_ON_DEVICE
    return max(1, min(rows, elements // width))


class Scratch:
    """Named fp32 buffers (n, W) for blocks of one shape, made on first use; W is the width, up to a multiple of LANE.

    Columns from the width on are −inf, and whoever writes to a buffer leaves them so, or says that it does not.
    """

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        self.width = width
        self._shape = rows_per_block(rows, width, device), -(-width // LANE) * LANE
        self._device = device
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, rows: int) -> Tensor:
        """Return the first rows of a buffer (n, W)."""
        if name not in self._buffers:
            self._buffers[name] = torch.empty(self._shape, device=self._device)
            self._buffers[name][:, self.width :] = -math.inf
        return self._buffers[name][:rows]


def fill(block: Sequence[Tensor], rule: RuleWeights, alpha: Tensor, out: Tensor, ratio: Tensor) -> None:
    """Write the combination of a block (n, V_i) at `alpha` (n,) to `out` (n, V), fp32; `ratio` (n, >= V) is scratch.

    Values are those of the reference but where it forbids or replaces +inf and NaN: `mend` does that.
    """
    shared, held = rule.shared, rule.held
    anchor = _sole_member(block, rule.constant)
    if anchor is None or rule.cuts or shared < held or not any(rule.slope):
        anchor = None
        weighted_sum(block, rule.constant, out[:, :held])
    base = out[:, :held].clone() if rule.cuts else None
    if any(rule.slope):
        log_ratio(block, rule, ratio[:, :shared])
        term = ratio[:, :shared].mul_(alpha.unsqueeze(-1))  # not addcmul: the bits, and so the ties, of the reference
        first = out[:, :shared] if anchor is None else anchor[:, :shared]  # read as it is: saves a pass
        torch.add(first, term, out=out[:, :shared])
    if held < out.shape[-1]:
        out[:, held:] = -math.inf
    if base is not None:
        scores = base.masked_fill_(out[:, :held] == -math.inf, -math.inf)
        scores.masked_fill_(out[:, :held].isnan(), math.nan)  # then nothing is cut, and `mend` sees the NaN
        implausible = scores < scores.amax(-1, keepdim=True) + rule.log_cutoff
        out[:, :held].masked_fill_(implausible & (alpha != 0).unsqueeze(-1), -math.inf)


def _sole_member(block: Sequence[Tensor], constant: Sequence[float]) -> Tensor | None:
    """The fp32 member that the first sum consists of, or None if it is more than that."""
    used = [(z, weight) for z, weight in zip(block, constant, strict=True) if weight]
    return used[0][0] if len(used) == 1 and used[0][1] == 1 and used[0][0].dtype == torch.float32 else None


def mend(block: Sequence[Tensor], weights: Weights, which: Tensor, z: Tensor, largest: Tensor) -> bool:
    """Write outputs of `z` (n, V) anew by the reference where `largest` (n,) is +inf or NaN; return if there were any.

    `which` (n,): their rows in the table.
    """
    bad = [output for output, value in enumerate(largest.tolist()) if not value < math.inf]
    for output in bad:
        here = weights.replace_table(weights.table[which[output]].unsqueeze(0))
        z[output] = reference.combine([member[output : output + 1] for member in block], here)[0]
    return bool(bad)


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


def log_ratio(block: Sequence[Tensor], rule: RuleWeights, out: Tensor) -> None:
    """Write Σ slope · z to `out` (n, shared), of normalised members where the rule asks for it."""
    weighted_sum(block, rule.slope, out)
    for z, slope in zip(block, rule.normalised, strict=True):
        if slope:
            out.sub_(slope * z[:, : rule.shared].float().logsumexp(-1, keepdim=True))


def lane_maxima(z: Tensor) -> Tensor:
    """Return the maximum of every LANE columns of `z` (n, W), (n, W / LANE)."""
    return z.view(z.shape[0], -1, LANE).amax(-1)


def argmax(z: Tensor, lanes: Tensor) -> Tensor:
    """Return the lowest id with the largest value of each row of `z` (n, W), given its lane maxima, (n,) int64."""
    lane = lanes.argmax(-1, keepdim=True)
    inside = z.view(z.shape[0], -1, LANE).gather(1, lane.unsqueeze(-1).expand(-1, 1, LANE)).squeeze(1)
    return (lane * LANE).squeeze(-1).add_(inside.argmax(-1))
