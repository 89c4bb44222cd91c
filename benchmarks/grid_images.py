"""Measure 16 α over one when images are classified: the time of a sweep's chunks.

    python benchmarks/grid_images.py [--size 224] [--layers 12] [--classes 100] [--images 64] [--batch-size 8]

Three random ViTs of the size of a ViT-B (768 wide, patches of 16) by default stand for the members: what is timed does
not depend on their weights. Images are random pixels, prepared once; a chunk is timed from prepared images to answers,
as a sweep runs it: forwards of the members, combination at every α, the answers. The two grids are timed by turns in
one process, chunk by chunk, so that drift hits both; each repeat gives one ratio. One JSON row is appended to
benchmarks/results/grid_images.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from measuring import RESULTS, Measured, spread
from PIL import Image
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from ensembler import EnsembleForImageClassification
from ensembler.engine.grid import Grid, GridPoint, make_grid
from ensembler.evaluation.documents import Document
from ensembler.vision.answers import answer_prepared

OUT = RESULTS / "grid_images.jsonl"
Chunk = tuple[list[Document], dict[str, Tensor]]  # images, and what their members read
GRIDS = {"one": [1.0], "grid": [k / 10 for k in range(16)]}
ROLES = ("source_ft", "source_pt", "target_pt")


@dataclass(frozen=True, kw_only=True)
class Row(Measured):
    """One run. Ratios are of the grid over one α: of the repeats median, smallest and largest."""

    size: int
    layers: int
    num_classes: int
    num_images: int
    num_alphas: int
    batch_size: int
    repeats: int
    one_seconds: float
    time_ratio: float
    time_spread: tuple[float, float]


def make_members(folder: Path, args: argparse.Namespace) -> dict[str, Path]:
    names = [f"class {index}" for index in range(args.classes)]
    for seed, role in enumerate(ROLES):
        torch.manual_seed(seed)
        config = ViTConfig(
            image_size=args.size,
            num_hidden_layers=args.layers,
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
        )
        ViTForImageClassification(config).save_pretrained(folder / role)
        ViTImageProcessorPil(size={"height": args.size, "width": args.size}).save_pretrained(folder / role)
    return {role: folder / role for role in ROLES}


def make_chunks(model: EnsembleForImageClassification, args: argparse.Namespace) -> list[Chunk]:
    generator = np.random.default_rng(0)
    chunks = []
    for start in range(0, args.images, args.batch_size):
        num = min(args.batch_size, args.images - start)
        pixels = generator.integers(0, 256, (num, args.size, args.size, 3), dtype=np.uint8)
        documents = [Document("random", "test", start + i, {}, "", (), gold=model.classes[0]) for i in range(num)]
        chunks.append((documents, model.prepare([Image.fromarray(image) for image in pixels])))
    return chunks


def seconds(model: EnsembleForImageClassification, chunk: Chunk, points: list[GridPoint]) -> float:
    begun = time.perf_counter()
    answer_prepared(model, Grid.of(points, model.rule, model.contract, "mask").to(model.device), *chunk)
    return time.perf_counter() - begun


def one_repeat(model: EnsembleForImageClassification, chunks: list[Chunk]) -> dict[str, float]:
    """Seconds over all chunks; which grid is first changes from chunk to chunk."""
    found = dict.fromkeys(GRIDS, 0.0)
    for index, chunk in enumerate(chunks):
        for name in sorted(GRIDS, reverse=bool(index % 2)):
            found[name] += seconds(model, chunk, make_grid([model.rule.name], GRIDS[name]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("size", 224), ("layers", 12), ("classes", 100), ("images", 64), ("batch-size", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = EnsembleForImageClassification.from_members(members=make_members(Path(folder), args))
        chunks = make_chunks(model, args)
        one_repeat(model, chunks[:1])  # the first run of everything
        found = [one_repeat(model, chunks) for _ in range(args.repeats)]
    ratios = [each["grid"] / each["one"] for each in found]
    row = Row(
        size=args.size,
        layers=args.layers,
        num_classes=args.classes,
        num_images=args.images,
        num_alphas=len(GRIDS["grid"]),
        batch_size=args.batch_size,
        repeats=args.repeats,
        one_seconds=round(statistics.median(each["one"] for each in found), 4),
        time_ratio=round(statistics.median(ratios), 4),
        time_spread=spread(ratios),
    )
    row.append(OUT)
    print(row)


if __name__ == "__main__":
    main()
