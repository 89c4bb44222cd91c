"""`ensembler classify`: what an ensemble of image classifiers sees in images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ensembler.cli.command_class import Command, log, section
from ensembler.cli.ensemble_options import EnsembleOptions
from ensembler.cli.image_options import say_others
from ensembler.cli.option_groups import PATH, output_option, point_options, strict_option
from ensembler.errors import RunError

if TYPE_CHECKING:
    from ensembler.vision.image_modeling import EnsembleForImageClassification


_image_option, _devices = section("Images"), section("Devices")


@click.command(cls=Command)
@click.argument("ensemble")
@click.argument("images", nargs=-1, required=True, type=PATH, metavar="IMAGE...|FOLDER")
@point_options
@_image_option("--top-k", type=click.IntRange(1), default=5, show_default=True, help="Classes shown of each image.")
@_image_option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Images run together.")
@_devices("--dtype", multiple=True, metavar="[ROLE=]DTYPE", help="auto, float32, bfloat16 or float16.")
@_devices("--device", multiple=True, metavar="[ROLE=]DEVICE", help="cpu, cuda:1 ...")
@strict_option
@output_option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
def classify(
    ensemble: str,
    images: tuple[Path, ...],
    rule: str | None,
    alpha: float | None,
    top_k: int,
    batch_size: int,
    dtype: tuple[str, ...],
    device: tuple[str, ...],
    strict: bool,
    as_json: bool,
) -> None:
    """Tell what ENSEMBLE sees in images, or in all below a folder.

    An image where α moved the most probable class is marked with the anchor's. One that cannot be
    read ends the command, or with --skip-bad is named and skipped.

    \b
    ensembler classify my-ensemble cat.png dog.jpg
    ensembler classify my-ensemble photos --alpha 0.5 --top-k 3 --json
    """
    from ensembler.vision.answers import classify as classify_images
    from ensembler.vision.image_modeling import EnsembleForImageClassification
    from ensembler.vision.image_preflight import check_images
    from ensembler.vision.images import find_images

    given = EnsembleOptions(ensemble, rule=rule, alpha=alpha, dtype=dtype, device=device)
    checked = check_images(given.load_config())
    sources, num_others = find_images(images)
    say_others(num_others)
    model = EnsembleForImageClassification.from_checked(checked)
    num_skipped = 0
    for row in classify_images(model, sources, top_k=top_k, batch_size=batch_size, strict=strict):
        num_skipped += "error" in row
        _print(row, model, as_json=as_json)
    if num_skipped:
        log.warning("%d of %d images could not be read and were skipped", num_skipped, len(sources))
    if num_skipped == len(sources):
        raise RunError("no image could be read")


def _print(row: dict[str, Any], model: EnsembleForImageClassification, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(row, ensure_ascii=False))
        return
    if "error" in row:
        log.warning("skipped: %s", row["error"])
        return
    click.echo(row["image"])
    for each in row["classes"]:
        click.echo(f"  {each['probability']:6.1%}  {each['label']}")
    first, anchor = row["classes"][0], row["anchor"]
    if anchor["label"] != first["label"]:
        click.echo(
            f"  alpha {model.alpha:g} moves the choice: {model.rule.anchor} alone would say {anchor['label']} "
            f"({anchor['probability']:.1%})"
        )
