"""Measure drafting: tokens per second of an ensemble with it, without it, of its target alone, of the plain loop.

    python benchmarks/speculative.py large SOURCE LORA TARGET [--alpha 0.5] [--dtype float32]
    python benchmarks/speculative.py equal SOURCE
    python benchmarks/speculative.py demo

`large`: source PT is the model SOURCE, source FT the same with the adapter LORA (on one backbone), target PT the model
TARGET made `--factor` times as costly by layers that add nothing (deepen.py): its distribution stays real while its
cost grows. For base-change and EFT, greedy and at temperature 0.8, by turns: drafted (--draft auto), plain (the same
engine without it), the target alone, and the loop that people write: three models, three cached forwards, log-softmax,
combination, next token. `equal`: SOURCE three times, where no draft is cheap: --draft auto and --draft source_pt
against plain. `demo`: the same with the embedded family.

Prompts are lines of `--data` (text, or JSON lines with a text under 'prompt'), each continued by exactly `--tokens`
tokens, alone. One repeat is all prompts with every way by turns; ratios are medians of the repeats' own ratios. Peak
memory is the largest resident size of a fresh process for each way, less that of one that only imports. Each rule and
way of sampling appends one JSON row to benchmarks/results/speculative.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepen import deepen
from measuring import RESULTS, Measured, printed_by, resident_mb, spread
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

from ensembler import EnsembleForCausalLM, MemberConfig
from ensembler.decoding.decoder import Decoder
from ensembler.demo import demo_folder
from ensembler.rules import get_rule

OUT = RESULTS / "speculative.jsonl"
ROLES = ("source_ft", "source_pt", "target_pt")
PROMPTS = (
    "The film opens with a long shot of the sea, and",
    "Although the script is clever, the two leads never",
    "I went in expecting another tired sequel, but what I found was",
    "What makes this small documentary so moving is",
    "The director has said in interviews that the story",
    "There are three reasons to see it on a large screen:",
)
Way = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Row(Measured):
    """One rule and one way of sampling. `ms` per token by way; `ratios` over drafted, with smallest and largest."""

    case: str
    models: dict[str, str]
    rule: str
    alpha: float
    temperature: float
    dtype: str
    factor: float
    num_prompts: int
    num_tokens: int
    repeats: int
    ms: dict[str, float]
    ratios: dict[str, float]
    spreads: dict[str, tuple[float, float]]
    stats: dict[str, dict[str, Any]]
    identical: float | None
    memory_mb: dict[str, float]


@dataclass(frozen=True)
class Setting:
    """A case to decode: members, rule, α, temperature and how many tokens."""

    members: dict[str, MemberConfig]
    rule: str
    alpha: float
    temperature: float
    num_tokens: int
    dtype: str

    def ensemble(self) -> EnsembleForCausalLM:
        return EnsembleForCausalLM.from_members(rule=self.rule, alpha=self.alpha, members=self.members)

    def options(self) -> dict[str, Any]:
        sampling = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        how = sampling if self.temperature else {"do_sample": False}
        return {"max_new_tokens": self.num_tokens, "min_new_tokens": self.num_tokens, **how}


def drafting(setting: Setting, model: EnsembleForCausalLM, draft: str) -> tuple[Way, Decoder]:
    decoder = Decoder(draft)
    return lambda ids: model.generate(ids, **setting.options(), custom_generate=decoder), decoder


def alone(setting: Setting, model: PreTrainedModel) -> Way:
    return lambda ids: model.generate(ids, **setting.options())


def loaded(member: MemberConfig, dtype: str) -> PreTrainedModel:
    """A model by itself, its adapter merged: what a loop of three models has."""
    model = AutoModelForCausalLM.from_pretrained(member.model, dtype=getattr(torch, dtype))
    return PeftModel.from_pretrained(model, member.adapter).merge_and_unload() if member.adapter else model


def plain_loop(setting: Setting, models: Mapping[str, PreTrainedModel]) -> Way:
    """The loop that people write: every token costs a forward of each model and a log-softmax of each row."""
    weights = get_rule(setting.rule).weights(setting.alpha)

    @torch.no_grad()
    def decode(ids: Tensor) -> Tensor:
        caches = {role: DynamicCache(config=model.config) for role, model in models.items()}
        end = next(iter(models.values())).generation_config.eos_token_id
        ends = [] if end is None else end if isinstance(end, list) else [end]
        new = ids
        for _ in range(setting.num_tokens):
            total: Any = 0
            for role, model in models.items():
                logits = model(new, past_key_values=caches[role], use_cache=True, logits_to_keep=1).logits[:, -1]
                total = total + weights[role] * logits.float().log_softmax(-1)
            total[:, ends] = -torch.inf
            if setting.temperature:
                new = torch.multinomial((total / setting.temperature).softmax(-1), 1)
            else:
                new = total.argmax(-1, keepdim=True)
            ids = torch.cat([ids, new], dim=-1)
        return ids

    return decode


def make_ways(setting: Setting, drafts: Sequence[str], names: Sequence[str]) -> tuple[dict[str, Way], dict[str, Any]]:
    """The ways `names` of decoding, and the decoders of those that draft."""
    ways: dict[str, Way] = {}
    decoders: dict[str, Any] = {}
    model = setting.ensemble() if set(names) - {"loop", "target"} else None
    for draft in drafts:
        if draft in names and model is not None:
            ways[draft], decoders[draft] = drafting(setting, model, draft)
    if "plain" in names and model is not None:
        ways["plain"] = alone(setting, model)
    if "target" in names or "loop" in names:
        target = loaded(setting.members["target_pt"], setting.dtype) if model is None else model.members["target_pt"]
        if "target" in names:
            ways["target"] = alone(setting, target)
        if "loop" in names:
            sources = {role: loaded(setting.members[role], setting.dtype) for role in ROLES[:2]}
            ways["loop"] = plain_loop(setting, {**sources, "target_pt": target})
    return ways, decoders


def measure(ways: Mapping[str, Way], prompts: Sequence[Tensor], repeats: int) -> tuple[dict[str, list[float]], float]:
    """Seconds of all prompts for each way, one value per repeat; the share of prompts drafted and plain alike."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    same = []
    for repeat in range(repeats + 1):
        found = dict.fromkeys(ways, 0.0)
        for ids in prompts[: 1 if not repeat else None]:
            texts = {}
            for name, way in ways.items():
                start = time.perf_counter()
                texts[name] = way(ids)
                found[name] += time.perf_counter() - start
            if "auto" in texts and "plain" in texts:
                same.append(texts["auto"].tolist() == texts["plain"].tolist())
        if repeat:  # the first is a warm-up
            for name, value in found.items():
                seconds[name].append(value)
            print(", ".join(f"{name} {value:.2f} s" for name, value in found.items()), file=sys.stderr)
    return seconds, sum(same) / len(same)


