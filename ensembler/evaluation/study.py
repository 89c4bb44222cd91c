"""Plans whose methods are compared on the same documents: of a sweep, or of an experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ensembler.evaluation.methods import compared_pairs, sweep_pairs
from ensembler.evaluation.plan import Plan
from ensembler.evaluation.recipe import Experiment
from ensembler.evaluation.results_file import Results


@dataclass(frozen=True)
class Study:
    """The plans of methods that are compared; `experiment` is that of a recipe, None of a sweep."""

    name: str
    plans: tuple[Plan, ...]
    experiment: Experiment | None = None

    @property
    def alphas(self) -> tuple[float, ...]:
        """The grid that α is chosen from: without the α that are given for a method."""
        return self.plans[0].run.alphas if self.experiment is None else self.experiment.alphas

    @property
    def method_keys(self) -> tuple[str, ...]:
        """The methods in the order in which they are shown."""
        if self.experiment is not None:
            return self.experiment.methods
        return tuple(method.key for method in self.plans[0].run.methods)

    def pairs(self, keys: Sequence[str]) -> list[tuple[str, str]]:
        """Return which of the methods `keys`, those that have all their answers, are compared."""
        if self.experiment is not None:
            return compared_pairs(keys)
        return [pair for pair in sweep_pairs(self.plans[0].run) if set(pair) <= set(keys)]

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


def finished_runs(studies: Sequence[Study], results: Results) -> dict[str, bool]:
    """Return by name whether all documents of a run are measured."""
    return {plan.name: plan.is_finished(results) for study in studies for plan in study.plans}
