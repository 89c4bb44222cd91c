"""`ensembler patch`: carry a fine-tuning to another version of its model, by addition."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ensembler.cli.command_class import Command, log
from ensembler.cli.option_groups import PATH, output_option, replace_option
from ensembler.cli.patch_options import (
    device_option,
    patch_option,
    reading_options,
    strength_options,
    transport_options,
)
from ensembler.errors import ConfigError

if TYPE_CHECKING:
    from ensembler.patch.patch_plan import PatchPlan


class _Group(click.Group):
    command_class = Command


@click.group(cls=_Group)
def patch() -> None:
    """Carry a fine-tuning to another version of its model by adding weights: no training (PortLLM).

    PATCH is a PEFT LoRA folder or one that `patch extract` made; models are folders or hub ids.
    """


@patch.command()
@click.argument("patch")
@patch_option("--to", required=True, metavar="MODEL", help="The model to add it to, an updated one for example.")
@output_option("--output", type=PATH, metavar="DIR", help="The new folder.")
@replace_option
@strength_options
@patch_option("--dtype", metavar="DTYPE", help="float32, bfloat16 or float16.  [default: each tensor keeps its own]")
@patch_option(
    "--max-loss",
    type=click.FloatRange(min=0),
    default=0.5,
    show_default=True,
    help="Warn where quantising again loses more of PATCH in a module.",
)
@patch_option(
    "--keep-bf16", multiple=True, metavar="PATTERN", help="Write these quantised modules in bfloat16; repeat it."
)
@transport_options
@device_option
@patch_option("--check", is_flag=True, help="Only say whether it fits, from the headers of the files.")
@reading_options
def apply(
    patch: str,
    to: str,
    output: Path | None,
    overwrite: bool,
    scale: tuple[str, ...],
    also: tuple[str, ...],
    scale2: tuple[float, ...],
    dtype: str | None,
    max_loss: float,
    keep_bf16: tuple[str, ...],
    transport: str,
    old: str | None,
    data: Path | None,
    device: str,
    check: bool,
    allow_pickle: bool,
    unwrap: bool,
) -> None:
    """Write MODEL with PATCH added to DIR: a model like any other.

    fp32 arithmetic and one rounding; memory is a few blocks of a tensor. The folder appears when it is complete.
    Weights in FP8, INT4 (compressed-tensors, GPTQ, AWQ), bitsandbytes' 4 bits or MXFP4 are quantised again, and what
    that loses of PATCH is said.

    \b
    ensembler patch apply ./my-lora --to ./mistral-updated --output ./mistral-mine
    """
    from ensembler.files import other_tokenizer
    from ensembler.patch.apply import apply_plan, check_output
    from ensembler.patch.patch_device import find_device
    from ensembler.patch.requantize import kept_weights

    if output is None and not check:
        raise ConfigError("--output is missing; name the new folder, or add --check to see whether the patch fits")
    _check_dtype(dtype)
    on = find_device(device)
    plan = _plan(patch, to, scale, also, scale2, allow_pickle=allow_pickle, unwrap=unwrap)
    kept_weights(plan, keep_bf16)  # patterns that match nothing are told before the work of a transport
    if output is not None and not check:
        check_output(plan, output, overwrite=overwrite)  # before the work of a transport
    plan = _carried(plan, transport, old, data, only_check=check)
    _print_notes(*plan.notes, *plan.warnings)
    for each in plan.patches:
        names = other_tokenizer(each.folder, plan.model.folder)
        if names:
            command = shlex.join(["cp", *(str(each.folder / name) for name in names), str(output or "DIR")])
            log.info(
                "Note: %s has a tokenizer or chat template of its own, and the result keeps that of %s; where the "
                "patch was trained with it: %s",
                *(each.folder, to, command),
            )
    if output is None or check:
        click.echo(f"{to}: {len(plan.names):,} of {plan.num_weights:,} tensors change; everything fits")
        return
    from ensembler.cli.tables import byte_progress, print_losses
    from ensembler.planning.sizes import show_size

    with byte_progress("writing", plan.model.num_bytes) as advance:
        start = time.monotonic()
        done = apply_plan(
            plan, output, dtype=dtype, keep_bf16=keep_bf16, overwrite=overwrite, device=on, advance=advance
        )
    seconds = time.monotonic() - start
    changed = f"{len(plan.names)} of {plan.num_weights} tensors changed"
    log.info("%s: %s, %s in %.1f s", output, changed, show_size(done.num_bytes), seconds)
    print_losses(done, max_loss)


def _plan(
    patch: str,
    model: str,
    scale: tuple[str, ...],
    also: tuple[str, ...],
    scale2: tuple[float, ...],
    *,
    allow_pickle: bool,
    unwrap: bool,
) -> PatchPlan:
    """Return the plan of a patch and others at their strengths for a model."""
    from ensembler.files import find_folder
    from ensembler.patch.formats import read_patch
    from ensembler.patch.module_scales import Strengths, scale_modules
    from ensembler.patch.patch_plan import plan_patches

    if scale2 and len(scale2) != len(also):
        raise ConfigError(f"--scale2 is given {len(scale2)} times and --also {len(also)} times; give one for each")
    strengths = Strengths.parse(scale)
    given = zip((patch, *also), (strengths.scale, *(scale2 or [1.0] * len(also))), strict=True)
    patches = [
        read_patch(find_folder(name), scale=strength, allow_pickle=allow_pickle, unwrap=unwrap)
        for name, strength in given
    ]
    return scale_modules(plan_patches(patches, find_folder(model)), strengths.by_pattern)


def _carried(
    plan: PatchPlan, transport: str, old: str | None, data: Path | None, *, only_check: bool = False
) -> PatchPlan:
    """Return the plan with the transport of this name; `only_check`: say from headers whether it can carry the plan."""
    from ensembler.evaluation.calibration import labelled_examples
    from ensembler.files import find_folder
    from ensembler.patch.transports.transport import Sources, carried, find_transport

    sources = Sources(
        old=None if old is None else find_folder(old), data=None if data is None else labelled_examples(data)
    )
    kind = find_transport(transport, sources)
    if only_check:
        kind.check(plan, sources)
        return plan
    return carried(plan, transport, sources, _progress)


def _progress(total: int, label: str) -> AbstractContextManager[Callable[[int], None]]:
    from ensembler.cli.tables import progress

    return progress(total, label=label)


@patch.command()
@click.argument("patch")
@patch_option("--from", "old", required=True, metavar="MODEL", help="The base that PATCH was made for.")
@patch_option("--to", required=True, metavar="MODEL", help="The base to make it for, of other widths or depth.")
@patch_option("--texts", type=PATH, required=True, metavar="FILE", help='JSON lines such as {"text": "..."}.')
@output_option("--output", type=PATH, required=True, metavar="DIR", help="The folder of the new LoRA.")
@replace_option
@patch_option("--scale", type=float, default=1.0, show_default=True, help="Strength of PATCH.")
@reading_options
def transport(
    patch: str,
    old: str,
    to: str,
    texts: Path,
    output: Path,
    overwrite: bool,
    scale: float,
    allow_pickle: bool,
    unwrap: bool,
) -> None:
    """Write PATCH as a LoRA of another base of the same architecture, of any widths and depth (procrustes).

    Both bases read the texts, in fp32; orthogonal maps between their activations carry the factors. Some thousand
    tokens, more than the widest layer, are needed, and both bases split texts alike.

    \b
    ensembler patch transport ./my-lora --from ./qwen-0.5b --to ./qwen-1.5b --texts texts.jsonl --output ./my-lora-1.5b
    """
    from ensembler.evaluation.calibration import plain_texts
    from ensembler.files import find_folder
    from ensembler.patch.formats import read_patch
    from ensembler.patch.transports.carry_lora import carry_lora

    given = read_patch(find_folder(patch), scale=scale, allow_pickle=allow_pickle, unwrap=unwrap)
    folders = find_folder(old), find_folder(to)
    _print_notes(*carry_lora(given, *folders, plain_texts(texts), output, overwrite=overwrite, progress=_progress))
    log.info("%s: a LoRA of %s", output, to)


@patch.command()
@click.argument("base")
@click.argument("patch")
@click.argument("out")
@strength_options
@transport_options
@device_option
@patch_option("--blocks", type=click.IntRange(min=1), default=3, show_default=True, help="Of every tensor.")
@reading_options
def verify(
    base: str,
    patch: str,
    out: str,
    scale: tuple[str, ...],
    also: tuple[str, ...],
    scale2: tuple[float, ...],
    transport: str,
    old: str | None,
    data: Path | None,
    device: str,
    blocks: int,
    allow_pickle: bool,
    unwrap: bool,
) -> None:
    """Check that OUT is BASE with PATCH added: blocks of every tensor are computed again and compared bit by bit.

    \b
    ensembler patch verify ./mistral-updated ./my-lora ./mistral-mine
    """
    from ensembler.cli.tables import progress
    from ensembler.files import find_folder
    from ensembler.patch.patch_device import find_device
    from ensembler.patch.verify import verify_applied

    on = find_device(device)
    plan = _plan(patch, base, scale, also, scale2, allow_pickle=allow_pickle, unwrap=unwrap)
    plan = _carried(plan, transport, old, data)
    with progress(len(plan.model.tensors), label="comparing") as advance:
        done = verify_applied(plan, find_folder(out), num_blocks=blocks, device=on, advance=advance)
    click.echo(f"{out}: {done.num_blocks:,} blocks of {done.num_tensors:,} tensors are those of {base} with the patch")


def _print_notes(*notes: str) -> None:
    for note in notes:
        log.info("Note: %s", note)


def _check_dtype(dtype: str | None) -> None:
    from ensembler.safetensors_files import FLOATS

    if dtype is not None and dtype not in FLOATS:
        raise ConfigError(f"unknown dtype {dtype!r}; expected one of: {', '.join(FLOATS)}")


@patch.command()
@patch_option("--base", required=True, metavar="MODEL", help="The model before the fine-tuning, θ.")
@patch_option("--finetuned", required=True, metavar="MODEL", help="The model after it, θ_i.")
@output_option("--output", required=True, type=PATH, metavar="DIR", help="The new patch folder.")
@replace_option
@patch_option("--rank", type=int, help="Keep this many singular values of every matrix.")
@patch_option("--energy", type=float, help="Keep this share of every matrix's ‖Δ‖².  [default: 0.95]")
@patch_option("--full", is_flag=True, help="Keep every delta as it is: as large as the model.")
@patch_option("--dtype", default="float32", show_default=True, metavar="DTYPE", help="Of the factors and deltas.")
@device_option
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
    device: str,
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
    from ensembler.patch.patch_device import find_device
    from ensembler.safetensors_files import read_model

    _check_dtype(dtype)
    on = find_device(device)
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
            device=on,
            advance=advance,
        )
    if as_json:
        click.echo(json.dumps(done.to_dict(), indent=2))
    else:
        print_extracted(done)
    if done.why_not_peft is not None:
        remedy = "" if rank is not None or full else "; of one --rank for all matrices it may"
        log.info("Note: `patch apply` reads this patch, and PEFT does not: %s%s", done.why_not_peft, remedy)
    if done.files:
        log.info("Note: the tokenizer of %s is another than its base's, and lies beside the patch", finetuned)


@patch.command()
@click.argument("patch")
@patch_option("--to", metavar="MODEL", help="Measure θ′ + Δθ_i and what rounding loses, of this model θ′.")
@patch_option("--base", metavar="MODEL", help="Measure Δθ_i against θ′ - θ, with this θ.")
@patch_option("--other", metavar="PATCH2", help="Measure the residual Δθ′_i - Δθ_i, with this Δθ′_i.")
@output_option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@output_option("--png", type=PATH, metavar="FILE", help="Draw sizes over layers and modules.")
@patch_option("--allow-pickle", is_flag=True, help="Read a patch that is kept as a pickle (adapter_model.bin).")
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
