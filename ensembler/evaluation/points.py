"""The points of a grid: which rule at which α. Member logits depend on neither, so all points share the forwards."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ensembler_kernels import Combination

from ensembler.errors import ConfigError
from ensembler.modeling import make_combination
from ensembler.rules import Rule
from ensembler.vocab import VocabularyContract


@dataclass(frozen=True)
class GridPoint:
    """One rule at one α. Raises ConfigError for an α that the rule does not take."""

    rule: Rule
    alpha: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", self.rule.check_alpha(self.alpha))


@dataclass(frozen=True)
class RulePoints:
    """The points of one rule: what is combined how, at which α, and where they stand in the grid."""

    roles: tuple[str, ...]
    how: Combination
    alphas: tuple[float, ...]
    indices: tuple[int, ...]


def make_grid(rules: Sequence[Rule], alphas: Sequence[float]) -> list[GridPoint]:
    """Return every rule at every α, the points of a rule one behind the other."""
    return [GridPoint(rule, alpha) for rule in rules for alpha in alphas]


def points_by_rule(grid: Sequence[GridPoint], contract: VocabularyContract, outside: str) -> list[RulePoints]:
    """Return the points of each rule together; raise ConfigError for none, or a rule of roles that are no members."""
    if not grid:
        raise ConfigError("the grid has no point; give one alpha or more")
    rules: list[Rule] = []
    for point in grid:
        if point.rule not in rules:
            _check_members(point.rule, contract.widths)
            rules.append(point.rule)
    found = []
    for rule in rules:
        indices = tuple(index for index, point in enumerate(grid) if point.rule == rule)
        alphas = tuple(grid[index].alpha for index in indices)
        found.append(RulePoints(rule.roles, make_combination(rule, contract, outside), alphas, indices))
    return found


def _check_members(rule: Rule, members: Collection[str]) -> None:
    missing = [role for role in rule.roles if role not in members]
    if missing:
        raise ConfigError(
            f"the rule {rule.name!r} needs {missing[0]}; the members are {', '.join(members)}: choose a rule of theirs"
        )