def read_prompts(path: Path | None, limit: int, case: str) -> list[str]:
    if case == "demo" and path is None:
        path = demo_folder() / "data" / "test.jsonl"
    if path is None:
        return list(PROMPTS[:limit])
    lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    texts = [json.loads(line)["prompt"] if path.suffix == ".jsonl" else line for line in lines]
    return texts[:limit]


def peak_memory(name: str, arguments: Sequence[str]) -> float:
    """Peak resident MB of a fresh process that decodes one prompt so, or does nothing."""
    return printed_by(__file__, *arguments, "--memory-of", name)


def run_setting(args: argparse.Namespace, setting: Setting, prompts: Sequence[Tensor], arguments: list[str]) -> Row:
    drafts = ["auto"] if args.case == "large" else ["auto", "source_pt"]
    names = [*drafts, "plain", *(("target", "loop") if args.case == "large" else ())]
    ways, decoders = make_ways(setting, drafts, names)
    torch.manual_seed(0)
    seconds, identical = measure(ways, prompts, args.repeats)
    ratios = {
        f"{name} over {draft}": [one / other for one, other in zip(seconds[name], seconds[draft], strict=True)]
        for draft in drafts
        for name in names
        if name not in drafts
    }
    memory: dict[str, float] = {}
    if not args.no_memory:
        own = [*arguments, "--rule", setting.rule, "--temperature", str(setting.temperature)]
        nothing = peak_memory("nothing", own)
        memory = {name: round(peak_memory(name, own) - nothing, 1) for name in names}
    num_tokens = len(prompts) * setting.num_tokens
    kept = ("draft", "plain_reason", "num_rounds", "num_plain_steps", "acceptance", "tokens_per_round")
    return Row(
        case=args.case,
        models={role: Path(member.model).name for role, member in setting.members.items()},
        rule=setting.rule,
        alpha=setting.alpha,
        temperature=setting.temperature,
        dtype=setting.dtype,
        factor=args.factor if args.case == "large" else 1.0,
        num_prompts=len(prompts),
        num_tokens=setting.num_tokens,
        repeats=args.repeats,
        ms={name: round(1e3 * statistics.median(values) / num_tokens, 3) for name, values in seconds.items()},
        ratios={name: round(statistics.median(values), 4) for name, values in ratios.items()},
        spreads={name: spread(values) for name, values in ratios.items()},
        stats={name: {key: decoder.stats.to_row()[key] for key in kept} for name, decoder in decoders.items()},
        identical=None if setting.temperature else round(identical, 4),
        memory_mb=memory,
    )


