"""Measure 16 α of greedy generation in one engine of vLLM over one α, and over a pass for each α.

    .venv-vllm/bin/python benchmarks/grid_vllm.py [MODEL] [--repeats 3] [--new-tokens 64] [--block-size 32] [--eager]

MODEL is `demo`, the embedded family (default), an ensemble's folder, or the folder of one model for all three roles.
32 prompts of DATA are in the engine at once, by default the family's test questions; nothing ends a text before it has
its tokens. In each repeat, after one to warm up: half of the passes, one α each; all 16 α together; the other passes.
"One α" is the median of the passes. Each run starts without a cache of prefixes, so that α share prompts in the grid
alone, and there whole blocks of tokens: a prompt shorter than --block-size shares nothing. The texts are counted
that `transformers` makes too. One JSON row is appended to benchmarks/results/grid_vllm.jsonl. Needs the environment of
`make test-vllm`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import RESULTS, Measured, spread
from vllm_measuring import ALPHAS, model_name, prepare_vllm, read_ensemble

from ensembler import EnsembleForCausalLM
from ensembler.decoding.decoding_options import DecodingOptions
from ensembler.decoding.prompts import EncodedPrompt, encode_prompts, read_prompts
from ensembler.decoding.texts import complete_grid
from ensembler.demo import demo_folder
from ensembler.engine.grid import GridPoint, make_grid
from ensembler.preflight import CheckedEnsemble
from ensembler.serving.vllm_engine import Engine, complete_in_engine

OUT = RESULTS / "grid_vllm.jsonl"
DATA = demo_folder() / "data" / "test.jsonl"
NUM_PROMPTS, GOAL = 32, 4.0
Texts = dict[tuple[int, GridPoint], list[int]]
"""New tokens by prompt and point."""


@dataclass(frozen=True, kw_only=True)
class Row(Measured):
    """One run; ratios are medians, smallest and largest of the repeats.

    `prompt_tokens`: the shortest and the longest prompt. Of `texts`, one for each prompt and α, `as_transformers` are
    those of the other backend, and `different` are no other α's of their prompt.
    """

    model: str
    vllm: str
    dtype: str
    compiled: bool
    block_size: int
    rule: str
    alphas: list[float]
    num_prompts: int
    prompt_tokens: tuple[int, int]
    new_tokens: int
    repeats: int
    one_seconds: float
    grid_seconds: float
    passes_seconds: float
    over_one: float
    over_one_spread: tuple[float, float]
    over_passes: float
    over_passes_spread: tuple[float, float]
    texts: int
    as_transformers: int
    different: int


@dataclass(frozen=True)
class Work:
    """All that a run has beside its points."""

    engine: Engine
    tokenizer: Any
    prompts: list[EncodedPrompt]
    options: DecodingOptions

    def run(self, points: Sequence[GridPoint]) -> tuple[float, Texts]:
        """Return seconds and texts of all prompts at these points."""
        self.engine._llm.reset_prefix_cache()
        start = time.perf_counter()
        found = list(complete_in_engine(self.engine, self.tokenizer, self.prompts, points, self.options))
        seconds = time.perf_counter() - start
        return seconds, {(one.number, point): one.samples[point][0].ids for one in found for point in points}


def measure(work: Work, points: list[GridPoint], repeats: int) -> tuple[list[float], list[list[float]], Texts]:
    """Return by repeat the seconds of the grid and of each pass, and the texts; say where a pass has others."""
    grids, passes, half = [], [], len(points) // 2
    for repeat in range(repeats + 1):
        first = [work.run([point]) for point in points[:half]]
        seconds, texts = work.run(points)
        alone = [*first, *(work.run([point]) for point in points[half:])]
        if any(texts[key] != ids for _, made in alone for key, ids in made.items()):
            print("some texts of the grid are others than in a pass of their own", file=sys.stderr)
        if repeat:  # the first is a warm-up
            grids.append(seconds)
            passes.append([one for one, _ in alone])
        one = statistics.median(one for one, _ in alone)
        print(f"{repeat}: {len(points)} α {seconds:.2f} s, one {one:.2f} s", file=sys.stderr, flush=True)
    return grids, passes, texts


def texts_of_transformers(checked: CheckedEnsemble, work: Work, points: list[GridPoint]) -> Texts:
    model = EnsembleForCausalLM.from_checked(checked)
    model.generation_config.eos_token_id = None
    found = complete_grid(model, work.tokenizer, work.prompts, points, work.options, batch_size=len(work.prompts))
    return {(one.number, point): one.samples[point][0].ids for one in found for point in points}


def num_different(texts: Texts) -> int:
    return len({(number, tuple(ids)) for (number, _), ids in texts.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--data", type=Path, default=DATA, help='JSON lines with a "prompt" each')
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--block-size", type=int, help="in tokens, on a CPU a multiple of 32; by default vLLM's, 128")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--eager", action="store_true", help="Leave vLLM's members uncompiled.")
    parser.add_argument("--results", type=Path, default=OUT)
    args = parser.parse_args()
    version, threads = prepare_vllm(), torch.get_num_threads()
    checked = read_ensemble(args.model, args.dtype)
    tokenizer = checked.require_tokenizer()
    prompts = encode_prompts(read_prompts(args.data)[:NUM_PROMPTS], tokenizer)
    lengths = [len(prompt.ids) for prompt in prompts]
    settings = {"dtype": args.dtype, "enforce_eager": args.eager, "max_model_len": max(lengths) + args.new_tokens}
    if args.block_size is not None:
        settings["block_size"] = args.block_size
    rule = checked.config.get_rule().name
    points, options = make_grid([rule], ALPHAS), DecodingOptions(args.new_tokens, draft="none")
    with Engine(checked, settings) as engine:
        engine.generation_config.eos_token_id = None
        work = Work(engine, tokenizer, prompts, options)
        block_size = engine._llm.llm_engine.vllm_config.cache_config.block_size
        grids, passes, texts = measure(work, points, args.repeats)
    torch.set_num_threads(threads)  # vLLM leaves one to the process that starts its engines
    theirs = texts_of_transformers(checked, work, points)
    over_one = [grid / statistics.median(ones) for grid, ones in zip(grids, passes, strict=True)]
    over_passes = [grid / sum(ones) for grid, ones in zip(grids, passes, strict=True)]
    row = Row(
        model=model_name(args.model),
        vllm=version,
        dtype=args.dtype,
        compiled=not args.eager,
        block_size=block_size,
        rule=rule,
        alphas=list(ALPHAS),
        num_prompts=len(prompts),
        prompt_tokens=(min(lengths), max(lengths)),
        new_tokens=args.new_tokens,
        repeats=args.repeats,
        one_seconds=round(statistics.median(one for ones in passes for one in ones), 3),
        grid_seconds=round(statistics.median(grids), 3),
        passes_seconds=round(statistics.median(map(sum, passes)), 3),
        over_one=round(statistics.median(over_one), 3),
        over_one_spread=spread(over_one),
        over_passes=round(statistics.median(over_passes), 3),
        over_passes_spread=spread(over_passes),
        texts=len(texts),
        as_transformers=sum(texts[key] == theirs[key] for key in texts),
        different=num_different(texts),
    )
    row.append(args.results)
    report(row)


def report(row: Row) -> None:
    for name, ratio, (low, high) in (
        (f"one α ({row.one_seconds} s)", row.over_one, row.over_one_spread),
        (f"a pass for each ({row.passes_seconds} s)", row.over_passes, row.over_passes_spread),
    ):
        print(f"{len(row.alphas)} α together ({row.grid_seconds} s) over {name}: {ratio:.2f} ({low:.2f} to {high:.2f})")
    print(f"the goal over one α, {GOAL:g}, is {'met' if row.over_one <= GOAL else 'missed'}")
    print(f"texts as transformers makes them: {row.as_transformers} of {row.texts}, different ones: {row.different}")


if __name__ == "__main__":
    main()
