"""The weights of outputs: one row of numbers for each, checked once, so that a call has nothing left to check."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ensembler_kernels.combination import Combination

LONGEST_RUN = 32
"""Points in one run: bounds the rounding error of the recurrence, and what a program keeps per run."""

_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Run:
    """Points `first` to `first + count - 1` of some weights: one rule, α that are `step` apart (0: unevenly)."""

    first: int
    count: int
    step: float


@dataclass(frozen=True, eq=False)
class Weights:
    """Numbers of outputs, made from rules and α by `of`, or from a table by `replace_table`.

    `table` (outputs, 2 · members + 2) fp32: constants, slopes, α, and the logarithm of the cut-off (−inf: none). One
    row counts for every output. `shared`, `neutral`, `raw` and `anchors` (the members whose widths the result must
    hold) are those of `Combination`, and of all rows; without `cuts` cut-offs of rows do not count. `rule_runs` split
    the rows by rule; None: each row is by itself.
    """

    table: Tensor
    num_members: int
    shared: int | None
    neutral: bool
    raw: tuple[bool, ...]
    anchors: tuple[int, ...]
    cuts: bool
    rule_runs: tuple[Run, ...] | None
    known: dict[object, Any] = field(default_factory=dict, repr=False)  # what calls found out about logits of a shape

    @classmethod
    def of(
        cls, *points: tuple[Combination, float | Sequence[float] | Tensor], device: torch.device | str = "cpu"
    ) -> Weights:
        """Return the weights of every rule at every one of its α: a number, several, or a tensor (K,).

        Rules of one call take the same members in one order and agree in `shared`, `neutral` and `raw`. Differentiable
        in α. Raises ValueError for rules that do not agree, for no point, and for an α that is not finite.
        """
        if not points:
            raise ValueError("expected at least one rule with its alphas, got none")
        if not all(isinstance(point, tuple) and isinstance(point[0], Combination) for point in points):
            raise ValueError(f"expected pairs (Combination, alphas), got {points}")
        rules = [rule for rule, _ in points]
        first = rules[0]
        for rule in rules:
            if (rule.shared, rule.neutral, rule.raw, len(rule.slope)) != (
                first.shared, first.neutral, first.raw, len(first.slope)
            ):  # fmt: skip
                raise ValueError(f"expected rules for the same members and vocabulary, got {first} and {rule}")
        grids = [_checked_alphas(alpha) for _, alpha in points]
        tables = [_table(rule, grid, torch.device(device)) for rule, grid in zip(rules, grids, strict=True)]
        table = torch.cat(tables) if len(tables) > 1 else tables[0]
        return cls(
            table=table,
            num_members=len(first.slope),
            shared=first.shared,
            neutral=first.neutral,
            raw=first.raw or (False,) * len(first.slope),
            anchors=tuple(dict.fromkeys(rule.anchor for rule in rules)),
            cuts=any(rule.cutoff is not None for rule in rules),
            rule_runs=_runs(grids),
        )

    @property
    def runs(self) -> tuple[Run, ...]:
        """The rows split by rule, for `combine_logprob`; rows of a table that was replaced are each by themselves."""
        return tuple(Run(k, 1, 0.0) for k in range(len(self))) if self.rule_runs is None else self.rule_runs

    def replace_table(self, table: Tensor) -> Weights:
        """Return weights with other rows on the same device, fp32 (outputs, 2 · members + 2).

        For rows that are made on a device, by index or per request: there nothing waits to see if they are finite.
        Raises ValueError for a table of another shape, dtype or device, and on a CPU for numbers that are not finite.
        """
        if table.dim() != 2 or table.shape[1] != self.table.shape[1] or table.dtype != torch.float32:
            shape = f"float32 (outputs, {self.table.shape[1]})"
            raise ValueError(f"weights: expected {shape}, got {table.dtype} {tuple(table.shape)}")
        if table.device != self.table.device:
            raise ValueError(f"weights: expected rows on {self.table.device}, got {table.device}")
        if table.device.type == "cpu" and not torch.compiler.is_compiling() and not table[:, :-1].isfinite().all():
            raise ValueError(f"weights: expected finite numbers, got {table[:, :-1].tolist()}")
        return replace(self, table=table.contiguous(), rule_runs=None)

    def to(self, device: torch.device | str) -> Weights:
        """Return the same weights on a device."""
        return replace(self, table=self.table.to(device), known={})

    def __len__(self) -> int:
        return self.table.shape[0]

    @property
    def alphas(self) -> Tensor:
        """α of every row, (outputs,)."""
        return self.table[:, 2 * self.num_members]

    def width(self, widths: Sequence[int]) -> int:
        """Return the number of ids of the result, given those of the members: those of the widest anchor."""
        return max(widths[anchor] for anchor in self.anchors)

    def shared_width(self, widths: Sequence[int]) -> int:
        """Return the number of ids that all members hold, given those of each."""
        return min(widths) if self.shared is None else min(self.shared, *widths)

    def held_width(self, widths: Sequence[int]) -> int:
        """Return the number of ids that may be permitted in any row: with `neutral` all, else the shared ones."""
        width = self.width(widths)
        return width if self.neutral else min(width, self.shared_width(widths))

    def limits(self, widths: Sequence[int]) -> tuple[int, ...]:
        """Return for each member the number of its ids that are read."""
        held = self.held_width(widths)
        return tuple(min(width, held) for width in widths)

    def normalises(self, widths: Sequence[int]) -> bool:
        """Return whether members of the log-ratio are normalised over the shared ids before they are combined."""
        return self.neutral and self.shared_width(widths) < self.width(widths) and not all(self.raw)

    def log_normalisers(self, log_sums: Tensor, rows: Tensor | None, widths: Sequence[int]) -> Tensor:
        """Return Σ_i w_i · log Σ exp z_i (K, outputs) over the distributions that z has not normalised, for log Z.

        `log_sums` (rows, members): log Σ exp of all ids of a member; `rows` (outputs,): the row that each output reads.
        """
        if rows is not None:
            log_sums = log_sums[rows.long().clamp(0, log_sums.shape[0] - 1)]
        constants, slopes = (self.table[:, start : start + self.num_members] for start in (0, self.num_members))
        rest = constants if self.normalises(widths) else constants + self.alphas.unsqueeze(1) * slopes
        total = self.table.new_zeros(len(self), log_sums.shape[0])
        for weight, log_sum, is_raw in zip(rest.unbind(1), log_sums.unbind(1), self.raw, strict=True):
            if not is_raw:
                weight = weight.unsqueeze(1)
                total = total + (weight * log_sum).masked_fill(weight == 0, 0.0)
        return total


def _checked_alphas(alpha: float | Sequence[float] | Tensor) -> Tensor:
    """Return α as fp32 (K,)."""
    if isinstance(alpha, Tensor):
        if alpha.dim() > 1 or not alpha.numel():
            raise ValueError(f"alphas: expected a number, or a grid of shape (K,), got shape {tuple(alpha.shape)}")
        if alpha.device.type == "cpu" and not torch.compiler.is_compiling() and not alpha.isfinite().all():
            raise ValueError(f"alphas: expected finite numbers, got {alpha.tolist()}")
        return alpha.reshape(-1).to(torch.float32)
    numbers = [float(number) for number in ([alpha] if isinstance(alpha, int | float) else alpha)]
    if not numbers:
        raise ValueError("alphas: expected a number, or a grid of shape (K,), got none")
    if not torch.compiler.is_compiling():  # a number that changes between calls is a symbol there
        for number in numbers:
            if math.isnan(number) or abs(number) > _LARGEST:
                raise ValueError(f"alphas: expected a finite float32 number, got {number}")
    return torch.tensor(numbers, dtype=torch.float32)


def _table(rule: Combination, alphas: Tensor, device: torch.device) -> Tensor:
    """Return the rows of one rule, fp32 (K, 2 · members + 2)."""
    cutoff = -math.inf if rule.cutoff is None else math.log(rule.cutoff)
    numbers = torch.tensor([*rule.constant, *rule.slope], dtype=torch.float32).expand(alphas.shape[0], -1).to(device)
    cutoffs = torch.full((alphas.shape[0], 1), cutoff, device=device)
    return torch.cat([numbers, alphas.to(device).unsqueeze(1), cutoffs], dim=1)


def _runs(grids: Sequence[Tensor]) -> tuple[Run, ...]:
    """Cut the α of each rule into runs of at most LONGEST_RUN points; equal steps where there are."""
    runs, start = [], 0
    for grid in grids:
        count = grid.shape[0]
        can_be_looked_at = grid.device.type == "cpu" and not torch.compiler.is_compiling()
        step = _step(grid.tolist()) if can_be_looked_at else 0.0
        runs += [
            Run(start + first, min(LONGEST_RUN, count - first), step if count - first > 1 else 0.0)
            for first in range(0, count, LONGEST_RUN)
        ]
        start += count
    return tuple(runs)


def _step(alphas: Sequence[float]) -> float:
    """Return the distance of equally spaced α, or 0."""
    if len(alphas) < 2:
        return 0.0
    step = (alphas[-1] - alphas[0]) / (len(alphas) - 1)
    slack = 4 * torch.finfo(torch.float32).eps * max(abs(alpha) for alpha in alphas)
    is_even = all(abs(alphas[0] + k * step - alpha) <= slack for k, alpha in enumerate(alphas))
    return step if is_even and abs(step) > 100 * slack else 0.0
