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
    _print_notices(plan.notes, () if force else plan.warnings)
    if out is None or check:
        click.echo(f"{to}: {len(plan.names):,} of {len(plan.tensors):,} tensors change; everything fits")
        return
    from ensembler.cli.tables import byte_progress
    from ensembler.patch.apply import run_plan
    from ensembler.planning.budgets import show_size

    with byte_progress("writing", plan.num_bytes) as advance:
        done = run_plan(plan, out, dtype=dtype, advance=advance)
    click.echo(
        f"{out}: {done.num_changed:,} of {done.num_tensors:,} tensors changed, {show_size(done.num_bytes)} in "
        f"{done.seconds:.1f} s",
        err=True,
    )


def _print_notices(notes: tuple[str, ...], warnings: tuple[str, ...]) -> None:
    for line in (*(f"Note: {note}" for note in notes), *(f"Warning: {warning}" for warning in warnings)):
        click.echo(line, err=True)


def _check_dtype(dtype: str | None) -> None:
    from ensembler.patch.headers import FLOATS

    if dtype is not None and dtype not in FLOATS:
        raise ConfigError(f"unknown dtype {dtype!r}; expected one of: {', '.join(FLOATS)}")


@patch.command()
@click.option("--base", required=True, metavar="MODEL", help="The model before the fine-tuning, θ.")
@click.option("--finetuned", required=True, metavar="MODEL", help="The model after it, θ_i.")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="The new patch folder.")
@click.option("--rank", type=int, help="Keep this many singular values of every matrix.")
@click.option("--energy", type=float, help="Keep this share of every matrix's ‖Δ‖².  [default: 0.95]")
@click.option("--full", is_flag=True, help="Keep every delta as it is: as large as the model.")
@click.option("--dtype", default="float32", show_default=True, metavar="DTYPE", help="Of the factors and deltas.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def extract(
    base: str,
    finetuned: str,
    out: Path,
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
    ensembler patch extract --base mistralai/Mistral-7B-v0.1 --finetuned ./my-tuned --out ./my-patch --rank 16
    """
    import json

    from ensembler.cli.tables import byte_progress, print_extracted
    from ensembler.patch.extract import extract_patch
    from ensembler.patch.headers import model_tensors
    from ensembler.patch.places import local_folder

    _check_dtype(dtype)
    if rank is None and energy is None and not full:
        energy = 0.95
    tuned = local_folder(finetuned)
    num_bytes = sum(tensor.num_bytes for tensor in model_tensors(tuned).values())
    with byte_progress("comparing", num_bytes) as advance:
        done = extract_patch(
            local_folder(base), tuned, out, rank=rank, energy=energy, full=full, dtype=dtype, advance=advance
        )
    if as_json:
        click.echo(json.dumps(done.to_dict(), indent=2))
    else:
        print_extracted(done)


@patch.command()
@click.argument("patch")
@click.option("--to", metavar="MODEL", help="Measure θ′ + Δθ_i and what rounding loses, of this model θ′.")
@click.option("--base", metavar="MODEL", help="Measure Δθ_i against θ′ - θ, with this θ.")
@click.option("--other", metavar="PATCH2", help="Measure the residual Δθ′_i - Δθ_i, with this Δθ′_i.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--png", type=click.Path(path_type=Path), metavar="FILE", help="Draw sizes over layers and modules.")
@click.option("--force", is_flag=True, help="Do not warn when PATCH was made for another model than --base.")
@click.option("--allow-pickle", is_flag=True, help="Read a patch that is kept as a pickle (adapter_model.bin).")
def inspect(
    patch: str,
    to: str | None,
    base: str | None,
    other: str | None,
    as_json: bool,
    png: Path | None,
    force: bool,
    allow_pickle: bool,
) -> None:
    """Show how large PATCH is, module by module: Table 1 of PortLLM for any model.

    \b
    ensembler patch inspect ./my-lora --to ./mistral-updated --base ./mistral --png my-lora.png
    """
    import json

    from ensembler.cli.tables import print_patch, progress
    from ensembler.patch.formats import read_patch
    from ensembler.patch.heatmap import save_heatmap
    from ensembler.patch.inspect import inspect_patch
    from ensembler.patch.places import local_folder

    model, old, theirs = (None if name is None else local_folder(name) for name in (to, base, other))
    mine = local_folder(patch)
    num_tensors = len(read_patch(mine, allow_pickle=allow_pickle).names)
    with progress(num_tensors, shown=True, label="measuring") as advance:
        report = inspect_patch(mine, model=model, base=old, other=theirs, allow_pickle=allow_pickle, advance=advance)
    _print_notices(report.notes, () if force else report.warnings)
    if png is not None:
        save_heatmap(report, png)
    if as_json:
        click.echo(json.dumps(report.to_dict(), ensure_ascii=False, indent=2))
    else:
        print_patch(report)
