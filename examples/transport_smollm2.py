"""Carry a patch over three updates of its base by every transport, and measure what becomes of it.

    python examples/transport_smollm2.py BASE DATA OUT

BASE is the folder of a model θ, SmolLM2-135M-Instruct in benchmarks/results, DATA one with sst2/train_3000.jsonl,
sst2/dev.jsonl and text/*.txt, OUT the folder to make:

    OUT/patch        Δ: LoRA of θ (r = 8, lr 4e-4, all attention and MLP matrices) on SST-2
    OUT/update-K     LoRA (r = 64, α = 128, lr 1e-4, the same matrices) of continued pre-training on text
    OUT/base-K       θ_K = θ_(K-1) + update K, for K = 1, 2, 3; each update learns from other pieces of text
    OUT/rows.jsonl   a row for each base, alone and with the patch by each transport: accuracy on SST-2 dev with its
                     95 % interval, and the difference from plain addition with its interval and the exact McNemar p

sign-mask takes 32 reviews that the patch was not trained on, procrustes 16 pieces of text (2,048 tokens). A finished
part is not made again, and a row that is there is not measured again: the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from make_smollm2_trio import LABELS, PROMPT, SEED, review_batch, train_lora
from port_smollm2 import PIECE, ROWS, add, append, batches, read_rows, right_answers, text_pieces
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ensembler.evaluation.calibration import labelled_examples, plain_texts
from ensembler.evaluation.statistics import compare, metric_interval
from ensembler.patch.apply import apply_plan
from ensembler.patch.formats import read_patch
from ensembler.patch.patch_plan import plan_patches
from ensembler.patch.transports.carry_lora import carry_lora
from ensembler.patch.transports.transport import Sources, carried

TRANSPORTS = ("add", "orthogonal", "sign-mask", "procrustes")
NUM_UPDATES = 3
NUM_EXAMPLES, NUM_TEXTS = 32, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, nargs="?")
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--reviews", type=int, default=960, help="SST-2 rows that the patch learns from, once")
    parser.add_argument("--text-pieces", type=int, default=200, help=f"pieces of {PIECE} tokens of each update")
    parser.add_argument("--dev-rows", type=int, help="rows of SST-2 dev (default: all)")
    parser.add_argument("--transports", default=",".join(TRANSPORTS), help="which of them (default: all)")
    parser.add_argument("--results", type=Path, help="where rows go (default: OUT/rows.jsonl)")
    parser.add_argument("--table", action="store_true", help="only print the rows of --results as a table")
    args = parser.parse_args()
    if args.table:
        print_table(read_rows(args.results))
        return
    if args.out is None:
        parser.error("give BASE, DATA and OUT")
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    reviews = read_rows(args.data / "sst2" / "train_3000.jsonl")
    random.Random(SEED).shuffle(reviews)
    examples, texts = write_sources(out, reviews[-NUM_EXAMPLES:], args.data, tokenizer)

    learned = batches(reviews[: args.reviews], 1, ROWS["reviews"])
    train_lora(args.base, out / "patch", tokenizer, [review_batch(batch, tokenizer) for batch in learned])
    bases = [args.base, *(out / f"base-{number}" for number in range(1, NUM_UPDATES + 1))]
    make_updates(bases, args, tokenizer)

    results: Path = args.results or out / "rows.jsonl"
    rows = read_rows(results) if results.exists() else []
    settings = {
        "reviews": args.reviews,
        "text_tokens": PIECE * args.text_pieces,
        "base": args.base.name,
        "date": time.strftime("%Y-%m-%d"),
    }
    dev = read_rows(args.data / "sst2" / "dev.jsonl")[: args.dev_rows]

    def measure(update: int, method: str, folder: Path) -> None:
        if any((row["update"], row["method"]) == (update, method) for row in rows):
            return
        right = "".join(str(int(each)) for each in right_answers(folder, dev, tokenizer))
        added = next((row["right"] for row in rows if (row["update"], row["method"]) == (update, "add")), None)
        row = {"update": update, "method": method, **figures(right, added), "right": right, **settings}
        append(results, row)
        rows.append(row)

    measure(0, "none", args.base)
    for update, base in enumerate(bases):
        if update:
            measure(update, "none", base)
        for name in args.transports.split(",") if update else ["add"]:
            if any((row["update"], row["method"]) == (update, name) for row in rows):
                continue
            ported = out / f"ported-{update}-{name}"
            if not ported.exists():
                port(name, out / "patch", args.base, base, ported, examples, texts)
            measure(update, name, ported)
            shutil.rmtree(ported)


def write_sources(
    out: Path, reviews: list[dict[str, Any]], data: Path, tokenizer: PreTrainedTokenizerBase
) -> tuple[Path, Path]:
    """Write the labelled examples of sign-mask and the texts of procrustes; return their files."""
    examples, texts = out / "examples.jsonl", out / "texts.jsonl"
    rows = [
        {"prompt": PROMPT.format(sentence=row["sentence"].strip()), "answer": LABELS[row["label"]]} for row in reviews
    ]
    examples.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    pieces = text_pieces(data / "text", tokenizer)[-NUM_TEXTS:]
    texts.write_text("".join(json.dumps({"text": tokenizer.decode(piece)}) + "\n" for piece in pieces), "utf-8")
    return examples, texts


def make_updates(bases: list[Path], args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> None:
    """Train and add the updates, one on the other, each on pieces of text of its own."""
    pieces = text_pieces(args.data / "text", tokenizer)
    for number in range(1, len(bases)):
        own = pieces[(number - 1) * args.text_pieces : number * args.text_pieces]
        grouped = [torch.stack(batch) for batch in batches(own, 1, ROWS["pieces"])]
        lora, old = args.out / f"update-{number}", bases[number - 1]
        learned = [{"input_ids": ids, "labels": ids} for ids in grouped]
        train_lora(old, lora, tokenizer, learned, rank=64, learning_rate=1e-4)
        add(lora, old, bases[number])


def port(name: str, patch: Path, old: Path, new: Path, out: Path, examples: Path, texts: Path) -> None:
    """Write the new base with the patch carried by a transport."""
    start = time.monotonic()
    if name == "procrustes":
        lora = out.with_name(f"{out.name}.lora")
        if not lora.exists():
            carry_lora(read_patch(patch), old, new, plain_texts(texts), lora)
        apply_plan(plan_patches([read_patch(lora)], new), out)
    else:
        sources = {"orthogonal": Sources(old=old), "sign-mask": Sources(data=labelled_examples(examples))}.get(
            name, Sources()
        )
        apply_plan(carried(plan_patches([read_patch(patch)], new), name, sources), out)
    print(f"{out.name}: {time.monotonic() - start:.0f} s")


def figures(right: str, added: str | None) -> dict[str, Any]:
    """Return the accuracy with its interval, and the difference from plain addition with interval and p."""
    mine = [int(each) for each in right]
    interval = metric_interval(mine)
    found: dict[str, Any] = {"accuracy": interval.estimate, "low": interval.low, "high": interval.high}
    if added is not None:
        comparison = compare(mine, [int(each) for each in added])
        difference = comparison.difference
        found |= {"minus_add": difference.estimate, "minus_add_low": difference.low, "minus_add_high": difference.high}
        found["p_mcnemar"] = comparison.p_value
    return {**found, "correct": sum(mine), "rows": len(mine)}


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print a line for each row."""
    print("| updates | method | SST-2 dev accuracy (95 %) | minus plain addition (95 %) | p |")
    print("|---|---|---|---|---|")
    for row in rows:
        mine = f"{100 * row['accuracy']:.1f} % ({100 * row['low']:.1f} to {100 * row['high']:.1f})"
        against = p_value = ""
        if "minus_add" in row:
            edges = f"{100 * row['minus_add_low']:+.1f} to {100 * row['minus_add_high']:+.1f}"
            against, p_value = f"{100 * row['minus_add']:+.1f} ({edges})", f"{row['p_mcnemar']:.2g}"
        print(f"| {row['update']} | {row['method']} | {mine} | {against} | {p_value} |")


if __name__ == "__main__":
    main()
