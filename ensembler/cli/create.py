"""`ensembler create`: write the folder of an ensemble."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ensembler.cli.command_class import Command, log, section
from ensembler.cli.ensemble_options import EnsembleOptions
from ensembler.cli.image_options import ImageOptions, image_options
from ensembler.cli.option_groups import PATH, ensemble_options, plan_options
from ensembler.errors import ConfigError

if TYPE_CHECKING:
    from ensembler.config import EnsembleConfig
    from ensembler.preflight import CheckedEnsemble


_folder = section("Folder")


@click.command(cls=Command)
@click.argument("out", metavar="FOLDER", type=PATH)
@ensemble_options(argument=False)
@image_options
@_folder("--copy-members", is_flag=True, help="Copy the members into the folder, so that it stands alone.")
@_folder("--overwrite", is_flag=True, help="Replace FOLDER if it exists.")
@_folder("--auto-place", is_flag=True, help="Write the placement that `ensembler plan` proposes.")
@plan_options
def create(
    out: Path,
    given: EnsembleOptions,
    images: ImageOptions,
    copy_members: bool,
    overwrite: bool,
    auto_place: bool,
    budget: tuple[str, ...],
    context: int | None,
    batch_size: int,
) -> None:
    """Write an ensemble to FOLDER.

    The members are checked (files, vocabularies, roles) and referenced, not loaded; with --copy-members they are
    loaded and saved inside. Differences between tokenizers, and roles that look swapped, are written to standard error.

    \b
    ensembler create math --source-ft ./my-gsm --source-pt meta-llama/Llama-2-7b-hf \\
        --target-pt codellama/CodeLlama-7b-hf --rule base-change --alpha 0.4
    ensembler create cars --task image-classification --source-ft ./clip-b16 --head source_ft=cars.safetensors \\
        --source-pt ./clip-b16 --target-pt ./clip-l14 --classes cars.txt
    """
    config = images.apply(given.load_config())
    if auto_place and copy_members:
        raise ConfigError("--auto-place was given beside --copy-members, which loads the members; copy them first")
    if (budget or context or batch_size > 1) and not auto_place:
        raise ConfigError("--budget, --context and --batch-size belong to --auto-place; add it or leave them out")
    if images.is_given and (copy_members or auto_place):
        raise ConfigError("--copy-members and --auto-place are for language models; leave them out")
    checked = _check(config, are_images=images.is_given)
    if auto_place:
        from ensembler.planning.placement import plan
        from ensembler.planning.sizes import device_budgets

        proposal = plan(checked, device_budgets(budget), context=context, batch_size=batch_size)
        proposal.apply(checked.config)
        for line in (f"placed as by: {' '.join(proposal.flags())}", *proposal.advice()):
            log.info("%s", line)
    if copy_members:
        from ensembler.modeling import EnsembleForCausalLM

        EnsembleForCausalLM.from_checked(checked).save_pretrained(out, copy_members=True, overwrite=overwrite)
    else:
        from ensembler import folder

        folder.write(checked.config, out, checked.tokenizer, checked.generation_config, overwrite=overwrite)
    log.info("%s: %s at alpha %g of %s", out, config.rule, config.alpha, ", ".join(config.members))


def _check(config: EnsembleConfig, *, are_images: bool) -> CheckedEnsemble:
    """Check the members, and say what is assumed of them, how they differ and which roles look swapped."""
    from ensembler.inspection import adapter_notes, role_warnings

    if are_images:
        from ensembler.vision.image_preflight import check_images

        images = check_images(config)
        checked: CheckedEnsemble = images
        lines = images.assumptions
    else:
        from ensembler.preflight import check_ensemble

        checked = check_ensemble(config)
        lines = [f"Note: {note}" for note in (*checked.contract.notes, *adapter_notes(checked))]
    for line in lines:
        log.info("%s", line)
    for warning in role_warnings(checked):
        log.warning("Warning: %s", warning)
    return checked
