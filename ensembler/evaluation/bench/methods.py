"""Which ensembles an experiment loads, and which points of them are its methods: several share a run of the members."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ensembler.config import EnsembleConfig, MemberConfig
from ensembler.engine.grid import GridPoint
from ensembler.errors import ConfigError
from ensembler.evaluation.bench.recipe import Experiment

_TRIO = ("source_ft", "source_pt", "target_pt")
_LEVELS = {"source_ft": GridPoint("base-change", 0.0), "target_pt": GridPoint("eft", 0.0)}
_ALONE = GridPoint("linear", 0.0)


@dataclass(frozen=True)
class Method:
    """A method as points of a run's grid: one, or a rule whose α is to be chosen.

    `alone`: the role that a user of this method would load by itself; None: all members.
    """

    name: str
    rule: str
    alpha: float | None
    alone: str | None = None

    @property
    def is_given(self) -> bool:
        """Whether it is a rule whose α the recipe gives."""
        return self.alone is None and self.alpha is not None


@dataclass(frozen=True)
class Run:
    """Members that are loaded together, the grid that they run, and the methods that are points of it.

    `instead_of`: the run that has these methods too, and whose failure alone makes this one necessary.
    """

    name: str
    config: EnsembleConfig
    rules: tuple[str, ...]
    alphas: tuple[float, ...]
    methods: tuple[Method, ...]
    instead_of: str | None = None

    @property
    def chooses(self) -> bool:
        """Whether it has a method whose α is still to be chosen."""
        return any(method.alpha is None for method in self.methods)


def plan_runs(experiment: Experiment, *, members_apart: bool = False) -> list[Run]:
    """Return the runs of an experiment, every method in one of them.

    The members are the levels of their ensemble (base-change at α = 0 is source FT, EFT at α = 0 target PT), so they
    cost nothing beside it; with the patched target in place of target PT, EFT at α = 0 is the ported patch. Where the
    ensemble fails, they may not: three models may be too many for a device that holds one. `members_apart`: they run by
    themselves in any case, as those must that an ensemble would not leave as they are.
    """
    runs: list[Run] = []
    for name, rules, levels, patched in (
        ("ensemble", ("base-change", "eft"), {"source_ft": "source_ft", "target_pt": "target_pt"}, False),
        ("patched", ("patch+base-change",), {"target_pt": "patch"}, True),
    ):
        tuned = [method for method in rules if method in experiment.methods]
        if tuned:
            shared = {} if members_apart else levels
            runs.append(_together(experiment, name, tuned, shared, patched=patched))
    together = {method.name: run.name for run in runs for method in run.methods}
    alone = [_alone(experiment, method) for method in experiment.methods if method not in together]
    members = [method.name for run in runs for method in run.methods if method.alone is not None]
    spare = [replace(_alone(experiment, name), instead_of=together[name]) for name in members]
    return [*runs, *alone, *spare]


def _together(experiment: Experiment, name: str, tuned: list[str], levels: Mapping[str, str], *, patched: bool) -> Run:
    members = {role: experiment.models[role] for role in _TRIO}
    if patched:
        members["target_pt"] = _patched(experiment)
    methods = [_tuned(experiment, method) for method in tuned]
    known = [
        Method(method, _LEVELS[role].rule, _LEVELS[role].alpha, alone=role)
        for role, method in levels.items()
        if method in experiment.methods
    ]
    return Run(
        name,
        EnsembleConfig(rule="base-change", members=members),
        tuple(method.rule for method in methods),
        tuple(dict.fromkeys(_alphas(experiment, methods))),
        (*known, *methods),
    )


def _tuned(experiment: Experiment, name: str) -> Method:
    alpha = experiment.alpha.get(name)
    if alpha is None and len(experiment.alphas) == 1:
        alpha = experiment.alphas[0]
    return Method(name, "eft" if name == "eft" else "base-change", alpha)


def _alphas(experiment: Experiment, methods: list[Method]) -> Iterator[float]:
    if any(method.alpha is None for method in methods):
        yield from experiment.alphas
    yield from (method.alpha for method in methods if method.alpha is not None)


def _alone(experiment: Experiment, method: str) -> Run:
    role = "target_pt" if method == "patch" else method
    member = _patched(experiment) if method == "patch" else experiment.models[role]
    config = EnsembleConfig(rule="linear", members={role: member}, constant={role: 1.0})
    known = Method(method, _ALONE.rule, _ALONE.alpha, alone=role)
    return Run(method, config, (_ALONE.rule,), (_ALONE.alpha,), (known,))


def _patched(experiment: Experiment) -> MemberConfig:
    target = experiment.models["target_pt"]
    if target.adapter is not None:
        raise ConfigError(
            f"target_pt has an adapter already ({target.adapter}), so the patch cannot be one too; add one of them to "
            "its files first: ensembler patch apply"
        )
    return replace(target, adapter=experiment.patch)
