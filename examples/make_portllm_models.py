"""Make the models of a small PortLLM experiment (arXiv 2410.10870): updates, patches, directly tuned models.

    python examples/make_portllm_models.py BASE DATA OUT

BASE is the folder of a model θ, DATA one with {sst2,mrpc,wnli,boolq}/*.jsonl and text/*.txt, OUT the cache to fill:

    OUT/theta             a link to BASE
    OUT/data/TASK         train.jsonl, choose.jsonl (the rows of the train set that choose α, never trained on) and
                          test.jsonl, for the tasks in examples/recipes/smollm2
    OUT/update_1 .. 3     LoRA r = 64, α = 128, lr 1e-4 of continued pre-training, each of the model before it, each on
                          another text: WikiText-2 validation, Tiny Shakespeare, WikiText-2 test
    OUT/theta_1 .. 3      θ′: θ after one, two, three updates (θ′ is theta_1)
    OUT/phi               φ: θ after an update of all weights on WikiText-2 validation
    OUT/patch_TASK        Δθ_i: LoRA r = 8, lr 4e-4 of θ, of attention and MLP matrices, on the task in lm-eval's format
    OUT/patch_sst2_rN     the same of rank N = 2, 4, 16, 32
    OUT/direct_TASK       Δθ′_i: the same LoRA r = 8 of θ′, for the directly tuned target

The learning rates, ranks and matrices are the paper's (section 4); its 3 to 5 epochs over whole data sets are not: see
STEPS, which make it half an hour on two CPU cores that multiply in bfloat16. A finished part is not made again.
"""

from __future__ import annotations

import argparse
import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from make_smollm2_trio import SEED, save, train, train_lora
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ensembler.evaluation.task_loading import load_tasks
from ensembler.patch.apply import apply_patches
from ensembler.patch.formats import read_patch

TASKS = Path(__file__).parent / "recipes" / "smollm2"
# Steps and rows of a step. BoolQ's passages are long.
STEPS = {"sst2": (100, 12), "mrpc": (120, 8), "wnli": (80, 8), "boolq": (100, 4), "text": (80, 4)}
# The train and the test set of each task, and how many rows of the train set choose α.
DATA = {
    "sst2": ("train_3000", "dev", 300),
    "mrpc": ("train", "dev", 300),
    "wnli": ("train", "dev", 150),
    "boolq": ("tune_1000", "val_1000", 200),
}
TEXTS = ("wikitext2_raw_valid.txt", "tinyshakespeare.txt", "wikitext2_raw_test.txt")
RANKS = (2, 4, 16, 32)
PIECE = 128  # tokens
LONGEST = 256  # tokens of an example; longer ones are not trained on

Batch = dict[str, Any]
Pair = tuple[tuple[int, ...], tuple[int, ...]]  # ids of a prompt and of its answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    base, data, out = args.base.resolve(), args.data.resolve(), args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "theta").exists():
        (out / "theta").symlink_to(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    for task in DATA:
        split(task, data, out / "data" / task)
    before = out / "theta"
    for number, name in enumerate(TEXTS, start=1):
        update, after = out / f"update_{number}", out / f"theta_{number}"
        text = list(pieces(data / "text" / name, tokenizer))
        train_lora(before, update, tokenizer, text, rank=64, learning_rate=1e-4, mixed=True)
        if not after.exists():
            apply_patches([read_patch(update)], before, after)
        before = after
    for task in DATA:
        rows = list(batches(rows_of(task, out, tokenizer), task, tokenizer))
        train_lora(out / "theta", out / f"patch_{task}", tokenizer, rows, mixed=True)
        train_lora(out / "theta_1", out / f"direct_{task}", tokenizer, rows, mixed=True)
        for rank in RANKS if task == "sst2" else ():
            train_lora(out / "theta", out / f"patch_sst2_r{rank}", tokenizer, rows, rank=rank, mixed=True)
    train_whole(out / "theta", out / "phi", tokenizer, data / "text" / TEXTS[0])


def split(task: str, data: Path, out: Path) -> None:
    """Split the train set at random: rows to train on, rows to choose α by; the test set stays as it is."""
    if out.exists():
        return
    train_name, test_name, num_choosing = DATA[task]
    lines = (data / task / f"{train_name}.jsonl").read_text("utf-8").splitlines()
    random.Random(SEED).shuffle(lines)
    splits = {"choose": lines[:num_choosing], "train": lines[num_choosing:]}
    splits["test"] = (data / task / f"{test_name}.jsonl").read_text("utf-8").splitlines()
    partial = out.with_name(f"{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    for name, kept in splits.items():
        (partial / f"{name}.jsonl").write_text("\n".join(kept) + "\n", "utf-8")
    partial.rename(out)


def train_whole(base: Path, out: Path, tokenizer: PreTrainedTokenizerBase, text: Path) -> None:
    """Train all weights on running text."""
    if out.exists():
        return
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    found = list(pieces(text, tokenizer))
    train(model, iter(found), len(found), 3e-5, out.name, mixed=True)
    save(model, tokenizer, out)


def pieces(text: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[Batch]:
    """Random pieces of a text: ids and labels (rows, PIECE)."""
    num, rows = STEPS["text"]
    ids = torch.tensor(tokenizer(text.read_text("utf-8"))["input_ids"])
    rng = random.Random(SEED)
    for _ in range(num):
        starts = [rng.randrange(len(ids) - PIECE) for _ in range(rows)]
        batch = torch.stack([ids[start : start + PIECE] for start in starts])
        yield {"input_ids": batch, "labels": batch}


def rows_of(task: str, out: Path, tokenizer: PreTrainedTokenizerBase) -> list[Pair]:
    """The rows to train on in lm-eval's format: the ids of every prompt and of its right answer."""
    with contextlib.chdir(out):  # the task looks for data/ here
        (loaded,) = load_tasks([str(TASKS / f"{task}.yaml")])
        documents = loaded.documents("train")
    requests = [document.requests[document.choices.index(str(document.gold))] for document in documents]
    pairs = [encode(tokenizer, *request.args) for request in requests]
    return [pair for pair in pairs if sum(map(len, pair)) <= LONGEST]


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> Pair:
    """Return both as ids, split where the prompt's own tokens end, as in lm-eval's HFLM."""
    ids = tokenizer.encode(prompt)
    return tuple(ids), tuple(tokenizer.encode(prompt + answer)[len(ids) :])


def batches(rows: list[Pair], task: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[Batch]:
    """Ids and mask (rows, longest), padded on the left; labels (rows, longest answer + 1): the answer alone is learned.

    So only the last positions go through the head, which for a small model with a large vocabulary is half of a step.
    """
    num, size = STEPS[task]
    rng = random.Random(SEED)
    order: list[Pair] = []
    for _ in range(num):
        if len(order) < size:
            order = rng.sample(rows, len(rows))
        chosen, order = order[:size], order[size:]
        longest = max(sum(map(len, pair)) for pair in chosen)
        kept = 1 + max(len(answer) for _, answer in chosen)
        batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for prompt, answer in chosen:
            gap = longest - len(prompt) - len(answer)
            batch["input_ids"].append([tokenizer.eos_token_id] * gap + [*prompt, *answer])
            batch["attention_mask"].append([0] * gap + [1] * (longest - gap))
            batch["labels"].append([-100] * (kept - len(answer)) + [*answer])
        yield {**{name: torch.tensor(values) for name, values in batch.items()}, "logits_to_keep": kept}


if __name__ == "__main__":
    main()