def members_of(args: argparse.Namespace, deep: Path | None) -> dict[str, MemberConfig]:
    if args.case == "demo":
        return {role: MemberConfig(str(demo_folder() / role), dtype=args.dtype) for role in ROLES}
    source = str(args.models[0])
    if args.case == "equal":
        return {role: MemberConfig(source, dtype=args.dtype) for role in ROLES}
    return {
        "source_ft": MemberConfig(source, adapter=str(args.models[1]), dtype=args.dtype),
        "source_pt": MemberConfig(source, dtype=args.dtype),
        "target_pt": MemberConfig(str(deep), dtype=args.dtype),
    }


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=["large", "equal", "demo"])
    parser.add_argument("models", type=Path, nargs="*", help="large: SOURCE LORA TARGET; equal: SOURCE")
    parser.add_argument("--rule", action="append", choices=["base-change", "eft"])
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--temperature", type=float, action="append")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--factor", type=float, default=4.0)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--limit", type=int, default=6, help="prompts")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--results", type=Path, default=OUT)
    parser.add_argument("--deep", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    wanted = {"large": 3, "equal": 1, "demo": 0}[args.case]
    if len(args.models) != wanted:
        parser.error(f"{args.case} takes {wanted} models, got {len(args.models)}")
    return args


def run(args: argparse.Namespace, deep: Path | None) -> None:
    members = members_of(args, deep)
    tokenizer = AutoTokenizer.from_pretrained(members["source_pt"].model)
    texts = read_prompts(args.prompts, args.limit, args.case)
    prompts = [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts]
    arguments = [*sys.argv[1:], *(() if deep is None else ("--deep", str(deep)))]
    for rule in args.rule or ["base-change", "eft"]:
        for temperature in args.temperature or [0.0, 0.8]:
            setting = Setting(members, rule, args.alpha, temperature, args.tokens, args.dtype)
            if args.memory_of:
                ways, _ = make_ways(setting, ["auto", "source_pt"], [args.memory_of])
                for way in ways.values():
                    way(prompts[0])
                print(resident_mb())
                return
            row = run_setting(args, setting, prompts, arguments)
            row.append(args.results)
            what = f"{row.case}, {rule}, " + (f"temperature {temperature:g}" if temperature else "greedy")
            print(f"{what}: ms per token {row.ms}")
            for name, ratio in row.ratios.items():
                print(f"  {name:20} {ratio:.3f} ({row.spreads[name][0]:.3f} to {row.spreads[name][1]:.3f})")
            print(f"  {row.stats}; identical texts: {row.identical}; memory in MB: {row.memory_mb}")


def main() -> None:
    args = parsed()
    if args.case != "large" or args.deep is not None:
        run(args, args.deep)
        return
    with tempfile.TemporaryDirectory() as folder:
        deep = Path(folder) / args.models[2].name
        deepen(args.models[2], deep, args.factor)
        run(args, deep)


if __name__ == "__main__":
    main()
