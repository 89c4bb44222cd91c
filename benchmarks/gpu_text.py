"""Section `text` of `gpu.py`: what a token takes where the target writes in other tokens, and where it shares them.

Members are random Llamas of one shape in bf16, with sharp distributions; the tokenizers are byte-level, trained on the
project's docs for the source pair, and on its code for the target. Both ensembles decode greedily by base-change at
alpha 1. Texts of random models share little with those of trained ones: the figures are what
evaluations and rounds cost, not how many a text needs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_engine
import torch
from gpu_options import Options, Row

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
SHARPNESS = 30.0  # times the weights of the output, so that few tokens matter
DOCS, CODE = "docs/*.md", "ensembler/*/*.py"
PROMPT = "The members of an ensemble may write their texts in other tokens"


def text(options: Options) -> Iterator[Row]:
    """Time decoding with a target of another tokenizer, and with one of the same."""
    if not options.has_time("text"):
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        members = {role: _save(folder / role, seed, DOCS, options) for seed, role in enumerate(gpu_engine.ROLES)}
        other = _save(folder / "other", 2, CODE, options)
        same, other = (_ensemble(one, options) for one in (members, {**members, "target_pt": other}))
        for rows in (1, 2) if options.small else (1, 8):
            if options.has_time(f"text: {rows} rows"):
                yield from _rows(other, same, rows, options)


def _rows(other: Any, same: Any, num_rows: int, options: Options) -> Iterator[Row]:
    from ensembler.decoding.decode_stats import DecodingStats, Meter
    from ensembler.decoding.decoder import Decoder
    from ensembler.engine.text_members import TextStats

    ids = torch.tensor([other.tokenizer(PROMPT).input_ids] * num_rows, device=options.device)

    def way(model: Any) -> Callable[[int], object]:
        return lambda num: model.generate(ids, max_new_tokens=num, do_sample=False)

    times = gpu_engine.per_token({"other tokenizer": way(other), "same tokenizer": way(same)}, options)
    asked = other.member_set.text
    asked.stats, asked.members["target_pt"].num_evaluated = TextStats(), 0
    meter = Meter(DecodingStats())
    with meter.watching(other):
        other.generate(ids, max_new_tokens=16, do_sample=False, custom_generate=Decoder("none", meter=meter))
    found = asked.describe()
    ratio = times["other tokenizer"].median / times["same tokenizer"].median
    fields = {
        "rows": num_rows,
        "ratio": ratio,
        **{name.replace(" ", "_"): gpu_engine.milliseconds(spread) for name, spread in times.items()},
        "evaluations": found["evaluations"]["target_pt"],
        "rounds": found["rounds"],
        "host_share": 1 - sum(meter.stats.members.values()) / meter.stats.seconds,
    }
    cells = {name: f"{spread.median * 1e3:.2f} ms" for name, spread in times.items()}
    cells |= {name: f"{fields[name]:.2f}" for name in ("ratio", "evaluations", "rounds", "host_share")}
    yield Row(f"another tokenizer, {num_rows} rows", fields, cells)


def _save(folder: Path, seed: int, files: str, options: Options) -> Path:
    """Save a random member and its tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500 if options.small else 8_000,
        special_tokens=["<end>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    made.train([str(path) for path in sorted(ROOT.glob(files))], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", bos_token="<end>")
    shape = gpu_engine.SMALL if options.small else SHAPE
    model = gpu_engine.llama({**shape, "vocab_size": len(tokenizer)}, seed, options.device)
    with torch.no_grad():
        model.lm_head.weight.mul_(SHARPNESS)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _ensemble(members: dict[str, Path], options: Options) -> Any:
    from ensembler import EnsembleForCausalLM

    dtype = "bfloat16" if options.device.type == "cuda" else "float32"
    placed = {
        role: {"model": str(folder), "device": str(options.device), "dtype": dtype} for role, folder in members.items()
    }
    model = EnsembleForCausalLM.from_members(rule="base-change", alpha=1.0, members=placed)
    model.generation_config.eos_token_id = None
    return model
