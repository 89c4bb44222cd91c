"""Measure `--compile`: tokens per second of an ensemble with eager members and with compiled ones.

    python benchmarks/compiled_decode.py [MODEL] [--tokens 64] [--repeats 7]

MODEL is a folder (default: models/smollm2), loaded three times, as source FT, source PT and target PT. Greedy decoding
of one text, timed by turns; the time per token is that between two tokens of `generate`. Prompts have other
lengths in every repeat, all in one bucket of the cache: compilations are counted after the first and after the
last. Peak memory is the largest resident size of a fresh process, compiling included, less that of one that only
imports. One JSON row is appended to benchmarks/results/compiled_decode.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from decode_cost import ROLES, Clock
from measuring import RESULTS, Measured, printed_by, resident_mb, spread
from torch._dynamo.testing import CompileCounterWithBackend

from ensembler import EnsembleForCausalLM
from ensembler.engine.row_cache import bucket

OUT = RESULTS / "compiled_decode.jsonl"
KINDS = ("eager", "compiled")


@dataclass(frozen=True, kw_only=True)
class Row(Measured):
    """One run. Tokens per second are medians of the repeats; `faster` is compiled over eager, repeat by repeat."""

    model: str
    num_tokens: int
    repeats: int
    eager_tokens_per_s: float
    compiled_tokens_per_s: float
    faster: float
    faster_spread: tuple[float, float]
    same_texts: int
    first_call_s: float
    compilations_first: int
    compilations_last: int
    eager_mb: float
    compiled_mb: float


def load(folder: Path) -> EnsembleForCausalLM:
    model = EnsembleForCausalLM.from_members(alpha=0.5, members=dict.fromkeys(ROLES, str(folder)))
    model.generation_config.eos_token_id = None
    return model


def decode(model: EnsembleForCausalLM, prompt_tokens: int, num_tokens: int) -> tuple[float, list[int]]:
    """Return tokens per second behind the first, and the text."""
    clock = Clock()
    prompt = torch.arange(100, 100 + prompt_tokens)[None]
    text = model.generate(prompt, max_new_tokens=num_tokens, do_sample=False, streamer=clock)
    return 1 / clock.median_step(), text[0].tolist()


def peak_memory(kind: str, folder: Path, num_tokens: int) -> float:
    """Return the peak resident size in MB of a fresh process that decodes so, or does nothing."""
    return printed_by(__file__, str(folder), "--tokens", str(num_tokens), "--memory-of", kind)


def memory_of(kind: str, folder: Path, num_tokens: int) -> float:
    if kind != "nothing":
        model = load(folder)
        if kind == "compiled":
            model.compile_members()
        decode(model, 8, num_tokens)
    return resident_mb()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=Path("models/smollm2"))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--results", type=Path, default=OUT)
    parser.add_argument("--memory-of", choices=["nothing", *KINDS], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not (args.model / "config.json").is_file():
        sys.exit(f"there is no model in {args.model}; give the folder of one")
    if args.memory_of:
        print(memory_of(args.memory_of, args.model, args.tokens))
        return
    lengths = [8 + 3 * repeat for repeat in range(args.repeats + 1)]
    if bucket(lengths[0] + args.tokens - 1) != bucket(lengths[-1] + args.tokens - 1):
        sys.exit(f"{args.repeats} repeats of {args.tokens} tokens leave their bucket; give other numbers")
    memory = {kind: peak_memory(kind, args.model, args.tokens) for kind in ("nothing", *KINDS)}
    counter = CompileCounterWithBackend("inductor")
    models = {kind: load(args.model) for kind in KINDS}
    models["compiled"].compile_members(counter)
    start = time.perf_counter()
    decode(models["compiled"], lengths[0], args.tokens)
    first_call, first_count = time.perf_counter() - start, counter.frame_count
    decode(models["eager"], lengths[0], args.tokens)
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    same = 0
    for length in lengths[1:]:
        found = {kind: decode(models[kind], length, args.tokens) for kind in KINDS}
        same += found["eager"][1] == found["compiled"][1]
        for kind, (rate, _) in found.items():
            rates[kind].append(rate)
        print(", ".join(f"{kind} {rate:.1f} tokens/s" for kind, (rate, _) in found.items()), file=sys.stderr)
    faster = [compiled / eager for compiled, eager in zip(rates["compiled"], rates["eager"], strict=True)]
    row = Row(
        model=args.model.name,
        num_tokens=args.tokens,
        repeats=args.repeats,
        eager_tokens_per_s=round(statistics.median(rates["eager"]), 2),
        compiled_tokens_per_s=round(statistics.median(rates["compiled"]), 2),
        faster=round(statistics.median(faster), 3),
        faster_spread=spread(faster),
        same_texts=same,
        first_call_s=round(first_call, 1),
        compilations_first=first_count,
        compilations_last=counter.frame_count,
        eager_mb=round(memory["eager"] - memory["nothing"], 1),
        compiled_mb=round(memory["compiled"] - memory["nothing"], 1),
    )
    row.append(args.results)
    print(f"eager {row.eager_tokens_per_s}, compiled {row.compiled_tokens_per_s} tokens/s: {row.faster} times")
    print(f"  runs from {row.faster_spread}; the same text in {row.same_texts} of {row.repeats}")
    print(
        f"  compilations {row.compilations_first}, at the end {row.compilations_last}; first call {row.first_call_s} s"
    )
    print(f"  peak memory {row.eager_mb} and {row.compiled_mb} MB")


if __name__ == "__main__":
    main()
