"""Measure 16 α over one when texts are scored: time and peak memory.

    python benchmarks/grid_score.py MODEL TRIO DATA [--rows 128] [--batch-size 8] [--repeats 5]

MODEL is the folder of the source PT (SmolLM2-135M-Instruct), TRIO what examples/make_smollm2_trio.py made of it, DATA a
folder with sst2/dev.jsonl. Each review is scored with both labels by base-change. The two grids are timed by turns in
one process, batch by batch, so that drift hits both; each repeat gives one ratio. Peak memory is the largest resident
size of a fresh process for each, less that of one that only imports. One JSON row is appended to
benchmarks/results/grid_score.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from measuring import RESULTS, Measured, printed_by, resident_mb, spread

from ensembler import EnsembleForCausalLM
from ensembler.engine.grid import GridPoint, make_grid
from ensembler.evaluation.backends import TransformersBackend
from ensembler.evaluation.request_batches import Batch, make_batches
from ensembler.evaluation.requests import encode_request

OUT = RESULTS / "grid_score.jsonl"
GRIDS = {"one": [1.0], "grid": [k / 10 for k in range(16)]}
CHOICES = (" negative", " positive")


@dataclass(frozen=True, kw_only=True)
class Row(Measured):
    """One run. Ratios are of the grid over one α: of the repeats median, smallest and largest; of the peak memory."""

    model: str
    task: str
    num_rows: int
    num_alphas: int
    batch_size: int
    repeats: int
    one_seconds: float
    time_ratio: float
    time_spread: tuple[float, float]
    memory_ratio: float
    one_mb: float
    grid_mb: float


def load(model: Path, trio: Path) -> EnsembleForCausalLM:
    """Source FT is an adapter of source PT, so that the two share a backbone."""
    members = {
        "source_ft": {"model": str(model), "adapter": str(trio / "source_ft")},
        "source_pt": str(model),
        "target_pt": str(trio / "target_pt"),
    }
    return EnsembleForCausalLM.from_members(rule="base-change", members=members)


def reviews(data: Path, num_rows: int, model: EnsembleForCausalLM, batch_size: int) -> list[Batch]:
    lines = (data / "sst2" / "dev.jsonl").read_text(encoding="utf-8").splitlines()[:num_rows]
    texts = [json.loads(line)["sentence"].strip() for line in lines]
    requests = [
        encode_request(model.tokenizer, f"Review: {text}\nSentiment:", CHOICES, f"row {number}", number)
        for number, text in enumerate(texts)
    ]
    return make_batches(requests, batch_size)


def seconds(model: EnsembleForCausalLM, batch: Batch, grid: list[GridPoint]) -> float:
    begun = time.perf_counter()
    list(TransformersBackend(model).score([batch], grid))
    return time.perf_counter() - begun


def one_repeat(model: EnsembleForCausalLM, batches: list[Batch]) -> dict[str, float]:
    """Seconds over all batches; which grid is first changes from batch to batch."""
    found = dict.fromkeys(GRIDS, 0.0)
    for index, batch in enumerate(batches):
        for name in sorted(GRIDS, reverse=bool(index % 2)):
            found[name] += seconds(model, batch, make_grid([model.rule.name], GRIDS[name]))
    return found


def peak_memory(kind: str, args: argparse.Namespace) -> float:
    """Return the peak resident size in MB of a fresh process that scores with a grid, or does nothing."""
    options = ["--rows", args.rows, "--batch-size", args.batch_size, "--memory-of", kind]
    return printed_by(__file__, args.model, args.trio, args.data, *options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("trio", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--results", type=Path, default=OUT)
    parser.add_argument("--memory-of", choices=["nothing", *GRIDS], help=argparse.SUPPRESS)
    args = parser.parse_args()
    for path in (args.model / "config.json", args.trio / "target_pt", args.data / "sst2" / "dev.jsonl"):
        if not path.exists():
            sys.exit(f"there is no {path}; see the first lines of --help")
    if args.memory_of:
        if args.memory_of != "nothing":
            model = load(args.model, args.trio)
            grid = make_grid([model.rule.name], GRIDS[args.memory_of])
            list(TransformersBackend(model).score(reviews(args.data, args.rows, model, args.batch_size), grid))
        print(resident_mb())
        return
    nothing, one, grid_mb = (peak_memory(kind, args) for kind in ("nothing", *GRIDS))
    model = load(args.model, args.trio)
    batches = reviews(args.data, args.rows, model, args.batch_size)
    found = []
    for repeat in range(args.repeats + 1):
        took = one_repeat(model, batches)
        if repeat:  # the first is a warm-up
            found.append(took)
            print(", ".join(f"{name} {value:.2f} s" for name, value in took.items()), file=sys.stderr)
    ratios = [took["grid"] / took["one"] for took in found]
    row = Row(
        model=args.model.name,
        task="sst2",
        num_rows=sum(len(batch.requests) for batch in batches),
        num_alphas=len(GRIDS["grid"]),
        batch_size=args.batch_size,
        repeats=args.repeats,
        one_seconds=round(statistics.median(took["one"] for took in found), 3),
        time_ratio=round(statistics.median(ratios), 4),
        time_spread=spread(ratios),
        memory_ratio=round((grid_mb - nothing) / (one - nothing), 4),
        one_mb=round(one - nothing, 1),
        grid_mb=round(grid_mb - nothing, 1),
    )
    row.append(args.results)
    print(f"{row.num_alphas} alphas over one ({row.one_seconds} s and {row.one_mb:.0f} MB for {row.num_rows} reviews)")
    print(f"  time {row.time_ratio:.3f} ({row.time_spread[0]:.3f} to {row.time_spread[1]:.3f})")
    print(f"  memory {row.memory_ratio:.3f}")


if __name__ == "__main__":
    main()
