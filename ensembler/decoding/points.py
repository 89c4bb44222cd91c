"""The points of a grid: which rule at which α. Member logits depend on neither, so all points share the forwards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from ensembler_kernels import Weights, combine
from torch import Tensor

from ensembler.errors import ConfigError
from ensembler.modeling import make_combination
from ensembler.rules import RULE_NAMES, RULES, Rule
from ensembler.vocab import VocabularyContract

_MOST_ALPHAS = 1000


@dataclass(frozen=True)
class GridPoint:
    """One point of a grid: a rule by name, and α."""

    rule: str
    alpha: float


def make_grid(rules: Sequence[str], alphas: Sequence[float]) -> list[GridPoint]:
    """Return every rule at every α, the points of a rule one behind the other."""
    return [GridPoint(rule, alpha) for rule in rules for alpha in alphas]


@dataclass(frozen=True)
class Grid:
    """Points with their weights: `roles` are the members in the order in which the weights take their logits."""

    points: tuple[GridPoint, ...]
    roles: tuple[str, ...]
    weights: Weights

    @classmethod
    def of(cls, points: Sequence[GridPoint], own: Rule, contract: VocabularyContract, outside: str) -> Grid:
        """Return the grid of `points`; `own` is the ensemble's rule, taken as it is, with its numbers.

        Raises ConfigError for no point, a point that is there twice, an unknown rule, one for other roles than the
        ensemble's, and for an α that the rule does not take.
        """
        if not points:
            raise ConfigError("the grid is empty; give it at least one rule and one alpha")
        twice = next((point for index, point in enumerate(points) if point in points[:index]), None)
        if twice is not None:
            raise ConfigError(f"{twice.rule} at alpha {twice.alpha:g} is in the grid twice; leave one out")
        numbers = []
        for name, run in groupby(points, key=lambda point: point.rule):
            rule = _find(name, own)
            alphas = [rule.check_alpha(point.alpha) for point in run]
            numbers.append((make_combination(rule, contract, outside, own.roles), alphas))
        return cls(tuple(points), own.roles, Weights.of(*numbers))

    def __len__(self) -> int:
        return len(self.points)

    def on(self, device: torch.device) -> Grid:
        """Return the same grid for logits on a device."""
        return self if self.weights.table.device == device else replace(self, weights=self.weights.to(device))

    def ordered(self, logits: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the logits of all members, by role, in the order that the weights take."""
        return [logits[role] for role in self.roles]

    def combine(self, logits: Mapping[str, Tensor]) -> Tensor:
        """Return combined logits (points, rows, V) fp32 at all points, in one launch.

        `logits` (rows, V_member) by role. Each is the arithmetic of the ensemble at that point alone, bit for bit.
        """
        ordered = self.ordered(logits)
        num = ordered[0].shape[0]
        rows = torch.arange(num, dtype=torch.int32, device=ordered[0].device).repeat(len(self))
        combined = combine(ordered, self.weights.replace_table(self.weights.table.repeat_interleave(num, 0)), rows)
        return combined.view(len(self), num, -1)


def _find(name: str, own: Rule) -> Rule:
    if name == own.name:
        return own
    if name not in RULES:
        raise ConfigError(f"unknown rule {name!r}; expected one of: {', '.join(RULE_NAMES)}")
    rule, members = RULES[name], set(own.roles)
    if set(rule.roles) != members:
        raise ConfigError(
            f"the rule {name!r} combines {', '.join(sorted(rule.roles))}; the members are {', '.join(sorted(members))}"
            ": leave this rule out, or give such members"
        )
    return rule


def parse_alphas(text: str) -> tuple[float, ...]:
    """Return the numbers of FIRST:LAST:STEP, both ends among them, or of A,B,...; raise ConfigError."""
    parts = text.split(":")
    try:
        numbers = [float(part) for part in (parts if len(parts) > 1 else text.split(","))]
    except ValueError:
        numbers = []
    if not numbers or not all(map(math.isfinite, numbers)) or len(parts) not in (1, 3):
        raise ConfigError(f"the alphas {text!r} are no grid; expected FIRST:LAST:STEP as 0:1.5:0.1, or 0,0.5,1")
    if len(parts) == 1:
        return tuple(numbers)
    first, last, step = numbers
    if step <= 0 or last < first:
        raise ConfigError(f"the alphas {text!r} are empty; expected FIRST:LAST:STEP with a step above 0, upwards")
    num = math.floor((last - first) / step + 1e-9) + 1
    if num > _MOST_ALPHAS:
        raise ConfigError(f"the alphas {text!r} are {num:,} numbers; give at most {_MOST_ALPHAS:,}")
    return tuple(round(first + index * step, 10) + 0.0 for index in range(num))
