"""A picture of a patch: its size over layers and module types."""

from __future__ import annotations

import re
from pathlib import Path

from ensembler.errors import OutputError
from ensembler.extras import require
from ensembler.patch.report import PatchReport


def save_heatmap(report: PatchReport, path: Path) -> None:
    """Write a PNG of ‖Δ‖_F over ‖θ′ + Δ‖_F, or of ‖Δ‖_F where no model was given: layers down, module types across.

    Tensors outside the layers have a row of their own. Raises OutputError where it cannot be written.
    """
    figure_class = require("matplotlib.figure", "eval").Figure
    cells: dict[tuple[int | None, str], float] = {}
    for module in report.modules:
        base = module.patched.frobenius if module.patched is not None else 1.0
        cells[_place(module.name)] = module.patch.frobenius / base if base else 0.0
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    layers = sorted({layer for layer, _ in cells}, key=lambda layer: -1 if layer is None else layer)
    values = [[cells.get((layer, kind), float("nan")) for kind in kinds] for layer in layers]
    figure = figure_class(figsize=(2 + 0.7 * len(kinds), 2 + 0.22 * len(layers)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(kinds)), kinds, rotation=45, ha="right")
    axes.set_yticks(range(len(layers)), ["-" if layer is None else str(layer) for layer in layers])
    axes.set_ylabel("layer")
    against_model = any(module.patched is not None for module in report.modules)
    figure.colorbar(image, label="‖Δ‖ / ‖θ′ + Δ‖" if against_model else "‖Δ‖")
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}; choose another place") from error


def _place(name: str) -> tuple[int | None, str]:
    """The layer of a tensor, by the first number in its name, and what it is there."""
    module = name.removesuffix(".weight")
    match = re.search(r"\.(\d+)\.", module)
    if match is None:
        return None, module.rpartition(".")[2]
    return int(match.group(1)), module[match.end() :].removeprefix("self_attn.").removeprefix("mlp.")
