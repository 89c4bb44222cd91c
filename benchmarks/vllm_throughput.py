"""Tokens per second of an ensemble in vLLM, beside `transformers` and beside its target alone in vLLM.

    .venv-vllm/bin/python benchmarks/vllm_throughput.py [MODEL] [--repeats 3] [--new-tokens 64] [--eager]

MODEL is a folder (default: models/smollm2), loaded three times, as source FT, source PT and target PT; three equal
members cost three times their target. Or it is `demo`, the embedded family, or an ensemble's folder: then that ensemble
is measured, beside its target_pt. By turns in one run, forwards and backwards, the two engines being started once:

- `vllm 1`, `vllm 8`, `vllm 32`: so many requests at once of 64 random tokens, which get 64 new ones;
- `vllm mixed 32`: the same, each request at another point: 16 α of two rules;
- `target 1`, `target 8`, `target 32`: the same of the target alone in vLLM;
- `transformers 1`, `transformers 32`: `generate` of the ensemble with batches of that size;
- `vllm unequal`, `transformers unequal`: 32 requests of 8 to 128 new tokens, where a batch waits for its longest.

One JSON row is appended to benchmarks/results/vllm_throughput.jsonl. Needs the environment of `make test-vllm`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import RESULTS, Measured, spread
from transformers import GenerationConfig
from vllm_measuring import (
    REST_SECONDS,
    decode,
    make_prompts,
    mixed_points,
    model_name,
    prepare_vllm,
    read_ensemble,
    target_folder,
    written,
)

from ensembler import EnsembleForCausalLM
from ensembler.engine.grid import GridPoint
from ensembler.preflight import CheckedEnsemble

OUT = RESULTS / "vllm_throughput.jsonl"
PROMPT_TOKENS = 64
SIZES = (1, 8, 32)
UNEQUAL = (8, 128)
# (name, what is divided, by what); each ratio is taken within a repeat
RATIOS = (
    ("mixed over single", "vllm mixed 32", "vllm 32"),
    ("vllm 32 over transformers 1", "vllm 32", "transformers 1"),
    ("vllm 32 over transformers 32", "vllm 32", "transformers 32"),
    ("vllm 1 over transformers 1", "vllm 1", "transformers 1"),
    ("vllm over transformers, unequal", "vllm unequal", "transformers unequal"),
    *((f"ensemble over target, {size}", f"vllm {size}", f"target {size}") for size in SIZES),
)
GOALS = {"mixed over single": 0.95, "vllm 32 over transformers 32": 0.9}
Run = Callable[[int], int]
"""Decodes with a seed of its prompts, and returns how many new tokens were asked for."""


@dataclass(frozen=True, kw_only=True)
class Row(Measured):
    """One run: tokens per second by way, and ratios with their spread over the repeats.

    `mixed`: the rules of the mixed requests, and how many different points they have.
    """

    model: str
    target: str
    dtype: str
    vllm: str
    compiled: bool
    repeats: int
    prompt_tokens: int
    new_tokens: int
    mixed: tuple[list[str], int]
    tokens_per_second: dict[str, float]
    ratios: dict[str, tuple[float, tuple[float, float]]]


def unequal_lengths(num: int) -> list[int]:
    low, high = UNEQUAL
    return [low + (high - low) * index // (num - 1) for index in range(num)]


def vllm_run(llm: Any, vocab_size: int, lengths: Sequence[int], points: Sequence[GridPoint] = ()) -> Run:
    return lambda seed: decode(llm, make_prompts(vocab_size, len(lengths), PROMPT_TOKENS, seed), lengths, points)


def transformers_run(model: EnsembleForCausalLM, vocab_size: int, lengths: Sequence[int]) -> Run:
    """A batch decodes as many tokens as its longest text has; what is beyond the others' lengths counts for nothing."""
    settings = GenerationConfig(max_new_tokens=max(lengths), do_sample=False, pad_token_id=0)
    model.generation_config = GenerationConfig(pad_token_id=0)  # nothing ends a text before its length

    def run(seed: int) -> int:
        ids = torch.tensor(make_prompts(vocab_size, len(lengths), PROMPT_TOKENS, seed))
        made = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        assert made.shape[1] == PROMPT_TOKENS + max(lengths)
        return sum(lengths)

    return run


