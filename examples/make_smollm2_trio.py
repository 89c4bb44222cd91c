"""Make a source FT, source PT, target PT trio from one real 135M model.

    python examples/make_smollm2_trio.py BASE DATA OUT

BASE is the folder of a model, SmolLM2-135M-Instruct in docs/smollm2.md, DATA one with sst2/train_3000.jsonl and
text/*.txt, OUT the folder to make:

    OUT/source_ft   a LoRA adapter of BASE, trained to name the sentiment of a film review (SST-2)
    OUT/target_pt   BASE after continued pre-training on running text (WikiText-2 validation, Tiny Shakespeare)

The source PT is BASE itself. About 15 minutes on two CPU cores; a finished part is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

PROMPT = "Review: {sentence}\nSentiment:"
LABELS = {"0": " negative", "1": " positive"}
SEED = 0
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--reviews", type=int, default=720, help="SST-2 rows for the fine-tuning")
    parser.add_argument("--text-steps", type=int, default=60, help="steps of continued pre-training")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    make_source_ft(args.base, args.data, args.out / "source_ft", tokenizer, args.reviews)
    if not (args.out / "target_pt").exists():
        make_target_pt(args.base, args.data, args.out / "target_pt", tokenizer, args.text_steps)


def make_source_ft(
    base: Path, data: Path, out: Path, tokenizer: PreTrainedTokenizerBase, num_reviews: int, batch_size: int = 12
) -> None:
    """Train a LoRA (r = 8 on q and v, as in PortLLM's downstream settings) on the labels of reviews alone."""
    rows = [json.loads(line) for line in (data / "sst2" / "train_3000.jsonl").read_text("utf-8").splitlines()]
    random.Random(SEED).shuffle(rows)
    batches = [review_batch(rows[i : i + batch_size], tokenizer) for i in range(0, num_reviews, batch_size)]
    train_lora(base, out, tokenizer, batches, modules=["q_proj", "v_proj"])


def review_batch(rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """Ids, mask and labels (rows, longest), padded on the right; only the label's token is learned."""
    texts = [tokenizer(PROMPT.format(sentence=row["sentence"].strip()))["input_ids"] for row in rows]
    answers = [tokenizer(LABELS[row["label"]], add_special_tokens=False)["input_ids"] for row in rows]
    longest = max(len(text) + len(answer) for text, answer in zip(texts, answers, strict=True))
    batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for text, answer in zip(texts, answers, strict=True):
        padding = longest - len(text) - len(answer)
        batch["input_ids"].append([*text, *answer] + [tokenizer.eos_token_id] * padding)
        batch["attention_mask"].append([1] * (longest - padding) + [0] * padding)
        batch["labels"].append([-100] * len(text) + answer + [-100] * padding)
    return {name: torch.tensor(values) for name, values in batch.items()}


def make_target_pt(
    base: Path, data: Path, out: Path, tokenizer: PreTrainedTokenizerBase, num_steps: int, length: int = 128
) -> None:
    """Continue the pre-training of all weights on random pieces of running text."""
    torch.manual_seed(SEED)
    texts = [(data / "text" / name).read_text("utf-8") for name in ("wikitext2_raw_valid.txt", "tinyshakespeare.txt")]
    pieces = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    train(model, text_batches(pieces, num_steps, length), num_steps, 3e-5, "target_pt")
    save(model, tokenizer, out)


def text_batches(texts: list[Tensor], num: int, length: int, rows: int = 4) -> Iterator[dict[str, Tensor]]:
    """Yield ids and labels (rows, length) from random places, the texts by turns."""
    rng = random.Random(SEED)
    for _ in range(num):
        chosen = [texts[row % len(texts)] for row in range(rows)]
        starts = [rng.randrange(len(text) - length) for text in chosen]
        ids = torch.stack([text[start : start + length] for text, start in zip(chosen, starts, strict=True)])
        yield {"input_ids": ids, "labels": ids}


def train_lora(
    base: Path,
    out: Path,
    tokenizer: PreTrainedTokenizerBase,
    batches: Sequence[dict[str, Any]],
    *,
    rank: int = 8,
    learning_rate: float = 4e-4,
    modules: Sequence[str] = LINEAR,
    mixed: bool = False,
) -> None:
    """Train a LoRA, its α twice its rank, on batches of tensors, unless `out` is there."""
    if out.exists():
        return
    torch.manual_seed(SEED)
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(modules), task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), settings)
    model.peft_config["default"].base_model_name_or_path = os.path.relpath(base, out)
    train(model, iter(batches), len(batches), learning_rate, out.name, mixed=mixed)
    save(model, tokenizer, out)


def train(
    model: torch.nn.Module,
    batches: Iterator[dict[str, Any]],
    num: int,
    learning_rate: float,
    name: str,
    *,
    mixed: bool = False,
) -> None:
    """One pass with AdamW and a linear decay, in bfloat16 where `mixed`; a line of progress every ten steps."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / num)
    model.train()
    start, recent = time.monotonic(), []
    for step, batch in enumerate(batches, 1):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if step % 10 == 0 or step == num:
            mean = sum(recent[-10:]) / len(recent[-10:])
            print(f"{name}: step {step} of {num}, loss {mean:.3f}, {time.monotonic() - start:.0f} s", file=sys.stderr)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write the folder under another name and rename it: a folder that is there is complete."""
    partial = out.with_name(f"{out.name}.partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(out)


if __name__ == "__main__":
    main()
