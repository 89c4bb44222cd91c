"""Measure the cost of a token of an ensemble: time over its members' own decode steps, peak memory.

    python benchmarks/decode_cost.py [MODEL] [--tokens 32] [--repeats 7]

MODEL is a folder (default: models/smollm2; the committed rows are of de-quantised SmolLM2-135M-Instruct). It is loaded
three times, as source FT, source PT and target PT. A member's own decode step is its bare forward of one token with its
cache, at the same positions; the ensemble's time per token is that of `generate`, everything included, between two
tokens. The three are timed by turns in one process, so that drift hits all. Peak memory is the largest resident size of
a fresh process, less that of one that only imports. One JSON row is appended to benchmarks/results/decode_cost.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from measuring import RESULTS, Measured, printed_by, resident_mb, spread
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from ensembler import EnsembleForCausalLM

ROLES = ("source_ft", "source_pt", "target_pt")
OUT = RESULTS / "decode_cost.jsonl"


@dataclass(frozen=True, kw_only=True)
class Row(Measured):
    """One run. Ratios are over the sum of the members' steps: median, smallest and largest of the repeats."""

    model: str
    num_tokens: int
    repeats: int
    prompt_tokens: int
    members_ms: float
    greedy_ratio: float
    greedy_spread: tuple[float, float]
    sampling_ratio: float
    sampling_spread: tuple[float, float]
    memory_ratio: float
    memory_ensemble_mb: float
    memory_members_mb: float


class Clock(BaseStreamer):
    """Notes when each token arrives."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def median_step(self) -> float:
        """Seconds between tokens, without the prompt's own step."""
        pairs = zip(self.times[1:-1], self.times[2:], strict=True)
        return statistics.median(later - earlier for earlier, later in pairs)


def ensemble_step(model: EnsembleForCausalLM, prompt: Tensor, num_tokens: int, *, sample: bool) -> float:
    clock = Clock()
    options = {"do_sample": True, "temperature": 0.8, "top_p": 0.95} if sample else {"do_sample": False}
    model.generate(prompt, max_new_tokens=num_tokens, min_new_tokens=num_tokens, streamer=clock, **options)
    return clock.median_step()


@torch.inference_mode()
def member_step(model: PreTrainedModel, prompt: Tensor, num_tokens: int) -> float:
    cache = DynamicCache(config=model.config)
    token = model(prompt, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
    times = []
    for _ in range(num_tokens - 1):
        start = time.perf_counter()
        token = model(token, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure_time(folder: Path, num_tokens: int, repeats: int, prompt: Tensor) -> dict[str, list[float]]:
    """Return seconds per token of `members` (their sum), `greedy` and `sampling`, one value per repeat."""
    model = EnsembleForCausalLM.from_members(alpha=0.5, members=dict.fromkeys(ROLES, str(folder)))
    model.generation_config.eos_token_id = None
    found: dict[str, list[float]] = {"members": [], "greedy": [], "sampling": []}
    for repeat in range(repeats + 1):
        steps = {
            "greedy": ensemble_step(model, prompt, num_tokens, sample=False),
            "members": sum(member_step(member, prompt, num_tokens) for member in model.members.values()),
            "sampling": ensemble_step(model, prompt, num_tokens, sample=True),
        }
        if repeat:  # the first is a warm-up
            for name, seconds in steps.items():
                found[name].append(seconds)
            print(", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in steps.items()), file=sys.stderr)
    return found


def peak_memory(kind: str, folder: Path, num_tokens: int) -> float:
    """Return the peak resident size in MB of a fresh process that decodes with an ensemble, one member, or nothing."""
    return printed_by(__file__, str(folder), "--tokens", str(num_tokens), "--memory-of", kind)


def memory_of(kind: str, folder: Path, num_tokens: int, prompt: Tensor) -> float:
    if kind != "nothing":
        model = (
            AutoModelForCausalLM.from_pretrained(folder)
            if kind == "member"
            else EnsembleForCausalLM.from_members(alpha=0.5, members=dict.fromkeys(ROLES, str(folder)))
        )
        model.generate(prompt, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False)
    return resident_mb()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=Path("models/smollm2"))
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--results", type=Path, default=OUT)
    parser.add_argument("--memory-of", choices=["nothing", "member", "ensemble"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not (args.model / "config.json").is_file():
        sys.exit(f"there is no model in {args.model}; give the folder of one")
    prompt = torch.arange(100, 132)[None]
    if args.memory_of:
        print(memory_of(args.memory_of, args.model, args.tokens, prompt))
        return
    nothing, member, ensemble = (
        peak_memory(kind, args.model, args.tokens) for kind in ("nothing", "member", "ensemble")
    )
    seconds = measure_time(args.model, args.tokens, args.repeats, prompt)
    ratios = {
        name: [value / members for value, members in zip(seconds[name], seconds["members"], strict=True)]
        for name in ("greedy", "sampling")
    }
    row = Row(
        model=args.model.name,
        num_tokens=args.tokens,
        repeats=args.repeats,
        prompt_tokens=prompt.shape[1],
        members_ms=round(statistics.median(seconds["members"]) * 1e3, 2),
        greedy_ratio=round(statistics.median(ratios["greedy"]), 4),
        greedy_spread=spread(ratios["greedy"]),
        sampling_ratio=round(statistics.median(ratios["sampling"]), 4),
        sampling_spread=spread(ratios["sampling"]),
        memory_ratio=round((ensemble - nothing) / (3 * (member - nothing)), 4),
        memory_ensemble_mb=round(ensemble - nothing, 1),
        memory_members_mb=round(3 * (member - nothing), 1),
    )
    row.append(args.results)
    print(f"time per token over the sum of the members' {row.members_ms} ms (median, smallest and largest of the runs)")
    print(f"  greedy    {row.greedy_ratio:.3f}  ({row.greedy_spread[0]:.3f} to {row.greedy_spread[1]:.3f})")
    print(f"  sampling  {row.sampling_ratio:.3f}  ({row.sampling_spread[0]:.3f} to {row.sampling_spread[1]:.3f})")
    print(f"peak memory over the sum of the members': {row.memory_ratio:.3f} ({row.memory_ensemble_mb:.0f} MB)")


if __name__ == "__main__":
    main()
