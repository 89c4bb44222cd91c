"""The three operations: arguments are checked, an implementation is chosen by device and availability, and called.

`impl` names one of `implementations.MODULES` and always wins; None takes the fastest that can run where the logits
are. What the operations mean is written in `reference`, what an implementation has to offer in `implementations`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ensembler_kernels import custom_ops
from ensembler_kernels.checks import check_call, check_targets, per_output, rows_of
from ensembler_kernels.results import Sampled, Scored
from ensembler_kernels.weights import Weights


def combine(
    logits: Sequence[Tensor], weights: Weights, rows: Tensor | None = None, *, impl: str | None = None
) -> Tensor:
    """Return z = Σ_i constant_i · z_i + α · Σ_i slope_i · z_i of every output, fp32, in one launch.

    `logits`: (rows, V_i) or (rows, positions, V_i) per member, fp32, bf16 or fp16, any strides. `weights`: a row per
    output, or one for all. `rows` (outputs,): the row that each output reads, in any order; None: each row one output,
    and the result has the shape of the anchor; else (outputs, V). Differentiable in logits and weights. Raises
    ValueError for arguments that do not fit.
    """
    rows = check_call(logits, weights, rows)
    return custom_ops.combine(logits, weights, rows, impl)


def combine_sample(
    logits: Sequence[Tensor],
    weights: Weights,
    rows: Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    noise: Tensor | None = None,
    impl: str | None = None,
) -> Sampled:
    """Return one token per output and its log-prob, without writing z.

    With `noise` (outputs, 4) int64: seed, prompt, sample, position (`make_noise`), the token is drawn from
    softmax(z / temperature), of which it has the log-prob; a draw depends on the noise and on nothing else.
    `temperature`: a number, or (outputs,), 0: greedy; None: 1. Without noise: the most likely token, and its log-prob
    under softmax(z). Errors are values: token −1 where everything is forbidden, log-prob NaN where a member gave NaN
    (the token then means nothing); `check_sampled` raises for both. Not differentiable. Raises ValueError for arguments
    that do not fit.
    """
    rows = check_call(logits, weights, rows)
    if noise is None and temperature is not None:
        wanted = "expected noise=make_noise(seed, prompts) beside it to sample, or neither for the most likely token"
        raise ValueError(f"temperature is {temperature} and there is no noise: {wanted}")
    if noise is not None:
        temperature = 1.0 if temperature is None else temperature
        outputs = rows_of(logits) if rows is None else rows.shape[0]
        temperature, noise = per_output(temperature, noise, outputs, logits[0].device)
        return custom_ops.combine_sample(logits, weights, rows, temperature, noise, impl)
    return custom_ops.combine_sample(logits, weights, rows, None, None, impl)


def combine_logprob(
    logits: Sequence[Tensor],
    weights: Weights,
    targets: Tensor,
    rows: Tensor | None = None,
    *,
    log_z: bool = False,
    impl: str | None = None,
) -> Scored:
    """Return log softmax(z)[target] under each of K points, and whether the target is the argmax, from one read.

    `weights`: K rows, of any rules. `targets` (n,) int64; `rows` (n,): the row that each target reads (None: each its
    own). Returns (K, n) fp32 and bool; of equal logits the lowest id is the argmax. `log_z`: also the logarithm of
    Σ_v Π_i p_i(v)^w_i, 0 where members agree. Log-probs are differentiable. Errors are values: NaN, for which
    `check_scored` raises. Raises ValueError for arguments that do not fit.
    """
    rows = check_call(logits, weights, rows, per_point=True)
    targets = check_targets(targets, logits, weights, rows)
    return custom_ops.combine_logprob(logits, weights, targets, rows, log_z, impl)


def make_noise(
    seed: int,
    prompts: Tensor | Sequence[int],
    samples: Tensor | Sequence[int] | None = None,
    positions: Tensor | Sequence[int] | None = None,
) -> Tensor:
    """Return the noise of outputs, (outputs, 4) int64: seed, and the numbers of prompt, sample and position (0: None).

    Give the position of the token that is chosen: without it every step of a text is drawn with the same noise. Of each
    number 32 bits count, of the seed 64: those from 2⁶³ to 2⁶⁴ keep them. Raises ValueError for a seed of more bits.
    """
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected an integer of 64 bits, got {seed}")
    prompts = torch.as_tensor(prompts, dtype=torch.int64)
    others = (
        torch.zeros_like(prompts) if one is None else torch.as_tensor(one, dtype=torch.int64, device=prompts.device)
        for one in (samples, positions)
    )
    return torch.stack([torch.full_like(prompts, seed - 2**64 if seed >= 2**63 else seed), prompts, *others], dim=-1)
