"""The points of a grid: which rule at which α. Member logits depend on neither, so all points share the forwards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby

import torch
from ensembler_kernels import Combination, Weights, combine
from torch import Tensor

from ensembler.errors import ConfigError
from ensembler.rules import Rule, find_rule
from ensembler.vocab import VocabularyContract


@dataclass(frozen=True)
class GridPoint:
    """One point of a grid: a rule by name, and α."""

    rule: str
    alpha: float


def make_grid(rules: Sequence[str], alphas: Sequence[float]) -> list[GridPoint]:
    """Return every rule at every α, the points of a rule one behind the other; raise ConfigError for no lists."""
    if isinstance(rules, str) or not isinstance(alphas, Sequence):
        raise ConfigError(f"a grid was asked for of {rules!r} and {alphas!r}; give lists: ['base-change'] and [0.5]")
    return [GridPoint(rule, alpha) for rule in rules for alpha in alphas]


@dataclass(frozen=True)
class Grid:
    """Points with their weights: `roles` are the members in the order in which the weights take their logits.

    `runs`: each rule with its α, in the order of the points.
    """

    points: tuple[GridPoint, ...]
    roles: tuple[str, ...]
    weights: Weights
    runs: tuple[tuple[Rule, tuple[float, ...]], ...] = ()

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
        runs = []
        for name, run in groupby(points, key=lambda point: point.rule):
            rule = _find(name, own)
            if contract.is_text and (rule.anchor != own.anchor or not rule.is_anchor_times_ratio):
                raise ConfigError(
                    f"the rule {name!r} writes in other tokens than {own.name!r}, since the members have different "
                    f"tokenizers; run it by itself (--rule {name})"
                )
            runs.append((rule, tuple(rule.check_alpha(point.alpha) for point in run)))
        numbers = [(make_combination(rule, contract, outside, own.roles), list(alphas)) for rule, alphas in runs]
        return cls(tuple(points), own.roles, Weights.of(*numbers), tuple(runs))

    @classmethod
    def of_alphas(cls, rule: Rule, roles: Sequence[str], combination: Combination, alphas: Sequence[float]) -> Grid:
        """Return the grid of one rule at `alphas`, any of them any number of times; `roles`: as in `combination`."""
        points = tuple(GridPoint(rule.name, float(alpha)) for alpha in alphas)
        return cls(points, tuple(roles), Weights.of((combination, list(alphas))), ((rule, tuple(alphas)),))

    def of_scores(self, role: str) -> Grid:
        """Return the grid, of one point, for logits that are combined already and come under the name of `role`."""
        return replace(self, roles=(role,), weights=Weights.of((Combination((1.0,), (0.0,)), 0.0)))

    def __len__(self) -> int:
        return len(self.points)

    def to(self, device: torch.device) -> Grid:
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


def make_combination(
    rule: Rule, contract: VocabularyContract, outside: str, roles: Sequence[str] | None = None
) -> Combination:
    """Return the numbers of a rule for `ensembler_kernels`, with members in the order of `roles` (None: the rule's)."""
    roles = rule.roles if roles is None else roles
    return Combination(
        constant=tuple(rule.constant.get(role, 0.0) for role in roles),
        slope=tuple(rule.slope.get(role, 0.0) for role in roles),
        shared=contract.shared,
        neutral=outside == "neutral",
        raw=tuple(role in rule.raw_roles for role in roles),
        cutoff=rule.cutoff,
        anchor=roles.index(rule.anchor),
    )


def weights_for(combination: Combination, alpha: float | Tensor, logits: Tensor) -> Weights:
    """Return the weights for `logits` (rows, V) or (rows, positions, V) at `alpha`, a number or one for each row."""
    if not isinstance(alpha, Tensor):
        make = _weights_of_number.__wrapped__ if torch.compiler.is_compiling() else _weights_of_number
        return make(combination, float(alpha), logits.device)  # a traced tensor must not be kept
    if alpha.dim() and logits.dim() == 3:
        alpha = alpha.repeat_interleave(logits.shape[1])
    return Weights.of((combination, alpha), device=logits.device)


def combine_members(
    logits: Mapping[str, Tensor], combination: Combination, alpha: float | Tensor, roles: Iterable[str]
) -> Tensor:
    """Return the combination of logits (rows, positions, V_member) by role, on the device of the first of `roles`.

    `combination` takes members in the order of `roles`.
    """
    ordered = [logits[role] for role in roles]
    ordered = [values.to(ordered[0].device) for values in ordered]
    return combine(ordered, weights_for(combination, alpha, ordered[0]))


@lru_cache(maxsize=64)
def _weights_of_number(combination: Combination, alpha: float, device: torch.device) -> Weights:
    """The same at every step of a text."""
    with torch.inference_mode(False):  # kept for calls that differentiate, too
        return Weights.of((combination, alpha), device=device)


def _find(name: str, own: Rule) -> Rule:
    if name == own.name:
        return own
    if name == "linear":
        raise ConfigError("the rule 'linear' has no numbers here; choose a rule whose numbers are fixed")
    rule, members = find_rule(name), set(own.roles)
    if set(rule.roles) != members:
        raise ConfigError(
            f"the rule {name!r} combines {', '.join(sorted(rule.roles))}; the members are {', '.join(sorted(members))}"
            ": leave this rule out, or give such members"
        )
    return rule
