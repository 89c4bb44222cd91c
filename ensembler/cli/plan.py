"""`ensembler plan`: propose a place for every member before anything is loaded."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING

import click

from ensembler.cli.command_class import Command
from ensembler.cli.ensemble_options import EnsembleOptions, by_role
from ensembler.cli.option_groups import ensemble_options, output_option, plan_options
from ensembler.errors import InputError, PlacementError

if TYPE_CHECKING:
    from ensembler.planning.placement import Proposal
    from ensembler.planning.vllm_plan import ServingPlan
    from ensembler.preflight import CheckedEnsemble


@click.command(cls=Command)
@ensemble_options()
@plan_options
@output_option("--json", "as_json", is_flag=True, help="Print one JSON object, sizes in bytes.")
def plan(given: EnsembleOptions, budget: tuple[str, ...], context: int | None, batch_size: int, as_json: bool) -> None:
    """Propose where the members of ENSEMBLE go, and what to quantise if they do not fit.

    Reads configs and file headers, never weights. A tenth of each budget stays free for activations. It prints the
    command that runs the plan, your own options included; with GPUs also what vLLM has room for, and how to serve it.

    \b
    ensembler plan math --budget 24GiB --budget 24GiB --context 2048 --batch-size 8
    """
    from ensembler.cli.tables import console, print_proposal, print_serving
    from ensembler.planning.placement import plan as propose
    from ensembler.planning.sizes import device_budgets
    from ensembler.preflight import check_ensemble

    budgets = device_budgets(budget)
    checked = check_ensemble(given.load_config())
    proposal = propose(checked, budgets, context=context, batch_size=batch_size)
    serving = _serving(checked, budgets, proposal)
    if as_json:
        content = {"reason": serving} if isinstance(serving, str) else serving.to_dict()
        click.echo(json.dumps({**proposal.to_dict(), "vllm": content}, indent=2))
    else:
        print_proposal(proposal)
        if proposal.fits:
            click.echo(f"\nrun it with: {_command(given, proposal)}")
        click.echo()
        if isinstance(serving, str):
            console().print(f"vLLM: {serving}", markup=False)
        else:
            print_serving(serving, _serve_command(given, serving))
    if not proposal.fits:
        raise PlacementError(proposal.shortage())


def _command(given: EnsembleOptions, proposal: Proposal) -> str:
    """Return the command that runs the ensemble as planned, with the user's options for it."""
    words = ["ensembler", "generate", *([] if given.ensemble is None else [given.ensemble])]
    for name in (field.name for field in fields(given)):
        if name in ("ensemble", "device", "max_memory", "quantize"):  # the plan's own follow
            continue
        value = getattr(given, name)
        for each in value if isinstance(value, tuple) else () if value is None else (value,):
            words += [f"--{name.replace('_', '-')}", *([] if each is True else [str(each)])]
    methods = {role: group.quantization for group in proposal.groups for role in group.roles}
    for role, method in by_role("--quantize", given.quantize, tuple(methods)).items():
        if methods[role] is None:
            words += ["--quantize", f"{role}={method}"]
    return shlex.join([*words, *proposal.flags(), "--batch-size", str(proposal.batch_size)])


def _serve_command(given: EnsembleOptions, serving: ServingPlan) -> str:
    """Return the command that serves the ensemble: its folder, or FOLDER where members or options are to be in one."""
    words = ["FOLDER"]
    if given.ensemble is not None and given == EnsembleOptions(ensemble=given.ensemble, alpha=given.alpha):
        words = [given.ensemble, *([] if given.alpha is None else ["--alpha", str(given.alpha)])]
    return shlex.join(["ensembler", "serve", *words, "--", *serving.flags()])


def _serving(checked: CheckedEnsemble, budgets: Mapping[str, int], proposal: Proposal) -> ServingPlan | str:
    """Return the plan for vLLM's server, or the sentence that says why there is none."""
    from ensembler.planning.member_sizes import measure
    from ensembler.planning.vllm_plan import num_heads, propose_serving
    from ensembler.serving.choice import check_servable, common_dtype

    try:
        check_servable(checked)
        common_dtype(checked)
        gpus = [size for device, size in budgets.items() if device != "cpu"]
        heads = {role: num_heads(config) for role, config in checked.model_configs.items()}
        return propose_serving(measure(checked), heads, gpus, context=proposal.context, batch_size=proposal.batch_size)
    except (InputError, PlacementError) as error:
        return str(error)
