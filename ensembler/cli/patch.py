"""`ensembler patch`: carry a fine-tuning to another version of its model, by addition."""

from __future__ import annotations

from pathlib import Path

import click

from ensembler.errors import ConfigError


@click.group()
def patch() -> None:
    """Carry a fine-tuning to another version of its model by adding weights: no training (PortLLM).

    PATCH is a PEFT LoRA folder or one that `patch extract` made; models are folders or hub ids.
    """


@patch.command()
@click.argument("patch")
@click.option("--to", required=True, metavar="MODEL", help="The model to add it to, an updated one for example.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="The new folder.")
@click.option("--scale", type=float, default=1.0, show_default=True, help="Strength of PATCH.")
@click.option("--also", multiple=True, metavar="PATCH2", help="Add another patch too; repeat it.")
@click.option("--scale2", type=float, multiple=True, help="Strength of PATCH2, one for each --also.  [default: 1]")
@click.option("--dtype", metavar="DTYPE", help="float32, bfloat16 or float16.  [default: each tensor keeps its own]")
@click.option("--check", is_flag=True, help="Only say whether it fits, from the headers of the files.")
@click.option("--force", is_flag=True, help="Do not warn when PATCH was made for another model than MODEL.")
@click.option("--allow-pickle", is_flag=True, help="Read a patch that is kept as a pickle (adapter_model.bin).")
def apply(
    patch: str,
    to: str,
    out: Path | None,
    scale: float,
    also: tuple[str, ...],
    scale2: tuple[float, ...],
    dtype: str | None,
    check: bool,
    force: bool,
    allow_pickle: bool,
) -> None:
    """Write MODEL with PATCH added to DIR: a model like any other.

    fp32 arithmetic and one rounding; memory is a few blocks of a tensor. The folder appears when it is complete.

    \b
    ensembler patch apply ./my-lora --to ./mistral-updated --out ./mistral-mine
    """
    from ensembler.patch.places import local_folder
    from ensembler.patch.plan import Part, make_plan

    if out is None and not check:
        raise ConfigError("--out is missing; name the new folder, or add --check to see whether the patch fits")
    if scale2 and len(scale2) != len(also):
        raise ConfigError(f"--scale2 is given {len(scale2)} times and --also {len(also)} times; give one for each")
    _check_dtype(dtype)
    given = zip((patch, *also), (scale, *(scale2 or [1.0] * len(also))), strict=True)
    parts = [Part(local_folder(name), strength) for name, strength in given]
    plan = make_plan(parts, local_folder(to), allow_pickle=allow_pickle)
    notices = (*plan.notes, *(() if force else plan.warnings))
    for notice in notices:
        click.echo(f"Note: {notice}", err=True)
    if out is None or check:
        click.echo(f"{to}: {len(plan.names):,} of {len(plan.tensors):,} tensors change; everything fits")
        return
    from ensembler.cli.tables import byte_progress, size
    from ensembler.patch.apply import run_plan

    with byte_progress("writing", plan.num_bytes) as advance:
        done = run_plan(plan, out, dtype=dtype, advance=advance)
    click.echo(
        f"{out}: {done.num_changed:,} of {done.num_tensors:,} tensors changed, {size(done.num_bytes)} in "
        f"{done.seconds:.1f} s",
        err=True,
    )


def _check_dtype(dtype: str | None) -> None:
    from ensembler.patch.headers import FLOATS

    if dtype is not None and dtype not in FLOATS:
        raise ConfigError(f"unknown dtype {dtype!r}; expected one of: {', '.join(FLOATS)}")
