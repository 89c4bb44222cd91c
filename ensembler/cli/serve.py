"""`ensembler serve`: vLLM's OpenAI-compatible server for an ensemble."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from ensembler.cli.command_class import Command, section
from ensembler.cli.ensemble_options import DEMO
from ensembler.cli.option_groups import AlphaType


@click.command(cls=Command, context_settings={"ignore_unknown_options": True})
@click.argument("ensemble", metavar="FOLDER")
@section("Rule")(
    "--alpha",
    type=AlphaType(several=False),
    metavar="A",
    help="Strength of the log-ratio for requests that name none.  [default: folder's]",
)
@section("Names and pages")(
    "--alias",
    "aliases",
    type=AlphaType(several=True),
    default=(),
    metavar="GRID",
    help="Serve these alphas under names of their own too, NAME@alpha=A, for clients that can only choose a model.",
)
@section("Names and pages")(
    "--playground", is_flag=True, help="Serve a page at / where alpha is a slider and shows its effect."
)
@section("Names and pages")(
    "--audit", is_flag=True, help="Count tokens by rule and alpha, and those that alpha changed, under /metrics."
)
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="[-- VLLM FLAGS]")
def serve(
    ensemble: str,
    alpha: float | None,
    aliases: tuple[float, ...],
    playground: bool,
    audit: bool,
    flags: tuple[str, ...],
) -> None:
    """Serve the ensemble in FOLDER (or demo) over HTTP, with vLLM's engine and OpenAI-compatible server.

    Each request may say its own "alpha" and "rule"; all of them run in one batch. What stands behind -- is handed on:
    any flag of `vllm serve`. Ctrl-C or SIGTERM ends it.

    \b
    ensembler serve demo --playground -- --port 8000
    ensembler serve my-ensemble --alpha 0.5 -- --tensor-parallel-size 4 --max-model-len 4096
    """
    from ensembler import folder as folders
    from ensembler.demo import demo_folder
    from ensembler.preflight import check_ensemble
    from ensembler.serving.choice import check_servable, require_vllm
    from ensembler.serving.vllm_serve import serve_command

    require_vllm()
    folder = demo_folder() if ensemble == DEMO else folders.find(Path(ensemble))
    config = folders.read(folder)
    for one in (*aliases, *([] if alpha is None else [alpha])):
        config.get_rule().check_alpha(one)
    check_servable(check_ensemble(config))
    command = serve_command(
        folder,
        name=folder.resolve().name,
        flags=flags,
        alpha=alpha,
        aliases=aliases,
        playground=playground,
        audit=audit,
    )
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command[0], command)  # signals and exit codes are vLLM's own
