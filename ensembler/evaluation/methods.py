"""Methods that are compared, the runs that answer for them, and studies: runs compared on the same documents."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from ensembler.config import VOCABULARY_SETTINGS, EnsembleConfig, MemberConfig
from ensembler.engine.grid import GridPoint
from ensembler.errors import ConfigError
from ensembler.evaluation.figures import NAMES, TRANSPORTED
from ensembler.evaluation.recipe import Experiment
from ensembler.evaluation.results_file import Results
from ensembler.rules import RULES, Rule

if TYPE_CHECKING:
    from ensembler.evaluation.ensemble_plan import Plan

_TRIO = ("source_ft", "source_pt", "target_pt")
_ALONE = GridPoint("linear", 0.0)
_LEVELS = {"source_ft": GridPoint("base-change", 0.0), "target_pt": GridPoint("eft", 0.0)}
_SHARED = {"ensemble": {"source_ft": "source_ft", "target_pt": "target_pt"}, "patched": {"target_pt": "patch"}}
# Which methods are compared besides each with the first (source FT, where there is one): the question of the benchmark.
_PAIRS = (
    ("base-change", "eft"),
    ("base-change", "patch"),
    ("eft", "patch"),
    ("patch+base-change", "patch"),
    ("patch+base-change", "base-change"),
    ("patch", "target_pt"),
    ("patch", "direct"),
    ("base-change", "direct"),
    *((method, "patch") for method in TRANSPORTED),
)


@dataclass(frozen=True)
class Method:
    """A method as points of a plan's grid: one, or a rule whose α is to be chosen.

    `alone`: the role that a user of this method would load by itself; None: all members.
    """

    key: str
    label: str
    rule: str
    alpha: float | None
    alone: str | None = None

    @property
    def has_alpha(self) -> bool:
        """Return whether it is a rule at an α, and not a member by itself."""
        return self.alone is None


@dataclass(frozen=True)
class Run:
    """Members that are loaded together, the grid that they run, and the methods that are points of it.

    `instead_of`: the run that has these methods too, and whose failure alone makes this one necessary. `seed`: the
    number of the seed of training that its models are of; None where they are the same for all.
    """

    name: str
    config: EnsembleConfig
    rules: tuple[str, ...]
    alphas: tuple[float, ...]
    methods: tuple[Method, ...]
    instead_of: str | None = None
    seed: int | None = None

    @property
    def chooses(self) -> bool:
        """Return whether it has a method whose α is still to be chosen."""
        return any(method.alpha is None for method in self.methods)

    def has(self, key: str) -> bool:
        """Return whether a method is one of its own."""
        return any(method.key == key for method in self.methods)

    def by_rule(self, rule: str) -> Run:
        """Return the run without the methods of other rules."""
        return replace(self, methods=tuple(method for method in self.methods if method.rule == rule))

    def method(self, key: str) -> Method:
        """Return one of its methods by its key."""
        return next(method for method in self.methods if method.key == key)


def sweep_run(
    name: str, config: EnsembleConfig, rules: Sequence[str], alphas: Sequence[float], *, chooses: bool
) -> Run:
    """Return the run of a sweep: its members that are points of the grid, and each rule at its α and at 1.

    `chooses`: the α of each rule is to be chosen; a single one is given. Raises ConfigError for an empty grid.
    """
    given = alphas[0] if len(alphas) == 1 else None
    members = [
        Method(role, NAMES.get(role, role), point.rule, point.alpha, alone=role)
        for role, point in levels(config.get_rule()).items()
    ]
    methods = members
    for rule in rules:
        methods += [Method(rule, rule, rule, given)] if chooses or given is not None else []
        methods += [Method(f"{rule} at 1", f"{rule} α = 1", rule, 1.0)]
    return Run(name, config, tuple(rules), tuple(alphas), tuple(methods))


def sweep_pairs(run: Run, methods: Sequence[str]) -> list[tuple[str, str]]:
    """Return which methods of a sweep are compared: each rule, at its α if it has one, with the members and α = 1."""
    members = [method.key for method in run.methods if method.alone is not None]
    pairs = []
    for rule in run.rules:
        first, *others = (method.key for method in run.methods if method.rule == rule and method.has_alpha)
        pairs += [(first, other) for other in (*members, *others) if {first, other} <= set(methods)]
    return pairs


def levels(rule: Rule) -> dict[str, GridPoint]:
    """Return the members that are points of a grid too, by role: the anchors, at α = 0, of all rules for such members.

    Of source FT, source PT and target PT these are the first (base-change) and the last (EFT).
    """
    alike = {name: each for name, each in RULES.items() if set(each.roles) == set(rule.roles)}
    found: dict[str, GridPoint] = {}
    for name, each in {**alike, rule.name: rule}.items():
        if each.cutoff is None and dict(each.constant) == {each.anchor: 1.0}:
            found.setdefault(each.anchor, GridPoint(name, 0.0))
    return found


def compared_pairs(methods: Sequence[str]) -> list[tuple[str, str]]:
    """Return which methods of a benchmark are compared: all with the first, and the pairs that it is about."""
    if not methods:
        return []
    first = "source_ft" if "source_ft" in methods else methods[0]
    pairs = [(method, first) for method in methods if method != first]
    return pairs + [pair for pair in _PAIRS if set(pair) <= set(methods) and pair not in pairs]


def plan_runs(experiment: Experiment, *, members_apart: bool = False, rules_apart: bool = False) -> list[Run]:
    """Return the runs of an experiment, every method in one of them; with several seeds of training, in one of each.

    The members are the levels of their ensemble (base-change at α = 0 is source FT, EFT at α = 0 target PT), so they
    cost nothing beside it; with the patched target in place of target PT, EFT at α = 0 is the ported patch. An ensemble
    may fail where a member would not, as on a device that holds one model and not three. `members_apart`: run the
    members alone in any case, as where the ensemble would change them. `rules_apart`: give each rule a run of its own,
    too, as where a grid has one anchor. What no seed changes is run with the first.
    """
    of_seeds = [_runs(one, members_apart, rules_apart) for one in experiment.by_seed]
    by_name = {runs[0].name: runs for runs in zip(*of_seeds, strict=True)}
    split = {name for name, runs in by_name.items() if len({repr(run.config.to_dict()) for run in runs}) > 1}

    def named(name: str | None, seed: int) -> str | None:
        ending = f".seed{seed}" if name in split else ""
        return name and f"{experiment.name}.{name}{ending}"

    return [
        replace(
            run,
            name=named(name, seed) or "",
            instead_of=named(run.instead_of, seed),
            seed=seed if name in split else None,
            methods=tuple(method for method in run.methods if seed == 0 or experiment.has_seeds(method.key)),
        )
        for name, runs in by_name.items()
        for seed, run in enumerate(runs if name in split else runs[:1])
    ]


def _runs(experiment: Experiment, members_apart: bool, rules_apart: bool) -> Iterator[Run]:
    runs: list[Run] = []
    ensembles: dict[str, tuple[str, ...]] = {"ensemble": ("base-change", "eft")}
    if rules_apart:
        ensembles = {rule: (rule,) for rule in ensembles["ensemble"]}
    for name, keys in {**ensembles, "patched": ("patch+base-change",)}.items():
        tuned = [method for method in keys if method in experiment.methods]
        if tuned:
            levels = {} if members_apart or rules_apart else _SHARED[name]
            runs.append(_together(experiment, name, tuned, levels))
    together = {method.key: run.name for run in runs for method in run.methods}
    yield from runs
    for key in experiment.methods:
        if key not in together:
            yield _alone(experiment, key)
    for run in runs:
        for method in run.methods:
            if method.alone is not None:
                yield replace(_alone(experiment, method.key), instead_of=run.name)


def _together(experiment: Experiment, name: str, tuned: list[str], levels: Mapping[str, str]) -> Run:
    members = {role: experiment.models[role] for role in _TRIO}
    if name == "patched":
        members["target_pt"] = _patched(experiment)
    only = experiment.alphas[0] if len(experiment.alphas) == 1 else None
    methods = [
        Method(key, NAMES[key], "eft" if key == "eft" else "base-change", experiment.alpha.get(key, only))
        for key in tuned
    ]
    known = [
        Method(key, NAMES[key], _LEVELS[role].rule, _LEVELS[role].alpha, alone=role)
        for role, key in levels.items()
        if key in experiment.methods
    ]
    alphas = list(experiment.alphas) if any(method.alpha is None for method in methods) else []
    alphas += [method.alpha for method in methods if method.alpha is not None]
    settings = {setting: getattr(experiment, setting) for setting in VOCABULARY_SETTINGS}
    rule = "eft" if name == "eft" else "base-change"  # of one anchor, or of the first
    config = EnsembleConfig(rule=rule, members=members, **settings)
    return Run(name, config, tuple(method.rule for method in methods), tuple(dict.fromkeys(alphas)), (*known, *methods))


def _alone(experiment: Experiment, key: str) -> Run:
    role = "target_pt" if key == "patch" or key in TRANSPORTED else key
    member = _patched(experiment) if key == "patch" else experiment.models.get(key, experiment.models[role])
    config = EnsembleConfig(rule="linear", members={role: member}, constant={role: 1.0})
    method = Method(key, NAMES[key], _ALONE.rule, _ALONE.alpha, alone=role)
    return Run(key, config, (_ALONE.rule,), (_ALONE.alpha,), (method,))


def _patched(experiment: Experiment) -> MemberConfig:
    target = experiment.models["target_pt"]
    if target.adapter is not None:
        raise ConfigError(
            f"target_pt has an adapter already ({target.adapter}), so the patch cannot be one too; add one of them to "
            "its files first: ensembler patch apply"
        )
    patch = experiment.models["patch"].model
    if "/" not in patch and not os.path.exists(patch):
        raise ConfigError(f"the patch is {patch!r}, which is no folder beside the recipe or here; give its path")
    return replace(target, adapter=patch)


@dataclass(frozen=True)
class Study:
    """The plans of methods that are compared: a `sweep_study`, or an `experiment_study` with its `experiment`.

    `alphas`: the grid that α is chosen from, without the α given for a method. `method_keys`: in the order shown.
    `pairs`: a function that returns which of the methods with all answers, given by their keys, are compared.
    """

    name: str
    plans: tuple[Plan, ...]
    alphas: tuple[float, ...]
    method_keys: tuple[str, ...]
    pairs: Callable[[Sequence[str]], list[tuple[str, str]]]
    experiment: Experiment | None = None

    def plans_of(self, key: str, finished: Mapping[str, bool]) -> list[Plan] | None:
        """Return the plans that answer for a method, one for each seed of training; None where one is missing.

        `finished` says by name which are; in place of one that is not, another may answer.
        """
        having = [plan for plan in self.plans if plan.run.has(key)]
        found = []
        for name in (plan.name for plan in having if plan.run.instead_of is None):
            done = [plan for plan in having if name in (plan.name, plan.run.instead_of) and finished[plan.name]]
            if not done:
                return None
            found.append(done[0])
        return found


def sweep_study(plan: Plan) -> Study:
    """Return the study of a sweep."""
    run = plan.run
    return Study("", (plan,), run.alphas, tuple(method.key for method in run.methods), partial(sweep_pairs, run))


def experiment_study(experiment: Experiment, plans: Sequence[Plan]) -> Study:
    """Return the study of an experiment of a recipe."""
    return Study(experiment.name, tuple(plans), experiment.alphas, experiment.methods, compared_pairs, experiment)


def finished_runs(studies: Sequence[Study], results: Results) -> dict[str, bool]:
    """Return by name whether all documents of a run are measured."""
    return {plan.name: plan.is_finished(results) for study in studies for plan in study.plans}
