"""The rules: how the next-token logits of the members become those of the ensemble.

A rule is affine in α: with one constant c and one slope s per role,

    z(α) = Σ_role c_role · z_role + α · Σ_role s_role · z_role,        p = softmax(z).

The first sum is the *anchor* (a single role, in every named rule): at α = 0 the ensemble is that member. The second
sum is the log-ratio that α scales. `ensembler_kernels` does the arithmetic; this module only says which numbers.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from numbers import Real

from ensembler.errors import ConfigError, nearest


@dataclass(frozen=True)
class Rule:
    """One rule: a constant and a slope for each role.

    `cutoff` keeps only tokens whose anchor probability is at least `cutoff` times the anchor's largest (None: all).
    `raw_roles` are members whose output is a score and not a distribution: it is never normalised.
    """

    name: str
    constant: Mapping[str, float]
    slope: Mapping[str, float]
    paper: str
    formula: str
    cutoff: float | None = None
    raw_roles: frozenset[str] = frozenset()
    allows_negative_alpha: bool = False

    @property
    def anchor(self) -> str:
        """The role that the ensemble equals at α = 0 (for `linear`: the first role with a constant)."""
        return next(iter(self.constant))

    @property
    def roles(self) -> tuple[str, ...]:
        """All roles, the anchor first."""
        return tuple(dict.fromkeys((*self.constant, *self.slope)))

    @property
    def is_anchor_times_ratio(self) -> bool:
        """Return whether α scales nothing but a ratio of members that are not the anchor, as in base-change and EFT."""
        is_ratio = self.anchor not in self.slope and abs(sum(self.slope.values())) < 1e-9
        return len(self.constant) == 1 and is_ratio and not self.raw_roles and self.cutoff is None

    def weights(self, alpha: float) -> dict[str, float]:
        """Return the weight of each role's logits at `alpha`."""
        return {role: self.constant.get(role, 0.0) + alpha * self.slope.get(role, 0.0) for role in self.roles}

    def check_alpha(self, alpha: object) -> float:
        """Return `alpha` as a float, or raise ConfigError where the rule has no meaning for it."""
        number = finite_number("alpha", alpha)
        if number < 0 and not self.allows_negative_alpha:
            raise ConfigError(f"alpha is {number:g}; the rule {self.name!r} takes a number that is not negative")
        return number


def finite_number(name: str, value: object) -> float:
    """Return `value` as a float, or raise ConfigError unless it is a finite number (NumPy's too)."""
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    raise ConfigError(f"{name} is {repr(value)[:40]}; expected a finite number")


PLUGINS = "ensembler.rules"  # the entry points of packages that bring rules
_MAX_ALPHAS = 1000

_NAMED = (
    Rule(
        name="base-change",
        constant={"source_ft": 1.0},
        slope={"target_pt": 1.0, "source_pt": -1.0},
        formula="p_source_ft · (p_target_pt / p_source_pt)^α",
        paper="Chijiwa et al. 2024, Base-Change at Prediction, eq. 2",
    ),
    Rule(
        name="eft",
        constant={"target_pt": 1.0},
        slope={"source_ft": 1.0, "source_pt": -1.0},
        formula="p_target_pt · (p_source_ft / p_source_pt)^α",
        paper="Mitchell et al. 2024, emulated fine-tuning; Liu et al. 2024, proxy-tuning (arXiv 2401.08565)",
    ),
    Rule(
        name="realign",
        constant={"reference": 1.0},
        slope={"aligned": 1.0, "reference": -1.0},
        formula="p_reference · (p_aligned / p_reference)^α",
        paper="Liu et al. 2024, Decoding-time realignment (arXiv 2402.02992)",
    ),
    Rule(
        name="contrastive",
        constant={"expert": 1.0},
        slope={"expert": 1.0, "amateur": -1.0},
        cutoff=0.1,
        formula="p_expert · (p_expert / p_amateur)^α where p_expert ≥ cutoff · max p_expert",
        paper="Li et al. 2023, Contrastive decoding (ACL 2023); this α form: O'Brien and Lewis 2023",
    ),
    Rule(
        name="reward",
        constant={"target_pt": 1.0},
        slope={"reward": 1.0},
        raw_roles=frozenset({"reward"}),
        formula="p_target_pt · exp(α · reward)",
        paper="Chijiwa et al. 2025, Portable reward tuning; GenARM (arXiv 2410.08193)",
    ),
)
_LINEAR = Rule(
    name="linear",
    constant={},
    slope={},
    formula="exp(Σ (constant + α · slope) · log p)",
    paper="Hinton 2002, products of experts; Dekoninck et al. 2024, model arithmetic (arXiv 2311.14479)",
    allows_negative_alpha=True,
)
RULES: dict[str, Rule] = {rule.name: rule for rule in _NAMED}
RULE_NAMES = (*RULES, "linear")  # those that need no register_rule


