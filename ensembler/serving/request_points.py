"""Read the rule and α that a request asks for, and turn them into the weights of its tokens. It knows nothing of vLLM.

A request may name a rule for the members that are served, or a member's role: that member alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from functools import cached_property
from typing import Any

from ensembler_kernels import Weights

from ensembler.engine.grid import GridPoint, make_combination
from ensembler.errors import ConfigError, LogitsError, nearest
from ensembler.preflight import CheckedEnsemble
from ensembler.rules import RULES, Rule, load_plugins
from ensembler.vocab import end_ids

ALPHA, RULE = KEYS = ("alpha", "rule")
_LONGEST_KEY = 12  # beyond it nothing is taken for a misspelt one
FIXED_KEYS = ("cutoff", "constant", "slope", "outside")
_LARGEST = 3.4028234663852886e38  # of fp32, in which α is computed with


class ServedRules:
    """The rules that requests may ask for, and the point that they get by default.

    `own`: the folder's rule, with its numbers; `default`: the point of a request that names none. `names`: all rules
    for exactly these members, then the roles of members that can be served alone. `roles`: the order of the weights.
    `checked`: the members' files and vocabularies.
    """

    def __init__(self, checked: CheckedEnsemble, alpha: float | None = None) -> None:
        """`alpha`: that of requests which name none; by default the folder's."""
        load_plugins()
        self.checked = checked
        self.own: Rule = checked.config.get_rule()
        self.roles = self.own.roles
        self.default = GridPoint(self.own.name, check_alpha(self.own, checked.config.alpha if alpha is None else alpha))
        others = [rule.name for rule in RULES.values() if set(rule.roles) == set(self.roles)]
        alone = [role for role in self.roles if role not in self.own.raw_roles]
        self.names = tuple(dict.fromkeys((self.own.name, *others, *alone)))

    @cached_property
    def weights(self) -> Weights:
        """The weights of every name at α = 1: the pattern for tables of requests, `Weights.replace_table`."""
        config, contract = self.checked.config, self.checked.contract
        rules = [self.find(name) for name in self.names]
        return Weights.of(*((make_combination(rule, contract, config.outside, self.roles), 1.0) for rule in rules))

    @cached_property
    def width(self) -> int:
        """The number of ids of combined logits: that of the widest anchor of any name."""
        return self.weights.width([self.checked.contract.widths[role] for role in self.roles])

    @cached_property
    def failures(self) -> dict[int, str]:
        """Ids behind the vocabulary, one for each member: the only token where that member computed NaN."""
        return {self.width + number: role for number, role in enumerate(self.roles)}

    def check_stops(self, reasons: Collection[object]) -> None:
        """Raise LogitsError where the reason why a text stopped is the id of a member that computed NaN."""
        failed = [role for token, role in self.failures.items() if token in reasons]
        if failed:
            raise LogitsError(
                f"{failed[0]} computed NaN logits, which ended this request; try another --dtype, or mend that model"
            )

    def find(self, name: object) -> Rule:
        """Return the rule, or for a role the rule that is this member alone; raise ConfigError for another name."""
        if name not in self.names:
            raise ConfigError(
                f"rule is {shown(name)}, which cannot be served from these members{nearest(name, self.names)}"
            )
        if name == self.own.name:
            return self.own
        if name in RULES:
            return RULES[str(name)]
        return Rule(str(name), {str(name): 1.0}, {}, "", f"p_{name}", raw_roles=self.own.raw_roles)

    def point_of(self, arguments: Mapping[str, Any] | None) -> GridPoint:
        """Return the point that a request's arguments ask for; None for a key is as if it were left out.

        Raises ConfigError for an α or a rule that cannot be had, and for keys that are misspelt or fixed.
        """
        given = arguments or {}
        for key in given:
            check_key(key)
        name, alpha = given.get(RULE), given.get(ALPHA)
        rule = self.own if name is None else self.find(name)
        if not rule.slope:  # a member alone has no log-ratio to scale
            return GridPoint(rule.name, 0.0 if alpha is None else 0 * check_alpha(rule, alpha))
        return GridPoint(rule.name, check_alpha(rule, self.default.alpha if alpha is None else alpha))

    def weights_of(self, point: GridPoint) -> tuple[float, ...]:
        """Return the row of `weights.table` for a point: constants, slopes, α, logarithm of the cut-off."""
        row = self._rows[point.rule]
        return (*row[:-2], point.alpha, row[-1])

    @cached_property
    def _rows(self) -> dict[str, list[float]]:
        return dict(zip(self.names, self.weights.table.tolist(), strict=True))

    def check_ends(self, point: GridPoint) -> None:
        """Raise ConfigError where the anchor of another rule ends its texts with a token that ends none here."""
        rule = self.find(point.rule)
        if rule.name not in RULES or rule.anchor == self.own.anchor:
            return
        missing = self._foreign_ends[rule.anchor]
        if missing:
            raise ConfigError(
                f"rule is {rule.name!r}, whose anchor {rule.anchor} ends its texts with {', '.join(missing)}, which "
                "ends none here; add its id to eos_token_id in generation_config.json of the folder"
            )

    @cached_property
    def _foreign_ends(self) -> dict[str, list[str]]:
        """By role: the tokens that end the member's own texts, and not those of the folder."""
        settings, tokenizer = self.checked.generation_config, self.checked.tokenizer
        here = set() if settings is None else set(end_ids(settings))
        found: dict[str, list[str]] = {}
        for role, files in self.checked.files.items():
            end = getattr(files.tokenizer, "eos_token_id", None)
            ids = sorted({*end_ids(files.generation_config()), *([] if end is None else [end])} - here)
            found[role] = [str(i) if tokenizer is None else str(tokenizer.convert_ids_to_tokens(i)) for i in ids]
        return found


def check_alpha(rule: Rule, alpha: object) -> float:
    """Return the α of a request as a float; raise ConfigError for what is no finite fp32 number that the rule takes."""
    if isinstance(alpha, list | tuple):
        raise ConfigError(
            f"alpha is a list of {len(alpha)}; a request has one alpha: send a request for each, they run in one batch"
        )
    number = rule.check_alpha(alpha)
    if abs(number) > _LARGEST:
        raise ConfigError(f"alpha is {number:g}; expected a number within float32, at most {_LARGEST:.2g}")
    return number


def check_key(key: str) -> None:
    """Raise ConfigError for a key that is fixed when the server starts, and for one that looks like a misspelt one."""
    name = key[:_LONGEST_KEY].lower()
    if key in FIXED_KEYS:
        raise ConfigError(f"{key} cannot be set by a request; it belongs to the folder: serve one that has it")
    near = [one for one in KEYS if name.startswith(one)] or get_close_matches(name, KEYS, n=1, cutoff=0.8)
    if key not in KEYS and near:
        raise ConfigError(f"unknown key {shown(key)}; did you mean {near[0]}?")


def shown(value: object) -> str:
    """Return a value as a message shows it, cut where it is long."""
    return repr(value)[:40]
