"""The plan of a benchmark on the terminal: what would run, and which differences its documents can show."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ensembler.cli.tables import console
from ensembler.inspection import summarise
from ensembler.planning.budgets import show_size

if TYPE_CHECKING:
    from ensembler.evaluation.bench import Bench

_DISAGREEMENTS = (0.05, 0.1, 0.3)  # shares of documents on which two methods differ: much alike, and not


def print_plan(bench: Bench) -> None:
    """Print members with their bytes, vocabulary contracts, tasks with their examples, and detectable differences."""
    from ensembler.evaluation.methods import compared_pairs
    from ensembler.evaluation.parts import TEST, VALIDATION

    out = console()
    planned = [(study, plan, plan.run) for study in bench.studies for plan in study.plans]
    for of_run, plan, run in planned:
        if run.instead_of is not None:
            continue
        summary = summarise(plan.checked)
        out.print(f"\n{plan.name}: {', '.join(method.key for method in run.methods)}", markup=False)
        out.print(f"  vocabulary {summary.vocabulary}, {summary.shared:,} shared ids", markup=False)
        for member in summary.members:
            size = "?" if member.num_bytes is None else show_size(member.num_bytes)
            adapter = "" if member.adapter is None else f" + {member.adapter}"
            out.print(f"  {member.role}: {member.model}{adapter}, {size}, {member.dtype}", markup=False)
        given = [method for method in run.methods if method.has_alpha and method.alpha is not None]
        if given:
            out.print("  " + ", ".join(f"{one.key} at alpha {one.alpha:g}" for one in given), markup=False)
        for task in plan.tasks:
            num = len(task.parts[VALIDATION])
            chosen = f", alpha chosen of {len(of_run.alphas)} on {num:,} others" if run.chooses else ""
            num_test = len(task.parts[TEST])
            out.print(f"  {task.task.name} ({task.metric.key}): {num_test:,} test examples{chosen}", markup=False)
    for study in bench.studies:
        if study.experiment is not None and (missing := study.experiment.missing_models):
            said = ", ".join(f"{method} (no {', no '.join(roles)})" for method, roles in missing.items())
            out.print(f"\n{study.name}, not possible with its models: {said}", markup=False)
    num = sum(len(compared_pairs(study.method_keys)) * len(study.plans[0].tasks) for study in bench.studies)
    out.print(f"\nDifferences of right and wrong seen in 80 of 100 cases, with {num} comparisons in all:", markup=False)
    for study in bench.studies:
        for task in study.plans[0].tasks:
            num_test = len(task.parts[TEST])
            experiment, cluster = study.experiment, study.plans[0].options.cluster
            if not task.metric.is_percent:
                shown = f"not told before the run of {task.metric.key}"
            elif cluster is not None or (experiment is not None and experiment.seeds):
                shown = f"not told before the run of {'several seeds' if cluster is None else f'groups by {cluster}'}"
            else:
                shown = _shown(num_test, 0.05 / max(num, 1))
            out.print(f"  {study.name}, {task.task.name}, {num_test:,} test examples: {shown}", markup=False)


def _shown(num: int, level: float) -> str:
    from ensembler.evaluation.decisions import detectable_by

    found = [(share, detectable_by(num, share, level=level)) for share in _DISAGREEMENTS]
    shown = [(share, difference) for share, difference in found if difference <= share]
    said = ", ".join(f"{100 * difference:.1f} if on {100 * share:g} %" for share, difference in shown)
    none = f"none if the two disagree on {100 * _DISAGREEMENTS[-1]:g} % or less"
    return said.replace(" if on", " points if the two disagree on", 1) or none
