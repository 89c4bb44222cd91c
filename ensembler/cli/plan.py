"""`ensembler plan`: what fits where, before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from ensembler.cli.options import EnsembleOptions, ensemble_options, plan_options
from ensembler.errors import InputError, PlacementError

if TYPE_CHECKING:
    from ensembler.planning.placement import Proposal
    from ensembler.planning.serving import ServingPlan
    from ensembler.preflight import CheckedEnsemble


@click.command()
@ensemble_options()
@plan_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, sizes in bytes.")
def plan(given: EnsembleOptions, budget: tuple[str, ...], context: int | None, batch_size: int, as_json: bool) -> None:
    """Propose where the members of ENSEMBLE go, and what to quantise if they do not fit.

    Reads configs and file headers, never weights. A tenth of each budget stays free for activations. With GPUs it says
    what vLLM has room for as well, and the flags for `ensembler serve`.

    \b
    ensembler plan math --budget 24GiB --budget 24GiB --context 2048 --batch-size 8
    """
    from ensembler.cli.tables import print_proposal, print_serving
    from ensembler.planning.budgets import gpu_budgets, machine_budgets
    from ensembler.planning.placement import plan as propose
    from ensembler.preflight import check_ensemble

    budgets = gpu_budgets(budget) or machine_budgets()
    checked = check_ensemble(given.load_config())
    proposal = propose(checked, budgets, context=context, batch_size=batch_size)
    serving = _serving(checked, budgets, proposal)
    if as_json:
        content = {"reason": serving} if isinstance(serving, str) else serving.to_dict()
        click.echo(json.dumps({**proposal.to_dict(), "vllm": content}, indent=2))
    else:
        print_proposal(proposal)
        print_serving(serving)
    if not proposal.fits:
        raise PlacementError(proposal.shortage())


def _serving(checked: CheckedEnsemble, budgets: Mapping[str, int], proposal: Proposal) -> ServingPlan | str:
    """The plan for vLLM's server, or why there is none."""
    from ensembler.planning.serving import plan_serving
    from ensembler.serving.checks import check_servable, common_dtype

    if set(budgets) == {"cpu"}:
        return "no GPU: give --budget for those of another machine"
    try:
        check_servable(checked)
        common_dtype(checked)
    except InputError as error:
        return str(error)
    found = plan_serving(checked, budgets, context=proposal.context, batch_size=proposal.batch_size)
    return found or "these members do not fit into any 1, 2, 4 ... of these GPUs that divide their heads"
