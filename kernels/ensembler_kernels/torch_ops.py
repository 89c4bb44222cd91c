"""The operations in plain torch, block by block of rows: the CPU's, and any device's that has no other.

A block is read once from every member and worked on in place in scratch that stays in the cache; a call needs the
memory of its result and of a few blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ensembler_kernels import torch_grid, torch_gumbel
from ensembler_kernels.combination import Combination
from ensembler_kernels.torch_blocks import Scratch, argmax, blocks, fill, lane_maxima, mend


def unavailable(device: torch.device) -> None:
    """It runs everywhere."""
    return


def combine(logits: Sequence[Tensor], how: Combination, alpha: Tensor) -> Tensor:
    """`reference.combine`; `alpha` fp32 (rows,)."""
    result = torch.empty(logits[0].shape, device=logits[0].device)
    for members, alphas, out in _matrices(logits, alpha, result):
        scratch = Scratch(members)
        for rows, block in blocks(members):
            z, here = out[rows], alphas[rows]
            fill(block, how, here, z, scratch.take("ratio", z.shape[0]))
            mend(block, how, here, z, z.amax(-1))
    return result


def combine_sample(
    logits: Sequence[Tensor], how: Combination, alpha: Tensor, temperature: Tensor, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """`reference.combine_sample`; `alpha` and `temperature` fp32 (rows,), `seed` int64 ()."""
    scratch, key = Scratch(logits), int(seed)
    tokens, logprobs = torch.empty_like(alpha, dtype=torch.int64), torch.empty_like(alpha)
    for rows, block in blocks(logits):
        z, lanes = _combined(block, how, alpha[rows], scratch)
        top, token, warmth = lanes.amax(-1), argmax(z, lanes), temperature[rows]
        drawn = warmth.nonzero().squeeze(-1)
        if drawn.numel():
            divisor = warmth.masked_fill(warmth == 0, 1.0)
            z.div_(divisor.unsqueeze(-1))
            width = block[0].shape[-1]
            token[drawn] = torch_gumbel.sample(z[drawn, :width], (top / divisor)[drawn], key, drawn + rows.start)
        probabilities = torch.softmax(z, -1, out=scratch.take("ratio", z.shape[0]))
        logprobs[rows] = probabilities.gather(-1, token.unsqueeze(-1)).squeeze(-1).log_()
        tokens[rows] = token.masked_fill_(top == -torch.inf, -1)
    return tokens, logprobs


def combine_logprob(
    logits: Sequence[Tensor], how: Combination, alphas: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """`reference.combine_logprob`; `alphas` fp32 (K,), `targets` int64 (rows,)."""
    scratch, shape = Scratch(logits), (alphas.shape[0], targets.shape[0])
    logprobs = torch.empty(shape, device=targets.device)
    greedy = torch.empty(shape, dtype=torch.bool, device=targets.device)
    runs = torch_grid.runs(alphas.tolist())
    for rows, block in blocks(logits):
        for run in runs:
            found = None
            if run.stop - run.start > 1 and how.cutoff is None:  # what a cutoff forbids depends on α
                found = torch_grid.scored(block, how, alphas[run], targets[rows], scratch)
            found = _scored_exactly(block, how, alphas[run], targets[rows], scratch) if found is None else found
            logprobs[run, rows], greedy[run, rows] = found
    return logprobs, greedy


def _scored_exactly(
    block: Sequence[Tensor], how: Combination, alphas: Tensor, targets: Tensor, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """Log-probs and greedy flags (K, n) of a block (n, V_i), one α after another."""
    logprobs, greedy = [], []
    for alpha in alphas:
        z, lanes = _combined(block, how, alpha.expand(targets.shape[0]), scratch)
        best = argmax(z, lanes)
        probabilities = torch.softmax(z, -1, out=scratch.take("ratio", z.shape[0]))
        log_of_best = probabilities.gather(-1, best.unsqueeze(-1)).log_()  # a target's own may underflow
        below = z.gather(-1, targets.unsqueeze(-1)) - lanes.amax(-1, keepdim=True)
        logprobs.append((below + log_of_best).squeeze(-1))
        greedy.append(best == targets)
    return torch.stack(logprobs), torch.stack(greedy)


def _combined(block: Sequence[Tensor], how: Combination, alpha: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """The combination of a block in scratch, (n, W) fp32 with −inf from V on, and its lane maxima."""
    z, ratio = scratch.take("z", alpha.shape[0]), scratch.take("ratio", alpha.shape[0])
    inside = z[:, : scratch.width]
    z[:, scratch.width :] = -torch.inf  # the α grid leaves something else there
    fill(block, how, alpha, inside, ratio)
    lanes = lane_maxima(z)
    if mend(block, how, alpha, inside, lanes.amax(-1)):
        lanes = lane_maxima(z)
    return z, lanes


def _matrices(
    logits: Sequence[Tensor], alpha: Tensor, out: Tensor
) -> Iterator[tuple[Sequence[Tensor], Tensor, Tensor]]:
    """Yield logits, α and result as matrices, without a copy: as one, or position by position of a view."""
    if out.dim() == 2:
        yield logits, alpha, out
    elif all(z.stride(0) == z.stride(1) * z.shape[1] or 1 in z.shape[:2] for z in logits):
        positions = out.shape[1]
        yield [z.flatten(0, 1) for z in logits], alpha.repeat_interleave(positions), out.flatten(0, 1)
    else:
        for row in range(out.shape[0]):
            yield [z[row] for z in logits], alpha[row].expand(out.shape[1]), out[row]
