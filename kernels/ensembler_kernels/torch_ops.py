"""The operations in plain torch, block by block of outputs: the CPU's, and any device's that has no other.

A block is read once from every member and worked on in place in scratch that stays in the cache; a call needs the
memory of its result and of a few blocks. Work of one rule is done together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ensembler_kernels import torch_grid, torch_gumbel
from ensembler_kernels.results import Sampled, Scored
from ensembler_kernels.torch_blocks import (
    RuleWeights,
    Scratch,
    argmax,
    blocks,
    existing,
    fill,
    flatten,
    lane_maxima,
    mend,
    rule_of,
    split_by_rule,
)
from ensembler_kernels.weights import Weights


def unavailable(device: torch.device) -> None:
    """It runs everywhere."""
    return


def combine(logits: Sequence[Tensor], weights: Weights, rows: Tensor | None) -> Tensor:
    """`reference.combine`."""
    members = flatten(logits)
    work = _Work(members, weights, rows)
    result = torch.empty(work.outputs, work.width, device=members[0].device)
    for which, block, rule in work:
        in_place = isinstance(which, slice)
        z = result[which] if in_place else work.scratch.take("z", len(block[0]))[:, : work.width]
        fill(block, rule, work.alphas(which), z, work.scratch.take("ratio", len(z)))
        mend(block, weights, work.table_rows(which), z, z.amax(-1))
        if not in_place:
            result[which] = z
    return work.mark_missing(result)


def combine_sample(
    logits: Sequence[Tensor],
    weights: Weights,
    rows: Tensor | None,
    temperature: Tensor | None,
    noise: Tensor | None,
) -> Sampled:
    """`reference.combine_sample`."""
    members = flatten(logits)
    work = _Work(members, weights, rows)
    device = members[0].device
    tokens = torch.empty(work.outputs, dtype=torch.int64, device=device)
    logprobs = torch.empty(work.outputs, device=device)
    for which, block, rule in work:
        z, lanes = _combined(block, rule, which, work)
        top, token = lanes.amax(-1), argmax(z, lanes)
        warmth = None if noise is None or temperature is None else temperature.expand(work.outputs)[which]
        if warmth is not None:
            z.div_(warmth.masked_fill(warmth == 0, 1.0).unsqueeze(-1))
        p = torch.softmax(z, -1, out=work.scratch.take("ratio", len(z)))
        if warmth is not None and noise is not None:
            best = p.gather(-1, token.unsqueeze(-1))
            drawn = warmth.nonzero().squeeze(-1)
            here = slice(None) if drawn.numel() == len(z) else drawn
            token[here] = torch_gumbel.race(p[here, : work.width], best[here], noise[which][here])
        logprobs[which] = p.gather(-1, token.unsqueeze(-1)).squeeze(-1).log_()
        tokens[which] = token.masked_fill_(top == -math.inf, -1)
    return Sampled(tokens, work.mark_missing(logprobs))


def combine_logprob(
    logits: Sequence[Tensor], weights: Weights, targets: Tensor, rows: Tensor | None, log_z: bool
) -> Scored:
    """`reference.combine_logprob`."""
    members = flatten(logits)
    widths = [z.shape[-1] for z in members]
    rows, missing = existing(rows, members[0].shape[0])
    targets, no_ids = existing(targets, weights.width(widths))
    shape, device, width = (len(weights), targets.shape[0]), targets.device, weights.width(widths)
    logprobs, totals = torch.empty(shape, device=device), torch.empty(shape, device=device)
    greedy = torch.empty(shape, dtype=torch.bool, device=device)
    scratch = Scratch(targets.shape[0], width, device)
    table = weights.table.tolist()
    runs = [(run, rule_of(weights, table[run.first], widths)) for run in weights.runs]
    for which, block in blocks(members, rows, None, width):
        for run, rule in runs:
            points = slice(run.first, run.first + run.count)
            found = None
            if run.step and not rule.cuts:  # what a cut-off forbids depends on α
                found = torch_grid.scored(block, rule, weights.alphas[points], targets[which], scratch)
            if found is None:
                found = _scored_exactly(block, rule, weights, points, targets[which], scratch)
            logprobs[points, which], greedy[points, which], totals[points, which] = found
    if missing is not None:
        totals[:, missing] = math.nan
    for absent in (missing, no_ids):
        if absent is not None:
            logprobs[:, absent], greedy[:, absent] = math.nan, False
    if not log_z:
        return Scored(logprobs, greedy, None)
    log_sums = [torch.cat([chunk.float().logsumexp(-1) for chunk in torch.split(z, 64)]) for z in members]
    return Scored(logprobs, greedy, totals - weights.log_normalisers(torch.stack(log_sums, 1), rows, widths))


class _Work:
    """The outputs of a call by rule, in blocks: iterating gives (which outputs, their members' rows, the rule)."""

    def __init__(self, members: Sequence[Tensor], weights: Weights, rows: Tensor | None) -> None:
        self._members, self.weights = members, weights
        self._rows, self._missing = existing(rows, members[0].shape[0])
        widths = [z.shape[-1] for z in members]
        self.width = weights.width(widths)
        self.outputs = members[0].shape[0] if rows is None else rows.shape[0]
        self.scratch = Scratch(self.outputs, self.width, members[0].device)
        self._rules = [(rule_of(weights, numbers, widths), outputs) for numbers, outputs in split_by_rule(weights)]

    def __iter__(self) -> Iterator[tuple[slice | Tensor, list[Tensor], RuleWeights]]:
        for rule, outputs in self._rules:
            for which, block in blocks(self._members, self._rows, outputs, self.width):
                yield which, block, rule

    def mark_missing(self, result: Tensor) -> Tensor:
        """Write NaN to what outputs without a row got, and return it."""
        if self._missing is not None:
            result[self._missing] = math.nan
        return result

    def table_rows(self, which: slice | Tensor) -> Tensor:
        """Return the row of the table of each output, (n,)."""
        everything = torch.arange(self.outputs, device=self.weights.table.device)[which]
        return torch.zeros_like(everything) if len(self.weights) == 1 else everything

    def alphas(self, which: slice | Tensor) -> Tensor:
        """Return α of each output, (n,)."""
        return self.weights.alphas.expand(self.outputs)[which]


def _combined(block: Sequence[Tensor], rule: RuleWeights, which: slice | Tensor, work: _Work) -> tuple[Tensor, Tensor]:
    """The combination of a block in scratch, (n, W) fp32 with −inf from V on, and its lane maxima."""
    num = block[0].shape[0]
    z, ratio = work.scratch.take("z", num), work.scratch.take("ratio", num)
    fill(block, rule, work.alphas(which), z[:, : work.width], ratio)
    z[:, work.width :] = -math.inf
    lanes = lane_maxima(z)
    if mend(block, work.weights, work.table_rows(which), z[:, : work.width], lanes.amax(-1)):
        lanes = lane_maxima(z)
    return z, lanes


def _scored_exactly(
    block: Sequence[Tensor], rule: RuleWeights, weights: Weights, points: slice, targets: Tensor, scratch: Scratch
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, greedy flags and log Σ exp z, (K, n), of a block (n, V_i), one point after another."""
    num, found = targets.shape[0], []
    for point in range(points.start, points.stop):
        z, ratio = scratch.take("z", num), scratch.take("ratio", num)
        fill(block, rule, weights.alphas[point].expand(num), z[:, : scratch.width], ratio)
        z[:, scratch.width :] = -math.inf  # the recurrence leaves something else there
        lanes = lane_maxima(z)
        which = torch.full((num,), point, device=targets.device)
        if mend(block, weights, which, z[:, : scratch.width], lanes.amax(-1)):
            lanes = lane_maxima(z)
        top, best = lanes.amax(-1), argmax(z, lanes)
        below = z.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - top
        p = torch.softmax(z, -1, out=ratio)
        log_total = p.gather(-1, best.unsqueeze(-1)).squeeze(-1).log_().neg_()  # a target's own p may underflow
        logprob = below - log_total
        found.append((logprob, (best == targets) & ~logprob.isnan(), top + log_total))
    logprobs, greedy, totals = zip(*found, strict=True)
    return torch.stack(logprobs), torch.stack(greedy), torch.stack(totals)
