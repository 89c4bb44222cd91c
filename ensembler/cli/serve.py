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
    help="Strength of the log-ratio, for all requests.  [default: folder's]",
)
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="[-- VLLM FLAGS]")
def serve(ensemble: str, alpha: float | None, flags: tuple[str, ...]) -> None:
    """Serve the ensemble in FOLDER (or demo) over HTTP, with vLLM's engine and OpenAI-compatible server.

    What stands behind -- is handed on: any flag of `vllm serve`. The model's name says rule and alpha; both are fixed
    as long as the server runs. Ctrl-C or SIGTERM ends it.

    \b
    ensembler serve demo -- --port 8000
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
    if alpha is not None:
        config = config.replaced(alpha=alpha)
    checked = check_ensemble(config)
    check_servable(checked)
    command = serve_command(folder, checked, name=folder.resolve().name, alpha=alpha, flags=flags)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command[0], command)  # signals and exit codes are vLLM's own
