"""The points of a grid: a rule and an α each, all on the same members."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ensembler_kernels import Combination

from ensembler.errors import ConfigError
from ensembler.modeling import EnsembleForCausalLM, make_combination
from ensembler.rules import RULE_NAMES, RULES, Rule


@dataclass(frozen=True)
class GridPoint:
    """One setting of a grid: a rule by name, and α."""

    rule: str
    alpha: float


@dataclass(frozen=True)
class Setting:
    """What a point does to logits: those of `roles`, in this order, are combined by `how` at `alpha`."""

    roles: tuple[str, ...]
    how: Combination
    alpha: float


def make_settings(model: EnsembleForCausalLM, points: Sequence[GridPoint]) -> list[Setting]:
    """Return what each point does to the logits of the members of `model`.

    The model's own rule is taken as it is, with its numbers. Raises ConfigError for a point that is there twice, an
    unknown rule, one for other roles than the model's, and for an α that the rule does not take.
    """
    if not points:
        raise ConfigError("the grid is empty; give it at least one rule and one alpha")
    twice = next((point for index, point in enumerate(points) if point in points[:index]), None)
    if twice is not None:
        raise ConfigError(f"{twice.rule} at alpha {twice.alpha:g} is in the grid twice; leave one out")
    rules = {name: _find(model, name) for name in dict.fromkeys(point.rule for point in points)}
    hows = {name: make_combination(rule, model.contract, model.config.outside) for name, rule in rules.items()}
    return [
        Setting(rules[point.rule].roles, hows[point.rule], rules[point.rule].check_alpha(point.alpha))
        for point in points
    ]


def _find(model: EnsembleForCausalLM, name: str) -> Rule:
    if name == model.rule.name:
        return model.rule
    if name not in RULES:
        raise ConfigError(f"unknown rule {name!r}; expected one of: {', '.join(RULE_NAMES)}")
    rule, found = RULES[name], set(model.rule.roles)
    if set(rule.roles) != found:
        raise ConfigError(
            f"the rule {name!r} combines {', '.join(sorted(rule.roles))}; the members are {', '.join(sorted(found))}: "
            "leave this rule out, or give such members"
        )
    return rule
