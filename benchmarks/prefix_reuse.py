"""Measure a shared header: the prefill of prompts that begin alike, read whole and with the header read once.

    python benchmarks/prefix_reuse.py [MODEL] [--data 8] [--header 400] [--rest 24] [--repeats 7]

MODEL is a folder (default: models/smollm2), loaded three times, as source FT, source PT and target PT. Three ways to
the first new token of every prompt, timed by turns in one process: `shared`, as `ensembler generate` does it; `whole`,
the same engine without shared headers; `loop`, what people write: a forward of each member over the padded batch, then
the log-softmax of its last position, weighted and added. Prompts end at different lengths, so that batches are padded.
The first new tokens of `shared` and `whole` are compared. Peak memory is the largest resident size of a fresh process
that does one of them, less that of one that only loads the members. One JSON row is appended to
benchmarks/results/prefix_reuse.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from decode_cost import ROLES
from measuring import RESULTS, Measured, printed_by, resident_mb, spread
from transformers import AutoTokenizer

from ensembler import EnsembleForCausalLM
from ensembler.decoding.batching import pad_left
from ensembler.decoding.decoding_options import DecodingOptions
from ensembler.decoding.prompts import EncodedPrompt
from ensembler.decoding.texts import complete_prompts

OUT = RESULTS / "prefix_reuse.jsonl"
KINDS = ("shared", "whole", "loop")
ALPHA = 0.5
Prefill = Callable[[], list[int]]


@dataclass(frozen=True, kw_only=True)
class Row(Measured):
    """One run. Times of a prefill of all prompts; how many times faster `shared` is, and MB beside the members."""

    model: str
    num_prompts: int
    header_tokens: int
    rest_tokens: tuple[int, int]
    repeats: int
    shared_ms: float
    whole_ms: float
    loop_ms: float
    over_whole: float
    over_whole_spread: tuple[float, float]
    over_loop: float
    over_loop_spread: tuple[float, float]
    same_tokens: int
    shared_mb: float
    whole_mb: float
    loop_mb: float


def make_prompts(num: int, header: int, rest: int) -> list[EncodedPrompt]:
    """Random prompts behind one header, their rests between half of `rest` and `rest` tokens long."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(100, 40_000, (count,), generator=generator).tolist()

    start = ids(header)
    lengths = [rest - (rest // 2) * i // max(num - 1, 1) for i in range(num)]
    return [EncodedPrompt(i, start + ids(length)) for i, length in enumerate(lengths)]


def prefills(model: EnsembleForCausalLM, tokenizer: Any, prompts: list[EncodedPrompt]) -> dict[str, Prefill]:
    """Return a function for each way: it returns the first new token of every prompt."""
    options = DecodingOptions(max_new_tokens=1)

    def engine(share: bool) -> list[int]:
        found = {
            one.number: one.samples[0].ids[0]
            for one in complete_prompts(
                model, tokenizer, prompts, options, batch_size=len(prompts), share_prefixes=share
            )
        }
        return [found[prompt.number] for prompt in prompts]

    @torch.inference_mode()
    def loop() -> list[int]:
        ids, mask = pad_left([prompt.ids for prompt in prompts], 0)
        inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0), "use_cache": True}
        last = {role: model.members[role](ids, **inputs).logits[:, -1].log_softmax(-1) for role in ROLES}
        combined = last["source_ft"] + ALPHA * (last["target_pt"] - last["source_pt"])
        first: list[int] = combined.argmax(-1).tolist()
        return first

    return {"shared": lambda: engine(True), "whole": lambda: engine(False), "loop": loop}


def load(folder: Path) -> tuple[EnsembleForCausalLM, Any]:
    model = EnsembleForCausalLM.from_members(alpha=ALPHA, members=dict.fromkeys(ROLES, str(folder)))
    return model, AutoTokenizer.from_pretrained(folder)


def peak_memory(kind: str, args: argparse.Namespace) -> float:
    """Return the peak resident size in MB of a fresh process that loads the members and prefills so, or not at all."""
    sizes = [f"--{name}={getattr(args, name)}" for name in ("prompts", "header", "rest")]
    return printed_by(__file__, str(args.model), *sizes, "--memory-of", kind)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=Path("models/smollm2"))
    parser.add_argument("--data", type=int, default=8)
    parser.add_argument("--header", type=int, default=400)
    parser.add_argument("--rest", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--results", type=Path, default=OUT)
    parser.add_argument("--memory-of", choices=["nothing", *KINDS], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not (args.model / "config.json").is_file():
        sys.exit(f"there is no model in {args.model}; give the folder of one")
    prompts = make_prompts(args.prompts, args.header, args.rest)
    if args.memory_of:
        ways = prefills(*load(args.model), prompts)
        if args.memory_of != "nothing":
            ways[args.memory_of]()
        print(resident_mb())
        return
    memory = {kind: peak_memory(kind, args) for kind in ("nothing", *KINDS)}
    ways = prefills(*load(args.model), prompts)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    tokens: dict[str, list[int]] = {}
    for repeat in range(args.repeats + 1):
        for kind in KINDS:
            start = time.perf_counter()
            tokens[kind] = ways[kind]()
            if repeat:  # the first is a warm-up
                seconds[kind].append(time.perf_counter() - start)
        if repeat:
            print(", ".join(f"{kind} {values[-1] * 1e3:.0f} ms" for kind, values in seconds.items()), file=sys.stderr)
    faster = {
        kind: [other / own for other, own in zip(seconds[kind], seconds["shared"], strict=True)] for kind in KINDS
    }
    rests = [len(prompt.ids) - args.header for prompt in prompts]
    row = Row(
        model=args.model.name,
        num_prompts=args.prompts,
        header_tokens=args.header,
        rest_tokens=(min(rests), max(rests)),
        repeats=args.repeats,
        **{f"{kind}_ms": round(statistics.median(seconds[kind]) * 1e3, 1) for kind in KINDS},
        over_whole=round(statistics.median(faster["whole"]), 3),
        over_whole_spread=spread(faster["whole"]),
        over_loop=round(statistics.median(faster["loop"]), 3),
        over_loop_spread=spread(faster["loop"]),
        same_tokens=sum(own == other for own, other in zip(tokens["shared"], tokens["whole"], strict=True)),
        **{f"{kind}_mb": round(memory[kind] - memory["nothing"], 1) for kind in KINDS},
    )
    row.append(args.results)
    print(f"prefill of {row.num_prompts} prompts behind {row.header_tokens} shared tokens: {row.shared_ms} ms")
    print(f"  {row.over_whole:.2f} times faster than read whole (runs from {row.over_whole_spread})")
    print(f"  {row.over_loop:.2f} times faster than the plain loop (runs from {row.over_loop_spread})")
    print(
        f"  peak memory beside the members: {row.shared_mb}, {row.whole_mb}, {row.loop_mb} MB; same: {row.same_tokens}"
    )


if __name__ == "__main__":
    main()
