"""Plans whose methods are compared on the same documents: of a sweep, or of an experiment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from ensembler.evaluation.methods import compared_pairs, sweep_pairs
from ensembler.evaluation.plan import Plan
from ensembler.evaluation.recipe import Experiment
from ensembler.evaluation.results_file import Results


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
