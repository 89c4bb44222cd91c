"""This checkout against an older one: seconds of the same work in two processes, by turns.

    git worktree add ../before 80d0762
    python benchmarks/against.py ../before MODEL [--repeats 5] [--cases plain,grid]

MODEL is a folder; a process of each checkout loads it three times, as source FT, source PT and target PT (base-change,
α = 0.5). They are asked for one case after the other, each case by both in turn, so that drift hits both alike; the
first round warms up. `host` is a trio of two layers of width 16, where next to nothing is computed: what a token costs
beside the work; `forwards` are the bare forwards of that trio on their own caches, in which neither checkout has a
hand. `shared` is source FT as a LoRA on the weights of source PT. A row of each case is appended to
benchmarks/results/against.jsonl; ratios below 1: this checkout is faster.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
ROLES = ("source_ft", "source_pt", "target_pt")
ALPHAS = tuple(round(0.1 * index, 1) for index in range(16))
CASES = (
    *("forwards", "host", "shared", "plain", "sampled", "batch"),
    *("grid", "headers", "ngram", "drafted", "choices", "texts"),
)


# -- the work, in a process of either checkout -------------------------------------------------------------------------


def work(folder: str) -> None:
    """Read names of cases from standard input, run each, and print its seconds."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    cases = make_cases(folder)
    print("ready", flush=True)
    for line in sys.stdin:
        torch.manual_seed(0)
        start = time.perf_counter()
        cases[line.strip()]()
        print(time.perf_counter() - start, flush=True)


def make_cases(folder: str) -> dict[str, Callable[[], object]]:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from ensembler import EnsembleForCausalLM, MemberConfig
    from ensembler.evaluation.backends import TransformersBackend
    from ensembler.evaluation.request_batches import make_batches
    from ensembler.evaluation.requests import ScoringRequest

    complete, grid, Options, Point, EncodedPrompt = _names()
    model = EnsembleForCausalLM.from_members(alpha=0.5, members=dict.fromkeys(ROLES, folder))
    model.generation_config.eos_token_id = None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def ids(num: int) -> list[int]:
        return torch.randint(100, 40_000, (num,), generator=generator).tolist()

    prompts = [EncodedPrompt(i, ids(length)) for i, length in enumerate((40, 24, 31, 12))]
    header = ids(200)
    alike = [EncodedPrompt(i, header + ids(12 + i)) for i in range(4)]
    repeating = [EncodedPrompt(0, ids(12) * 3)]
    points = [Point("base-change", alpha) for alpha in ALPHAS]
    choices = [ScoringRequest(i, tuple(ids(40)), tuple(tuple(ids(4)) for _ in range(4)), "") for i in range(4)]
    texts = [ScoringRequest(i, tuple(ids(1)), (tuple(ids(120)),), "") for i in range(4)]
    small = _small(LlamaConfig, LlamaForCausalLM)
    tiny = EnsembleForCausalLM.from_members(alpha=0.5, members=small)
    tiny.generation_config.eos_token_id, tiny.generation_config.pad_token_id = None, 0
    pair = {"source_ft": MemberConfig(folder, adapter=_adapter(folder)), "source_pt": folder, "target_pt": folder}
    shared = EnsembleForCausalLM.from_members(alpha=0.5, members=pair)
    shared.generation_config.eos_token_id = None

    def run(prompts: list[Any], num: int, batch_size: int, **options: Any) -> Callable[[], object]:
        chosen = Options(max_new_tokens=num, **{"draft": "none", **options})
        return lambda: list(complete(model, tokenizer, prompts, chosen, batch_size=batch_size))

    def score(requests: list[Any]) -> Callable[[], object]:
        batches = make_batches(requests, 4, share_contexts=True)
        return lambda: list(TransformersBackend(model, tokenizer).score(batches, points))

    one = torch.tensor([prompts[0].ids])
    options = Options(max_new_tokens=12, draft="none")
    return {
        "forwards": lambda: _decode_alone(small, 150),
        "host": lambda: tiny.generate(torch.arange(5, 13)[None], max_new_tokens=150, do_sample=False),
        "shared": lambda: shared.generate(one, max_new_tokens=24, do_sample=False, pad_token_id=0),
        "plain": lambda: model.generate(one, max_new_tokens=24, do_sample=False, pad_token_id=0),
        "sampled": lambda: model.generate(
            one, max_new_tokens=24, do_sample=True, temperature=0.8, top_p=0.95, pad_token_id=0
        ),
        "batch": run(prompts, 16, 4),
        "grid": lambda: list(grid(model, tokenizer, prompts[1:3], points, options, batch_size=2)),
        "headers": run(alike, 4, 4),
        "ngram": run(repeating, 24, 1, draft="ngram"),
        "drafted": run(prompts[:1], 24, 1, draft="source_pt"),
        "choices": score(choices),
        "texts": score(texts),
    }


