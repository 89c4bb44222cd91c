"""Measure 16 α of greedy generation over one: all of them decoded together, and one by `generate`.

    python benchmarks/grid_generate.py SOURCE_PT SOURCE_FT TARGET_PT DATA [--rules base-change] [--repeats 5]

Members are folders; SOURCE_FT may be a LoRA adapter of SOURCE_PT (the committed rows are of the trio that
examples/make_smollm2_trio.py makes). DATA has gsm8k/test.jsonl, of which the first questions are asked, without
examples. Nothing ends a text before it has its tokens, so that every α has the same work. Timed by turns in one
process: the grid, then one α of it, another in each turn, whose texts must be those of the grid. A ratio is of one
turn. One JSON row is appended to benchmarks/results/grid_generate.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from measuring import RESULTS, Measured, spread

from ensembler import EnsembleForCausalLM
from ensembler.decoding.decoder import Decoder
from ensembler.decoding.decoding_options import DecodingOptions
from ensembler.decoding.prompts import EncodedPrompt, text_ids
from ensembler.decoding.texts import GridCompletion, complete_grid, complete_prompts, decoder_of
from ensembler.engine.grid import GridPoint
from ensembler.patch.formats import ADAPTER_CONFIG

OUT = RESULTS / "grid_generate.jsonl"


@dataclass(frozen=True, kw_only=True)
class Row(Measured):
    """One run. Ratios are over one α: median, smallest and largest of the repeats; rows are different texts."""

    members: dict[str, str]
    rules: list[str]
    alphas: list[float]
    num_prompts: int
    prompt_tokens: int
    num_tokens: int
    repeats: int
    one_seconds: float
    grid_seconds: float
    ratio: float
    ratio_spread: tuple[float, float]
    mean_rows: float


def read_questions(data: Path, model: EnsembleForCausalLM, num_prompts: int) -> list[EncodedPrompt]:
    lines = (data / "gsm8k" / "test.jsonl").read_text("utf-8").splitlines()[:num_prompts]
    texts = [f"Question: {json.loads(line)['question']}\nAnswer:" for line in lines]
    return [EncodedPrompt(number, text_ids(model.tokenizer, text)) for number, text in enumerate(texts)]


def run_grid(
    model: EnsembleForCausalLM, prompts: list[EncodedPrompt], points: list[GridPoint], options: DecodingOptions
) -> tuple[float, list[GridCompletion], Decoder]:
    decoder = decoder_of(options, points=points)
    start = time.perf_counter()
    found = list(
        complete_grid(model, model.tokenizer, prompts, points, options, batch_size=len(prompts), decoder=decoder)
    )
    return time.perf_counter() - start, found, decoder


def run_one(
    model: EnsembleForCausalLM, prompts: list[EncodedPrompt], alpha: float, options: DecodingOptions
) -> tuple[float, dict[int, list[int]]]:
    model.alpha = alpha
    start = time.perf_counter()
    found = complete_prompts(model, model.tokenizer, prompts, options, batch_size=len(prompts))
    texts = {completion.number: completion.samples[0].ids for completion in found}
    return time.perf_counter() - start, texts


def check_equal(grid: list[GridCompletion], point: GridPoint, alone: dict[int, list[int]]) -> None:
    for completion in grid:
        if completion.samples[point][0].ids != alone[completion.number]:
            sys.exit(f"prompt {completion.number} has other tokens in the grid than alone, at {point}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("source_pt", "source_ft", "target_pt", "data"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--rules", default="base-change", help="comma-separated; one α is of the first")
    parser.add_argument("--alphas", type=int, default=16, help="how many, from 0 in steps of 0.1")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--results", type=Path, default=OUT)
    args = parser.parse_args()
    rules = args.rules.split(",")
    folders = {role: getattr(args, role) for role in ("source_ft", "source_pt", "target_pt")}
    members = {role: {"model": str(folder)} for role, folder in folders.items()}
    if (args.source_ft / ADAPTER_CONFIG).is_file():
        members["source_ft"] = {"model": str(args.source_pt), "adapter": str(args.source_ft)}
    model = EnsembleForCausalLM.from_members(rule=rules[0], members=members)
    model.generation_config.eos_token_id = None
    prompts = read_questions(args.data, model, args.prompts)
    alphas = [round(0.1 * index, 1) for index in range(args.alphas)]
    points = [GridPoint(rule, alpha) for rule in rules for alpha in alphas]
    options = DecodingOptions(max_new_tokens=args.tokens, draft="none")
    grids, ones = [], []
    for repeat in range(args.repeats + 1):
        alpha = alphas[(7 + 5 * repeat) % len(alphas)]
        grid_seconds, grid, decoder = run_grid(model, prompts, points, options)
        one_seconds, alone = run_one(model, prompts, alpha, options)
        check_equal(grid, GridPoint(rules[0], alpha), alone)
        if repeat:  # the first is a warm-up
            grids.append(grid_seconds)
            ones.append(one_seconds)
        print(f"grid {grid_seconds:.2f} s, α = {alpha} alone {one_seconds:.2f} s", file=sys.stderr)
    ratios = [grid / one for grid, one in zip(grids, ones, strict=True)]
    row = Row(
        members={role: folder.name for role, folder in folders.items()},
        rules=rules,
        alphas=alphas,
        num_prompts=len(prompts),
        prompt_tokens=sum(len(prompt.ids) for prompt in prompts),
        num_tokens=args.tokens,
        repeats=args.repeats,
        one_seconds=round(statistics.median(ones), 3),
        grid_seconds=round(statistics.median(grids), 3),
        ratio=round(statistics.median(ratios), 3),
        ratio_spread=spread(ratios),
        mean_rows=decoder.stats.to_row()["rows_per_step"],
    )
    row.append(args.results)
    low, high = row.ratio_spread
    print(f"{len(points)} points over one α ({row.one_seconds} s): {row.ratio:.2f} ({low:.2f} to {high:.2f})")
    print(f"mean number of different texts {row.mean_rows} of {len(points) * len(prompts)}")


if __name__ == "__main__":
    main()
