"""`ensembler plan`: what fits where, before anything is loaded."""

from __future__ import annotations

import json

import click

from ensembler.cli.options import EnsembleOptions, ensemble_options, plan_options
from ensembler.errors import PlacementError


@click.command()
@ensemble_options()
@plan_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, sizes in bytes.")
def plan(given: EnsembleOptions, budget: tuple[str, ...], context: int | None, batch_size: int, as_json: bool) -> None:
    """Propose where the members of ENSEMBLE go, and what to quantise if they do not fit.

    Reads configs and file headers, never weights. A tenth of each budget stays free for activations.

    \b
    ensembler plan math --budget 24GiB --budget 24GiB --context 2048 --batch-size 8
    """
    from ensembler.cli.tables import print_proposal
    from ensembler.planning.budgets import gpu_budgets, machine_budgets
    from ensembler.planning.placement import plan as propose
    from ensembler.preflight import check_ensemble

    budgets = gpu_budgets(budget) or machine_budgets()
    proposal = propose(check_ensemble(given.load_config()), budgets, context=context, batch_size=batch_size)
    if as_json:
        click.echo(json.dumps(proposal.to_dict(), indent=2))
    else:
        print_proposal(proposal)
    if not proposal.fits:
        raise PlacementError(proposal.shortage())