def register_rule(
    name: str,
    *,
    constant: Mapping[str, float],
    slope: Mapping[str, float],
    cutoff: float | None = None,
    raw_roles: Collection[str] = (),
    allows_negative_alpha: bool = False,
    formula: str = "exp(Σ (constant + α · slope) · log p)",
    paper: str = "",
) -> Rule:
    """Make a rule known by `name` to everything that takes one, in this process, and return it.

    `constant` and `slope` hold a number by role, the anchor first; the rest is described at `Rule`. Registering the
    same rule again changes nothing. Raises ConfigError for a name that is taken and for numbers that make no rule.
    """
    if not isinstance(name, str) or not name.strip() or "," in name:
        raise ConfigError(f"the name of a rule is {name!r}; expected a word without commas, as in 'my-rule'")
    constant, slope = _numbers(name, constant=constant, slope=slope)
    unknown = [role for role in raw_roles if role not in {**constant, **slope}]
    if unknown:
        raise ConfigError(f"raw_roles of the rule {name!r} has {unknown[0]!r}, which has no constant and no slope")
    raw = frozenset(raw_roles)
    rule = Rule(name, constant, slope, paper, formula, _checked_cutoff(cutoff), raw, allows_negative_alpha)
    if name == "linear" or RULES.get(name, rule) != rule:
        raise ConfigError(f"there is a rule {name!r} already; choose another name")
    RULES[name] = rule
    return rule


def load_plugins() -> None:
    """Make the rules of installed packages known, from their entry points."""
    from importlib.metadata import entry_points  # it would slow every start of the command line

    for plugin in entry_points(group=PLUGINS):
        plugin.load()


def find_rule(name: str) -> Rule:
    """Return the rule with fixed numbers called `name`, of this package, registered, or of a package's entry point."""
    if name not in RULES:
        load_plugins()
    if name not in RULES:
        raise ConfigError(f"unknown rule {name!r}{nearest(name, (*RULES, 'linear'))}")
    return RULES[name]


def get_rule(
    name: str,
    *,
    constant: Mapping[str, float] | None = None,
    slope: Mapping[str, float] | None = None,
    anchor: str | None = None,
    cutoff: float | None = None,
) -> Rule:
    """Return the rule called `name`; `constant`, `slope` and `anchor` belong to 'linear', `cutoff` to 'contrastive'.

    'linear' has these numbers: products of experts, several fine-tuned / base pairs, model arithmetic. Its `anchor` is
    the role whose vocabulary and tokenizer count; the first one with a constant, if it is not given.
    """
    if name == "linear":
        numbers, slopes = _numbers(name, constant=constant or {}, slope=slope or {})
        if anchor is not None and anchor not in numbers:
            raise ConfigError(f"the anchor {anchor!r} has no constant; expected one of: {', '.join(numbers)}")
        rule = replace(
            _LINEAR, constant=numbers if anchor is None else {anchor: numbers[anchor], **numbers}, slope=slopes
        )
    else:
        rule = find_rule(name)
        if constant or slope or anchor:
            raise ConfigError(f"the rule {name!r} has fixed numbers; constant, slope and anchor belong to 'linear'")
    if cutoff is None:
        return rule
    if rule.cutoff is None:
        raise ConfigError(f"the rule {name!r} takes no cutoff; it belongs to 'contrastive'")
    return replace(rule, cutoff=_checked_cutoff(cutoff))


def _numbers(rule: str, **kinds: Mapping[str, float]) -> list[dict[str, float]]:
    """Return the constants and slopes of a rule that are not 0, by role. Raises ConfigError."""
    found = []
    for kind, numbers in kinds.items():
        if not isinstance(numbers, Mapping):
            raise ConfigError(f"{kind} is {numbers!r}; expected a mapping from role to number")
        for role in numbers:
            if not isinstance(role, str) or not role.isidentifier():
                raise ConfigError(f"{role!r} cannot be a role; expected a word of letters, digits and _, as in math_ft")
        checked = {role: finite_number(f"{kind} of {role!r}", number) for role, number in numbers.items()}
        found.append({role: number for role, number in checked.items() if number})
    if not found[0]:
        raise ConfigError(f"the rule {rule!r} has no constant; give at least one role a constant that is not 0")
    return found


def _checked_cutoff(cutoff: float | None) -> float | None:
    if cutoff is not None and not 0 < finite_number("cutoff", cutoff) <= 1:
        raise ConfigError(f"cutoff is {cutoff!r}; expected a number above 0 and at most 1")
    return None if cutoff is None else float(cutoff)


def parse_alphas(text: str) -> tuple[float, ...]:
    """Return the numbers of a grid: A, or A,B,..., or FIRST:LAST:STEP, up to the last; raise ConfigError."""
    words = text.split(":")
    try:
        numbers = [float(word) for word in (words if len(words) > 1 else text.split(","))]
    except ValueError:
        numbers = []
    if not numbers or not all(map(math.isfinite, numbers)) or len(words) not in (1, 3):
        raise ConfigError(f"alpha is {text!r}; expected a number, or a grid: 0,0.5,1 or 0:1.5:0.1 (first:last:step)")
    if len(words) == 1:
        return tuple(numbers)
    first, last, step = numbers
    if step <= 0 or last < first:
        raise ConfigError(f"alpha is {text!r}, an empty grid; expected first:last:step with a step above 0, upwards")
    num = math.floor((last - first) / step + 1e-9) + 1
    if num > _MAX_ALPHAS:
        raise ConfigError(f"alpha is {text!r}, a grid of {num:,}; give at most {_MAX_ALPHAS:,}")
    return tuple(round(first + index * step, 10) + 0.0 for index in range(num))
