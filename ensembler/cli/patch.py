"""`ensembler patch`: carry a fine-tuning to another version of its model, by addition."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

import click

from ensembler.cli.command_class import Command, log, section
from ensembler.cli.option_groups import PATH, output_option, replace_option
from ensembler.errors import ConfigError

_patch = section("Patch")


class _Group(click.Group):
    command_class = Command


@click.group(cls=_Group)
def patch() -> None:
    """Carry a fine-tuning to another version of its model by adding weights: no training (PortLLM).

    PATCH is a PEFT LoRA folder or one that `patch extract` made; models are folders or hub ids.
    """


@patch.command()
@click.argument("patch")
@_patch("--to", required=True, metavar="MODEL", help="The model to add it to, an updated one for example.")
@output_option("--output", type=PATH, metavar="DIR", help="The new folder.")
@replace_option
@_patch("--scale", type=float, default=1.0, show_default=True, help="Strength of PATCH.")
@_patch("--also", multiple=True, metavar="PATCH2", help="Add another patch too; repeat it.")
@_patch("--scale2", type=float, multiple=True, help="Strength of PATCH2, one for each --also.  [default: 1]")
@_patch("--dtype", metavar="DTYPE", help="float32, bfloat16 or float16.  [default: each tensor keeps its own]")
@_patch("--check", is_flag=True, help="Only say whether it fits, from the headers of the files.")
@_patch("--allow-pickle", is_flag=True, help="Read a patch that is kept as a pickle (adapter_model.bin).")
@_patch("--unwrap", is_flag=True, help="Leave out what torch.compile, FSDP or DDP put into the names in PATCH.")
def apply(
    patch: str,
    to: str,
    output: Path | None,
    overwrite: bool,
    scale: float,
    also: tuple[str, ...],
    scale2: tuple[float, ...],
    dtype: str | None,
    check: bool,
    allow_pickle: bool,
    unwrap: bool,
) -> None:
    """Write MODEL with PATCH added to DIR: a model like any other.

    fp32 arithmetic and one rounding; memory is a few blocks of a tensor. The folder appears when it is complete.

    \b
    ensembler patch apply ./my-lora --to ./mistral-updated --output ./mistral-mine
    """
    from ensembler.files import find_folder, other_tokenizer
    from ensembler.patch.formats import read_patch
    from ensembler.patch.patch_plan import plan_patches

    if output is None and not check:
        raise ConfigError("--output is missing; name the new folder, or add --check to see whether the patch fits")
    if scale2 and len(scale2) != len(also):
        raise ConfigError(f"--scale2 is given {len(scale2)} times and --also {len(also)} times; give one for each")
    _check_dtype(dtype)
    given = zip((patch, *also), (scale, *(scale2 or [1.0] * len(also))), strict=True)
    patches = [
        read_patch(find_folder(name), scale=strength, allow_pickle=allow_pickle, unwrap=unwrap)
        for name, strength in given
    ]
    model = find_folder(to)
    plan = plan_patches(patches, model)
    _print_notes(*plan.notes, *plan.warnings)
    for each in patches:
        names = other_tokenizer(each.folder, model)
        if names:
            command = shlex.join(["cp", *(str(each.folder / name) for name in names), str(output or "DIR")])
            log.info(
                "Note: %s has a tokenizer or chat template of its own, and the result keeps that of %s; where the "
                "patch was trained with it: %s",
                *(each.folder, to, command),
            )
    if output is None or check:
        click.echo(f"{to}: {len(plan.names):,} of {len(plan.model.tensors):,} tensors change; everything fits")
        return
    from ensembler.cli.tables import byte_progress
    from ensembler.patch.apply import apply_plan
    from ensembler.planning.sizes import show_size

    with byte_progress("writing", plan.model.num_bytes) as advance:
        start = time.monotonic()
        num_bytes = apply_plan(plan, output, dtype=dtype, overwrite=overwrite, advance=advance)
    seconds = time.monotonic() - start
    changed = f"{len(plan.names)} of {len(plan.model.tensors)} tensors changed"
    log.info("%s: %s, %s in %.1f s", output, changed, show_size(num_bytes), seconds)


def _print_notes(*notes: str) -> None:
    for note in notes:
        log.info("Note: %s", note)


def _check_dtype(dtype: str | None) -> None:
    from ensembler.safetensors_files import FLOATS

    if dtype is not None and dtype not in FLOATS:
        raise ConfigError(f"unknown dtype {dtype!r}; expected one of: {', '.join(FLOATS)}")


@patch.command()
@_patch("--base", required=True, metavar="MODEL", help="The model before the fine-tuning, θ.")
@_patch("--finetuned", required=True, metavar="MODEL", help="The model after it, θ_i.")
@output_option("--output", required=True, type=PATH, metavar="DIR", help="The new patch folder.")
@replace_option
@_patch("--rank", type=int, help="Keep this many singular values of every matrix.")
@_patch("--energy", type=float, help="Keep this share of every matrix's ‖Δ‖².  [default: 0.95]")
@_patch("--full", is_flag=True, help="Keep every delta as it is: as large as the model.")
@_patch("--dtype", default="float32", show_default=True, metavar="DTYPE", help="Of the factors and deltas.")
@output_option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def extract(
    base: str,
    finetuned: str,
    output: Path,
    overwrite: bool,
    rank: int | None,
    energy: float | None,
    full: bool,
    dtype: str,
    as_json: bool,
) -> None:
    """Write the difference of two models to DIR: a LoRA that PEFT reads, and beside it what no LoRA holds.

    Norms, biases and other deltas that are no matrix are kept in full in DIR/deltas.safetensors, which `patch apply`
    adds and PEFT alone would not.

    \b
    ensembler patch extract --base mistralai/Mistral-7B-v0.1 --finetuned ./my-tuned --output ./my-patch --rank 16
    """
    import json

    from ensembler.cli.tables import byte_progress, print_extracted
    from ensembler.files import find_folder
    from ensembler.patch.extract import extract_patch
    from ensembler.safetensors_files import read_model

    _check_dtype(dtype)
    if rank is None and energy is None and not full:
        energy = 0.95
    tuned = find_folder(finetuned)
    with byte_progress("comparing", read_model(tuned).num_bytes) as advance:
        done = extract_patch(
            find_folder(base),
            tuned,
            output,
            rank=rank,
            energy=energy,
            full=full,
            dtype=dtype,
            overwrite=overwrite,
            advance=advance,
        )
    if as_json:
        click.echo(json.dumps(done.to_dict(), indent=2))
    else:
        print_extracted(done)
    if done.why_not_peft is not None:
        log.info("Note: `patch apply` reads this patch, and PEFT does not: %s", done.why_not_peft)
    if done.files:
        log.info("Note: the tokenizer of %s is another than its base's, and lies beside the patch", finetuned)


@patch.command()
@click.argument("patch")
@_patch("--to", metavar="MODEL", help="Measure θ′ + Δθ_i and what rounding loses, of this model θ′.")
@_patch("--base", metavar="MODEL", help="Measure Δθ_i against θ′ - θ, with this θ.")
@_patch("--other", metavar="PATCH2", help="Measure the residual Δθ′_i - Δθ_i, with this Δθ′_i.")
@output_option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@output_option("--png", type=PATH, metavar="FILE", help="Draw sizes over layers and modules.")
@_patch("--allow-pickle", is_flag=True, help="Read a patch that is kept as a pickle (adapter_model.bin).")
def inspect(
    patch: str,
    to: str | None,
    base: str | None,
    other: str | None,
    as_json: bool,
    png: Path | None,
    allow_pickle: bool,
) -> None:
    """Show how large PATCH is, module by module: Table 1 of PortLLM for any model.

    \b
    ensembler patch inspect ./my-lora --to ./mistral-updated --base ./mistral --png my-lora.png
    """
    import json

    from ensembler.cli.tables import print_patch, progress
    from ensembler.files import find_folder
    from ensembler.patch.formats import read_patch
    from ensembler.patch.geometry import inspect_patch, save_heatmap

    model, old = (None if name is None else find_folder(name) for name in (to, base))
    mine, theirs = (
        None if name is None else read_patch(find_folder(name), allow_pickle=allow_pickle) for name in (patch, other)
    )
    assert mine is not None
    with progress(len(mine.names), label="measuring") as advance:
        report = inspect_patch(mine, model=model, base=old, other=theirs, advance=advance)
    _print_notes(*report.notes, *report.warnings)
    if png is not None:
        save_heatmap(report, png)
    if as_json:
        click.echo(json.dumps(report.to_dict(), ensure_ascii=False, indent=2))
    else:
        print_patch(report)