def _names() -> tuple[Any, ...]:
    """Import names that the two checkouts have in other places."""
    from ensembler.decoding.prompts import EncodedPrompt

    try:
        from ensembler.decoding.decoding_options import DecodingOptions
        from ensembler.decoding.texts import complete_grid, complete_prompts
        from ensembler.engine.grid import GridPoint
    except ImportError:
        from ensembler.decoding.grid_texts import complete_grid
        from ensembler.decoding.points import GridPoint

        from ensembler.decoding.texts import DecodingOptions
        from ensembler.decoding.texts import complete_batches as complete_prompts
    return complete_prompts, complete_grid, DecodingOptions, GridPoint, EncodedPrompt


def _small(config: Any, kind: Any) -> dict[str, Any]:
    import torch

    settings = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    found = {}
    for seed, role in enumerate(ROLES):
        torch.manual_seed(seed)
        found[role] = kind(config(**settings, num_attention_heads=2, max_position_embeddings=512)).eval()
    return found


def _decode_alone(members: dict[str, Any], num: int) -> None:
    """Run models by themselves, token by token, each on a growing cache; they read what the first of them chooses."""
    import torch
    from transformers import DynamicCache

    caches = {role: DynamicCache(config=model.config) for role, model in members.items()}
    ids = torch.arange(5, 13)[None]
    with torch.inference_mode():
        for _ in range(num):
            logits = {
                role: model(input_ids=ids, past_key_values=caches[role], logits_to_keep=1).logits
                for role, model in members.items()
            }
            ids = logits["source_ft"][:, -1].argmax(-1, keepdim=True)


def _adapter(folder: str) -> str:
    """Write a LoRA of random numbers on all matrices of attention and MLPs of a model; return its folder."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=8, target_modules=modules, init_lora_weights=False)
    out = tempfile.mkdtemp(prefix="against-")
    atexit.register(shutil.rmtree, out)
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).save_pretrained(out)
    return out


# -- the turns ---------------------------------------------------------------------------------------------------------


@dataclass
class Worker:
    """A process of one checkout."""

    process: subprocess.Popen[str]

    @classmethod
    def start(cls, checkout: Path, model: Path) -> Worker:
        paths = f"{checkout}{os.pathsep}{checkout / 'kernels'}"
        command = [sys.executable, str(Path(__file__).resolve()), "--work", str(model)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths}
        )
        return cls(process)

    def said(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            sys.exit("a process of one checkout ended; see its error above")
        return line

    def seconds_of(self, case: str) -> float:
        assert self.process.stdin is not None
        print(case, file=self.process.stdin, flush=True)
        return float(self.said())


def commit_of(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the older checkout")
    parser.add_argument("model", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--results", type=Path, default=HERE / "results" / "against.jsonl")
    args = parser.parse_args()
    before, now = commit_of(args.before), commit_of(HERE)
    workers = [Worker.start(checkout.resolve(), args.model) for checkout in (args.before, HERE.parent)]
    assert [worker.said() for worker in workers] == ["ready", "ready"]
    for case in args.cases.split(","):
        pairs = [[worker.seconds_of(case) for worker in workers] for _ in range(args.repeats + 1)][1:]
        ratios = sorted(new / old for old, new in pairs)
        row = {
            "case": case,
            "ratio": round(statistics.median(ratios), 4),
            "spread": [round(ratios[0], 4), round(ratios[-1], 4)],
            "before_seconds": round(statistics.median(old for old, _ in pairs), 4),
            "now_seconds": round(statistics.median(new for _, new in pairs), 4),
            "repeats": args.repeats,
            "model": args.model.name,
            "before": before,
            "now": now,
            "date": time.strftime("%Y-%m-%d"),
        }
        with args.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{case}: {row['ratio']:.3f} ({row['spread'][0]:.3f} to {row['spread'][1]:.3f})", flush=True)


if __name__ == "__main__":
    main()
