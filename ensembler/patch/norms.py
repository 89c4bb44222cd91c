"""Sizes of updates: Frobenius norm, largest singular value and effective rank, from factors wherever there are any."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ensembler.extras import require

_DENSE_SIZE = 128  # below it a full decomposition is quicker than an iteration


@dataclass(frozen=True)
class Size:
    """‖·‖_F, σ_max, and the effective rank: exp of the entropy of σ / Σσ (Roy and Vetterli 2007); None: not taken."""

    frobenius: float
    sigma_max: float
    effective_rank: float | None = None


@dataclass(frozen=True)
class Factors:
    """Δ = left (rows, r) @ right (r, columns), fp32."""

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int | None:
        return self.right.shape[0]

    def added_to(self, weight: Tensor) -> Tensor:
        """Add Δ to an fp32 matrix in place and return it."""
        return weight.addmm_(self.left, self.right)

    def inner(self, matrix: Tensor) -> float:
        """⟨Δ, matrix⟩, the sum of the products of their elements."""
        return float(((self.left.T @ matrix).double() * self.right.double()).sum())

    def size(self) -> Size:
        """From an r × r problem: with left = Q₁R₁ and rightᵀ = Q₂R₂, Δ has the singular values of R₁R₂ᵀ."""
        first, second = (torch.linalg.qr(factor.double(), mode="r").R for factor in (self.left, self.right.T))
        values = torch.linalg.svdvals(first @ second.T)
        total = values.sum()
        if total == 0:
            return Size(0.0, 0.0, 0.0)
        entropy = torch.special.entr(values / total).sum()
        return Size(float(values.norm()), float(values[0]), float(entropy.exp()))


@dataclass(frozen=True)
class Dense:
    """Δ as a matrix (rows, columns), fp32."""

    values: Tensor

    @property
    def rank(self) -> int | None:
        return None

    def added_to(self, weight: Tensor) -> Tensor:
        """Add Δ to an fp32 matrix in place and return it."""
        return weight.add_(self.values)

    def inner(self, matrix: Tensor) -> float:
        """⟨Δ, matrix⟩, the sum of the products of their elements."""
        return float((self.values.double() * matrix.double()).sum())

    def size(self) -> Size:
        """‖·‖_F and σ_max of the matrix itself."""
        return size_of_matrix(self.values)


Update = Factors | Dense


def difference(first: Update, second: Update) -> Update:
    """first - second: two LoRAs give factors side by side, never their product."""
    if isinstance(first, Factors) and isinstance(second, Factors):
        return Factors(torch.cat([first.left, -second.left], 1), torch.cat([first.right, second.right]))
    dense = next(update.values for update in (first, second) if isinstance(update, Dense))
    return Dense(first.added_to(torch.zeros_like(dense)) - second.added_to(torch.zeros_like(dense)))


def size_of_matrix(matrix: Tensor) -> Size:
    """‖·‖_F and σ_max of a matrix (rows, columns), the latter by Lanczos iteration where the matrix is large."""
    return Size(float(matrix.double().norm()), _sigma_max(matrix))


def _sigma_max(matrix: Tensor) -> float:
    if not matrix.any():
        return 0.0  # an iteration would have nowhere to start
    if min(matrix.shape) <= _DENSE_SIZE:
        return float(torch.linalg.svdvals(matrix.double())[0])
    linalg = require("scipy.sparse.linalg", "eval")
    start = torch.ones(min(matrix.shape)).numpy()  # a fixed start, so that a run repeats
    return float(linalg.svds(matrix.numpy(), k=1, tol=1e-6, v0=start, return_singular_vectors=False)[0])
