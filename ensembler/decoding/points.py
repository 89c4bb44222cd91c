"""The points of a grid: which rule at which α. Member logits depend on neither, so all points share the forwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ensembler_kernels import Combination

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


@dataclass(frozen=True)
class RulePoints:
    """The points of one rule: the logits of `roles`, in this order, are combined by `how` at each of `alphas`.

    `indices`: where the points stand in the grid.
    """

    roles: tuple[str, ...]
    how: Combination
    alphas: tuple[float, ...]
    indices: tuple[int, ...]


def make_grid(rules: Sequence[str], alphas: Sequence[float]) -> list[GridPoint]:
    """Return every rule at every α, the points of a rule one behind the other."""
    return [GridPoint(rule, alpha) for rule in rules for alpha in alphas]


def points_by_rule(
    grid: Sequence[GridPoint], own: Rule, contract: VocabularyContract, outside: str
) -> list[RulePoints]:
    """Return the points of each rule together; `own` is the ensemble's rule, taken as it is, with its numbers.

    Raises ConfigError for no point, a point that is there twice, an unknown rule, one for other roles than the
    ensemble's, and for an α that the rule does not take.
    """
    if not grid:
        raise ConfigError("the grid is empty; give it at least one rule and one alpha")
    twice = next((point for index, point in enumerate(grid) if point in grid[:index]), None)
    if twice is not None:
        raise ConfigError(f"{twice.rule} at alpha {twice.alpha:g} is in the grid twice; leave one out")
    found = []
    for name in dict.fromkeys(point.rule for point in grid):
        rule = _find(name, own)
        indices = tuple(index for index, point in enumerate(grid) if point.rule == name)
        alphas = tuple(rule.check_alpha(grid[index].alpha) for index in indices)
        found.append(RulePoints(rule.roles, make_combination(rule, contract, outside), alphas, indices))
    return found


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
