"""Carry a patch to an updated model, as in PortLLM (arXiv 2410.10870), and measure what becomes of it.

    python examples/port_smollm2.py BASE DATA OUT

BASE is the folder of a model θ, SmolLM2-135M-Instruct in docs/results-speed.md, DATA one with sst2/train_3000.jsonl,
sst2/dev.jsonl and text/*.txt, OUT the folder to make:

    OUT/patch            Δθ_i: LoRA of θ (r = 8, lr 4e-4, all attention and MLP matrices) on SST-2
    OUT/update           θ′ - θ: LoRA (r = 64, α = 128, lr 1e-4, the same matrices) of continued pre-training on text
    OUT/updated          θ′ = θ + update
    OUT/patched          θ_i = θ + Δθ_i
    OUT/ported           θ′ + Δθ_i
    OUT/patch_updated    Δθ′_i: LoRA of θ′ on SST-2, as above
    OUT/patched_updated  θ′_i = θ′ + Δθ′_i
    OUT/rows.jsonl       a row per model (accuracy on SST-2 dev) and one with the norms of the paper's Table 1

Epochs are the paper's (5 for SST-2, 4 for the text), which wants a GPU. The figures in docs/results-speed.md are of two
CPU cores: --reviews 960 --epochs 1 --text-pieces 400 --text-epochs 1. A finished part is not made again.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from make_smollm2_trio import LABELS, PROMPT, SEED, review_batch, train_lora
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ensembler.patch.apply import apply_patches
from ensembler.patch.formats import read_patch
from ensembler.patch.geometry import inspect_patch

ROWS = {"reviews": 12, "pieces": 4}  # of a batch
PIECE = 128  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, nargs="?")
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--epochs", type=int, default=5, help="passes over the reviews (the paper's 5)")
    parser.add_argument("--reviews", type=int, help="SST-2 rows of a pass (default: all)")
    parser.add_argument("--text-epochs", type=int, default=4, help="passes over the text (the paper's 4)")
    parser.add_argument("--text-pieces", type=int, help=f"pieces of {PIECE} tokens in a pass (default: all)")
    parser.add_argument("--results", type=Path, help="where rows go (default: OUT/rows.jsonl)")
    parser.add_argument("--table", action="store_true", help="only print the rows of --results as tables")
    args = parser.parse_args()
    if args.table:
        print_tables(read_rows(args.results))
        return
    if args.out is None:
        parser.error("give BASE, DATA and OUT")
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    reviews = read_rows(args.data / "sst2" / "train_3000.jsonl")
    random.Random(SEED).shuffle(reviews)
    chosen = batches(reviews[: args.reviews], args.epochs, ROWS["reviews"])
    texts = batches(text_pieces(args.data / "text", tokenizer)[: args.text_pieces], args.text_epochs, ROWS["pieces"])
    review_batches = [review_batch(batch, tokenizer) for batch in chosen]
    text_batches = [{"input_ids": torch.stack(batch), "labels": torch.stack(batch)} for batch in texts]

    train_lora(args.base, out / "patch", tokenizer, review_batches)
    train_lora(args.base, out / "update", tokenizer, text_batches, rank=64, learning_rate=1e-4)
    add(out / "update", args.base, out / "updated")
    add(out / "patch", args.base, out / "patched")
    add(out / "patch", out / "updated", out / "ported")
    train_lora(out / "updated", out / "patch_updated", tokenizer, review_batches)
    add(out / "patch_updated", out / "updated", out / "patched_updated")

    results: Path = args.results or out / "rows.jsonl"
    written = {row["name"] for row in read_rows(results)} if results.exists() else set()
    settings = {
        "reviews": sum(map(len, chosen)),
        "text_tokens": PIECE * sum(map(len, texts)),
        "base": args.base.name,
        "date": time.strftime("%Y-%m-%d"),
    }
    dev = read_rows(args.data / "sst2" / "dev.jsonl")
    models = {"θ": args.base, "θ′": out / "updated", "θ_i": out / "patched", "θ′_i": out / "patched_updated"}
    for name, folder in {**models, "θ′ + Δθ_i": out / "ported"}.items():
        if name not in written:
            correct = sum(right_answers(folder, dev, tokenizer))
            error = (correct / len(dev) * (1 - correct / len(dev)) / len(dev)) ** 0.5
            row = {"accuracy": correct / len(dev), "standard_error": error, "correct": correct, "rows": len(dev)}
            append(results, {"name": name, **row, **settings})
    if "Table 1" not in written:
        patch, other = read_patch(out / "patch"), read_patch(out / "patch_updated")
        report = inspect_patch(patch, model=out / "updated", base=args.base, other=other)
        append(results, {"name": "Table 1", **report.overall(), **settings})


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def append(results: Path, row: dict[str, Any]) -> None:
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(json.dumps(row, ensure_ascii=False))


def print_tables(rows: list[dict[str, Any]]) -> None:
    """Print the accuracies, which are in docs/results-speed.md, and Table 1."""
    print("| model | SST-2 dev accuracy | standard error | correct |")
    print("|---|---|---|---|")
    for row in rows:
        if "accuracy" in row:
            accuracy, error = 100 * row["accuracy"], 100 * row["standard_error"]
            print(f"| {row['name']} | {accuracy:.1f} % | {error:.1f} | {row['correct']} of {row['rows']} |")
    (norms,) = [row for row in rows if row["name"] == "Table 1"]
    print("\n| term | | all matrices as one | mean over matrices |")
    print("|---|---|---|---|")
    for key, term in (("patched", "θ′ + Δθ_i"), ("residual", "Δθ′_i - Δθ_i"), ("patch", "Δθ_i"), ("ratio", "ratio")):
        for kind, sign in (("sigma_max", "σ_max"), ("frobenius", "‖·‖_F")):
            print(f"| {term} | {sign} | {norms[f'{key}_{kind}']:.4g} | {norms[f'{key}_{kind}_mean']:.4g} |")
    print(f"| θ′ - θ | ‖·‖_F | {norms['update_frobenius']:.4g} | |")
    print(f"| cosine of Δθ_i with θ′ - θ | | {norms['cosine']:.2g} | |")


def text_pieces(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """Pieces of PIECE tokens of the two texts, shuffled."""
    texts = [(folder / name).read_text("utf-8") for name in ("wikitext2_raw_valid.txt", "tinyshakespeare.txt")]
    ids = torch.tensor([token for text in texts for token in tokenizer(text)["input_ids"]])
    pieces = list(ids[: len(ids) // PIECE * PIECE].split(PIECE))
    random.Random(SEED).shuffle(pieces)
    return pieces


def batches(rows: list[Any], num_epochs: int, size: int) -> list[list[Any]]:
    """Batches of all passes, each pass in an order of its own."""
    rng = random.Random(SEED)
    passes = [rng.sample(rows, len(rows)) for _ in range(num_epochs)]
    return [order[start : start + size] for order in passes for start in range(0, len(order), size)]


def add(patch: Path, model: Path, out: Path) -> None:
    if not out.exists():
        apply_patches([read_patch(patch)], model, out)


@torch.inference_mode()
def right_answers(folder: Path, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[bool]:
    """Return which reviews get the right one of the two labels, by its first token; 32 of like length at once."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    labels = {label: tokenizer(text, add_special_tokens=False)["input_ids"][0] for label, text in LABELS.items()}
    texts = [tokenizer(PROMPT.format(sentence=row["sentence"].strip()))["input_ids"] for row in rows]
    order = sorted(range(len(rows)), key=lambda index: len(texts[index]))
    right = [False] * len(rows)
    for batch in (order[start : start + 32] for start in range(0, len(order), 32)):
        longest = len(texts[batch[-1]])
        gaps = [longest - len(texts[index]) for index in batch]
        ids = torch.tensor([[0] * gap + texts[index] for gap, index in zip(gaps, batch, strict=True)])
        mask = torch.tensor([[0] * gap + [1] * (longest - gap) for gap in gaps])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=positions, logits_to_keep=1).logits[:, -1]
        for index, row in zip(batch, logits, strict=True):
            right[index] = max(labels, key=lambda label: row[labels[label]].item()) == rows[index]["label"]
    return right


if __name__ == "__main__":
    main()
