"""Factors of low rank nearest to a matrix: by all its singular values, or by the first of them where it is large."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Measured on two cores: up to here the exact decomposition takes a second or less.
_EXACT_SIZE = 1024
_OVERSAMPLING = 16
_NUM_ITERATIONS = 4

Svd = tuple[Tensor, Tensor, Tensor]
"""Left (rows, n), singular values (n,), right (n, columns)."""


def is_exact(shape: Sequence[int]) -> bool:
    """Return whether all singular values of a matrix of this shape are computed."""
    return min(shape) <= _EXACT_SIZE


@dataclass(frozen=True)
class Truncated:
    """Factors left (rows, r), right (r, columns) near a matrix, and the share of its energy ‖·‖_F² that they keep.

    The share is measured. `bound`: None where the singular values are exact. Otherwise σ_max of what is left out is at
    most `bound` times that of the best factors of rank r, in expectation (Halko, Martinsson and Tropp 2011, theorem 9.3
    with corollary 10.10).
    """

    left: Tensor
    right: Tensor
    energy: float
    bound: float | None


def truncate(matrix: Tensor, *, rank: int | None, energy: float | None, whole: Svd | None = None) -> Truncated:
    """Return factors whose product is nearest to `matrix`, on its device.

    r is `rank`, or the smallest that keeps the share `energy` of ‖matrix‖_F². The singular values are halved between
    the factors (√σ each). Large matrices are decomposed at random, with a fixed seed (Halko,
    Martinsson and Tropp, SIAM Review 53(2), 2011, algorithm 5.1): within 1 % of the smallest error even where the
    singular values do not decay, and then with a few more of them than `energy` needs. `whole`: all singular values and
    vectors, where they are known.
    """
    total = matrix.double().square().sum().item()
    wanted = float(energy or 1.0) * total
    size = min(matrix.shape)
    tried = size if is_exact(matrix.shape) else 32 if rank is None else min(rank, size)
    while True:
        left, values, right = _decompose(matrix, tried) if whole is None else whole
        kept = values.double().square().cumsum(0)
        if rank is not None or kept[-1].item() >= wanted or len(values) == size:
            break
        tried *= 2
    if rank is None:
        rank = 1 + int((kept < wanted * (1 - 1e-7)).sum().item())
    rank = min(rank, len(values))
    root = values[:rank].sqrt()
    bound = None if len(values) == size else _expected_error(rank, len(values) - rank, size)
    share = min(kept[rank - 1].item() / total, 1.0)
    return Truncated(left[:, :rank] * root, root[:, None] * right[:rank], share, bound)


def _expected_error(rank: int, oversampling: int, size: int) -> float:
    """Return σ_max of the error of the randomised factors over σ_{rank + 1}, at most and in expectation."""
    basis = (
        1
        + math.sqrt(rank / (oversampling - 1))
        + math.e * math.sqrt((rank + oversampling) * (size - rank)) / (oversampling)
    )
    return float(1 + basis ** (1 / (2 * _NUM_ITERATIONS + 1)))


def _decompose(matrix: Tensor, rank: int) -> Svd:
    """Return `rank` singular values and a few more, or all where that is no dearer."""
    num_values = rank + _OVERSAMPLING
    if num_values > min(matrix.shape) // 4:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left, values, right
    with torch.random.fork_rng(devices=[matrix.device] if matrix.device.type == "cuda" else []):
        torch.manual_seed(0)
        left, values, right = torch.svd_lowrank(matrix, q=num_values, niter=_NUM_ITERATIONS)
    return left, values, right.T
