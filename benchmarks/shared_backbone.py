"""Measure a fine-tune and its base on one copy of the weights: time per token and peak memory over the base alone.

    python benchmarks/shared_backbone.py [MODEL] [--rank 8] [--tokens 32] [--repeats 9]

MODEL is a folder (default: models/smollm2; the committed rows are of de-quantised SmolLM2-135M-Instruct). A LoRA of
that rank on all attention and MLP matrices is made at random: its cost does not depend on what it has learnt. Timed by
turns in one process, each by its bare forwards of one token with a cache: the base alone, base and fine-tune on a
shared backbone, base and merged fine-tune as two copies. Peak memory is the largest resident size of a fresh process
for each, less that of one that only imports. One JSON row is appended to benchmarks/results/shared_backbone.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from measuring import RESULTS, Measured, printed_by, resident_mb, spread
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from ensembler import MemberConfig
from ensembler.engine.member_set import MemberSet
from ensembler.engine.members import MemberFiles, check_member, load_group
from ensembler.engine.model_runner import Step
from ensembler.vocab import make_contract

OUT = RESULTS / "shared_backbone.jsonl"
KINDS = ("alone", "shared", "copies")
PROMPT = torch.arange(100, 132)[None]
StepFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Row(Measured):
    """One run. Ratios are over the base alone: median, smallest and largest of the repeats."""

    model: str
    lora_rank: int
    num_tokens: int
    repeats: int
    alone_ms: float
    shared_ratio: float
    shared_spread: tuple[float, float]
    copies_ratio: float
    copies_spread: tuple[float, float]
    alone_mb: float
    shared_memory_ratio: float
    copies_memory_ratio: float


def make_adapter(model: Path, rank: int, folder: Path) -> None:
    """Save a random LoRA on all linear layers but the head."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(folder)


def starts(kind: str, model: Path, adapter: Path) -> Callable[[], StepFunction]:
    """Load what `kind` needs; each call of the result begins a text and returns its step: a token in, the next out."""
    members = {"source_pt": MemberConfig(str(model))}
    if kind != "alone":
        members["source_ft"] = MemberConfig(str(model), adapter=str(adapter))
    files = {role: check_member(role, member) for role, member in members.items()}
    groups: list[tuple[MemberFiles, ...]] = (
        [tuple(files.values())] if kind == "shared" else [(f,) for f in files.values()]
    )
    loaded = [load_group(group) for group in groups]
    models = {role: made for group in loaded for role, made in group.models.items()}
    backbones = [group.backbone for group in loaded if group.backbone is not None]
    member_set = MemberSet(models, backbones, make_contract([member.vocabulary for member in files.values()]))

    def start() -> StepFunction:
        cache = member_set.row_cache(1, 512)

        def step(ids: Tensor) -> Tensor:
            start, cache.lengths[0] = cache.lengths[0], cache.lengths[0] + ids.shape[1]
            positions = torch.arange(start, cache.lengths[0])[None]
            logits = member_set.logits(Step(ids, position_ids=positions, logits_to_keep=1), cache)
            return logits["source_pt"][:, -1].argmax(-1, keepdim=True)

        return step

    return start


@torch.inference_mode()
def median_step(start: Callable[[], StepFunction], num_tokens: int) -> float:
    """Seconds per token behind the prompt."""
    step = start()
    token, times = step(PROMPT), []
    for _ in range(num_tokens - 1):
        begun = time.perf_counter()
        token = step(token)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def peak_memory(kind: str, model: Path, adapter: Path, num_tokens: int) -> float:
    """Return the peak resident size in MB of a fresh process that decodes so, or does nothing."""
    return printed_by(__file__, str(model), "--tokens", str(num_tokens), "--memory-of", kind, str(adapter))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=Path("models/smollm2"))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--results", type=Path, default=OUT)
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not (args.model / "config.json").is_file():
        sys.exit(f"there is no model in {args.model}; give the folder of one")
    if args.memory_of:
        kind, adapter = args.memory_of
        if kind != "nothing":
            median_step(starts(kind, args.model, Path(adapter)), args.tokens)
        print(resident_mb())
        return
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder)
        make_adapter(args.model, args.rank, adapter)
        memory = {kind: peak_memory(kind, args.model, adapter, args.tokens) for kind in ("nothing", *KINDS)}
        ways = {kind: starts(kind, args.model, adapter) for kind in KINDS}
        seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for repeat in range(args.repeats + 1):
            found = {kind: median_step(ways[kind], args.tokens) for kind in KINDS}
            if repeat:  # the first is a warm-up
                for kind, value in found.items():
                    seconds[kind].append(value)
                print(", ".join(f"{kind} {value * 1e3:.1f} ms" for kind, value in found.items()), file=sys.stderr)
    ratios = {
        kind: [value / alone for value, alone in zip(seconds[kind], seconds["alone"], strict=True)] for kind in KINDS
    }
    size = {kind: memory[kind] - memory["nothing"] for kind in KINDS}
    row = Row(
        model=args.model.name,
        lora_rank=args.rank,
        num_tokens=args.tokens,
        repeats=args.repeats,
        alone_ms=round(statistics.median(seconds["alone"]) * 1e3, 2),
        shared_ratio=round(statistics.median(ratios["shared"]), 4),
        shared_spread=spread(ratios["shared"]),
        copies_ratio=round(statistics.median(ratios["copies"]), 4),
        copies_spread=spread(ratios["copies"]),
        alone_mb=round(size["alone"], 1),
        shared_memory_ratio=round(size["shared"] / size["alone"], 4),
        copies_memory_ratio=round(size["copies"] / size["alone"], 4),
    )
    row.append(args.results)
    print(f"over the base alone ({row.alone_ms} ms a token, {row.alone_mb:.0f} MB); smallest and largest of the runs")
    for kind, (low, high), num_bytes in (
        ("shared", row.shared_spread, row.shared_memory_ratio),
        ("copies", row.copies_spread, row.copies_memory_ratio),
    ):
        median = getattr(row, f"{kind}_ratio")
        print(f"  {kind:7} time {median:.3f} ({low:.3f} to {high:.3f}), memory {num_bytes:.3f}")


if __name__ == "__main__":
    main()
