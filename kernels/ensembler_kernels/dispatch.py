"""The three operations: arguments are checked, an implementation is chosen by device and availability, and called.

`impl` names one of `implementations.MODULES` and always wins; None takes the fastest that can run where the logits
are. What the operations mean is written in `reference`, what an implementation has to offer in `combination`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ensembler_kernels import custom_ops
from ensembler_kernels.checks import (
    check_logits,
    check_targets,
    check_temperature,
    checked_seed,
    per_grid,
    per_row,
)
from ensembler_kernels.combination import Combination


def combine(logits: Sequence[Tensor], how: Combination, alpha: float | Tensor, *, impl: str | None = None) -> Tensor:
    """Return z = Σ_i constant_i · z_i + α · Σ_i slope_i · z_i, fp32 of the anchor's shape.

    `logits`: (rows, V_i) or (rows, positions, V_i) per member, fp32, bf16 or fp16, any strides. `alpha`: a number, or
    (rows,). Differentiable in logits and alpha. Raises ValueError for arguments that do not fit.
    """
    check_logits(logits, how, dims=(2, 3))
    alpha = per_row("alpha", alpha, logits[0])
    return custom_ops.combine(list(logits), how, alpha, impl)


def combine_sample(
    logits: Sequence[Tensor],
    how: Combination,
    alpha: float | Tensor,
    *,
    temperature: float | Tensor,
    seed: int | Tensor,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return one token per row, drawn from softmax(z / temperature), and its log-prob, without writing z.

    `logits`: (rows, V_i) per member. `temperature`: a number or (rows,); 0 is greedy. A draw depends on (seed, row,
    token id) alone, so equal seeds give equal tokens. Returns (rows,) int64 and (rows,) fp32. Raises ValueError for
    arguments that do not fit, and for a row in which everything is −inf or that holds NaN.
    """
    check_logits(logits, how)
    check_temperature(temperature)
    alpha, temperature = per_row("alpha", alpha, logits[0]), per_row("temperature", temperature, logits[0])
    return custom_ops.combine_sample(list(logits), how, alpha, temperature, checked_seed(seed), impl)


def combine_logprob(
    logits: Sequence[Tensor],
    how: Combination,
    alphas: Sequence[float] | Tensor,
    targets: Tensor,
    *,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return log softmax(z(α_k))[target] for every α of a grid, and whether the target is the argmax.

    `logits`: (rows, V_i) per member, read once. `alphas`: (K,). `targets`: (rows,) int64. Returns (K, rows) fp32 and
    (K, rows) bool; of equal logits the lowest id is the argmax. Log-probs are differentiable in the logits. Raises
    ValueError for arguments that do not fit, and for a row in which everything is −inf or that holds NaN.
    """
    check_logits(logits, how)
    check_targets(targets, logits[0])
    alphas = per_grid(alphas, logits[0])
    return custom_ops.combine_logprob(list(logits), how, alphas, targets, impl)
