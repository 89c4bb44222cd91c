"""`ensembler create`: write the folder of an ensemble."""

from __future__ import annotations

from pathlib import Path

import click

from ensembler.cli.options import EnsembleOptions, ensemble_options


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@ensemble_options(argument=False)
@click.option("--copy-members", is_flag=True, help="Copy the members into the folder, so that it stands alone.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
def create(out: Path, given: EnsembleOptions, copy_members: bool, overwrite: bool) -> None:
    """Write an ensemble to the folder OUT.

    The members are checked (files, vocabularies) and referenced, not loaded; with --copy-members they are loaded and
    saved inside.

    \b
    ensembler create math --source-ft ./my-gsm --source-pt meta-llama/Llama-2-7b-hf \\
        --target-pt codellama/CodeLlama-7b-hf --rule base-change --alpha 0.4
    """
    config = given.load_config()
    if copy_members:
        from ensembler.modeling import EnsembleForCausalLM

        EnsembleForCausalLM.from_config(config).save_pretrained(out, copy_members=True, overwrite=overwrite)
    else:
        from ensembler import folder
        from ensembler.preflight import check_ensemble

        folder.write_checked(check_ensemble(config), out, overwrite=overwrite)
    click.echo(f"{out}: {config.rule} at alpha {config.alpha:g} of {', '.join(config.members)}", err=True)