def measure(ways: dict[str, Run], repeats: int) -> dict[str, list[float]]:
    """Tokens per second of every way, in each repeat."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(1, repeats + 1):
        in_turn = list(enumerate(ways.items()))
        for number, (name, run) in in_turn if repeat % 2 else reversed(in_turn):
            time.sleep(REST_SECONDS)
            start = time.perf_counter()
            num_tokens = run(1000 * repeat + number)
            rates[name].append(num_tokens / (time.perf_counter() - start))
            print(f"{repeat}: {name} {rates[name][-1]:.1f} tokens/s", file=sys.stderr, flush=True)
    return rates


@contextmanager
def make_ways(checked: CheckedEnsemble, new_tokens: int, **settings: Any) -> Iterator[dict[str, Run]]:
    """Start both engines, load the members for `transformers`, and yield all ways, warmed up."""
    threads, vocab_size = torch.get_num_threads(), checked.contract.shared
    lengths, unequal = [new_tokens], unequal_lengths(SIZES[-1])
    from vllm import LLM

    settings["max_model_len"] = PROMPT_TOKENS + max(new_tokens, UNEQUAL[1])
    with written(checked) as folder:
        ensemble = LLM(folder, load_format="ensembler", **settings)
        target = LLM(target_folder(checked), tokenizer=folder, **settings)
        torch.set_num_threads(threads)  # vLLM leaves one to the process that starts its engines
        model = EnsembleForCausalLM.from_checked(checked)
        points = mixed_points(checked)
        ways = {
            **{f"vllm {size}": vllm_run(ensemble, vocab_size, lengths * size) for size in SIZES},
            f"vllm mixed {len(points)}": vllm_run(ensemble, vocab_size, lengths * len(points), points),
            **{f"target {size}": vllm_run(target, vocab_size, lengths * size) for size in SIZES},
            **{
                f"transformers {size}": transformers_run(model, vocab_size, lengths * size)
                for size in (SIZES[0], SIZES[-1])
            },
            "vllm unequal": vllm_run(ensemble, vocab_size, unequal),
            "transformers unequal": transformers_run(model, vocab_size, unequal),
        }
        for llm in (ensemble, target):
            vllm_run(llm, vocab_size, [4] * SIZES[-1])(0)
        transformers_run(model, vocab_size, [4])(0)
        yield ways
        for llm in (ensemble, target):
            llm.llm_engine.engine_core.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="models/smollm2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--eager", action="store_true", help="Leave vLLM's members uncompiled.")
    parser.add_argument("--results", type=Path, default=OUT)
    args = parser.parse_args()
    engine, checked = prepare_vllm(), read_ensemble(args.model, args.dtype)
    points, target = mixed_points(checked), target_folder(checked)
    with make_ways(checked, args.new_tokens, dtype=args.dtype, enforce_eager=args.eager) as ways:
        rates = measure(ways, args.repeats)
    ratios = {
        name: [one / other for one, other in zip(rates[above], rates[below], strict=True)]
        for name, above, below in RATIOS
    }
    row = Row(
        model=model_name(args.model),
        target=Path(target).name,
        dtype=args.dtype,
        vllm=engine,
        compiled=not args.eager,
        repeats=args.repeats,
        prompt_tokens=PROMPT_TOKENS,
        new_tokens=args.new_tokens,
        mixed=(list(dict.fromkeys(point.rule for point in points)), len(points)),
        tokens_per_second={name: round(statistics.median(values), 2) for name, values in rates.items()},
        ratios={name: (round(statistics.median(values), 3), spread(values)) for name, values in ratios.items()},
    )
    row.append(args.results)
    for name, rate in row.tokens_per_second.items():
        print(f"{name}: {rate} tokens/s")
    for name, (ratio, (low, high)) in row.ratios.items():
        goal = f", goal {GOALS[name]} {'met' if ratio >= GOALS[name] else 'missed'}" if name in GOALS else ""
        print(f"{name}: {ratio:.2f} ({low:.2f} to {high:.2f}){goal}")


if __name__ == "__main__":
    main()
