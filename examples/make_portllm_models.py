"""Make the models of a small PortLLM experiment (arXiv 2410.10870): updates, patches, directly tuned models.

    python examples/make_portllm_models.py BASE DATA OUT

BASE is the folder of a model θ, DATA one with {sst2,mrpc,wnli,boolq}/*.jsonl and text/*.txt, OUT the cache to fill:

    OUT/update_1 .. 3     LoRA r = 64, α = 128, lr 1e-4 of continued pre-training, each of the model before it, each on
                          another text: WikiText-2 validation, Tiny Shakespeare, WikiText-2 test
    OUT/theta_1 .. 3      θ after one, two, three updates (θ′ is theta_1)
    OUT/phi               φ: θ after an update of all weights on WikiText-2 validation
    OUT/patch_TASK        Δθ_i: LoRA r = 8, lr 4e-4 of θ, of attention and MLP matrices, on the task in lm-eval's format
    OUT/patch_sst2_rN     the same of rank N = 2, 4, 16, 32
    OUT/direct_TASK       Δθ′_i: the same LoRA r = 8 of θ′, for the directly tuned target

The learning rates, ranks and matrices are the paper's (section 4); its 3 to 5 epochs over whole data sets are not: see
STEPS, which make it about an hour on two CPU cores. A finished part is not made again.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from make_smollm2_trio import SEED, save, train
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ensembler.evaluation.encoding import encode_pair
from ensembler.evaluation.examples import Continuation, Example
from ensembler.evaluation.task_loading import load_tasks
from ensembler.patch.apply import apply_patches
from ensembler.patch.plan import Part

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TASKS = Path(__file__).parent / "tasks"
# Steps and rows of a step. BoolQ's passages are long.
STEPS = {"sst2": (80, 12), "mrpc": (100, 8), "wnli": (60, 8), "boolq": (80, 4), "text": (60, 4)}
TEXTS = ("wikitext2_raw_valid.txt", "tinyshakespeare.txt", "wikitext2_raw_test.txt")
RANKS = (2, 4, 16, 32)
PIECE = 128  # tokens
LONGEST = 256  # tokens of an example; longer ones are not trained on

Batch = dict[str, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    before = args.base
    for number, name in enumerate(TEXTS, start=1):
        update, after = out / f"update_{number}", out / f"theta_{number}"
        text = args.data / "text" / name
        tune(before, update, tokenizer, lambda text=text: pieces(text, tokenizer), rank=64, learning_rate=1e-4)
        if not after.exists():
            apply_patches([Part(update)], before, after)
        before = after
    train_whole(args.base, out / "phi", tokenizer, args.data / "text" / TEXTS[0])
    for task in ("sst2", "mrpc", "wnli", "boolq"):
        examples = rows_of(task, args.data, tokenizer)
        for base, name in ((args.base, f"patch_{task}"), (out / "theta_1", f"direct_{task}")):
            tune(base, out / name, tokenizer, lambda task=task, rows=examples: batches(rows, task, tokenizer))
        if task == "sst2":
            for rank in RANKS:
                tune(
                    args.base,
                    out / f"patch_sst2_r{rank}",
                    tokenizer,
                    lambda rows=examples: batches(rows, "sst2", tokenizer),
                    rank=rank,
                )


def tune(
    base: Path,
    out: Path,
    tokenizer: PreTrainedTokenizerBase,
    make_batches: Any,
    rank: int = 8,
    learning_rate: float = 4e-4,
) -> None:
    """Train a LoRA on all attention and MLP matrices, its α twice its rank, unless `out` is there."""
    if out.exists():
        return
    torch.manual_seed(SEED)
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEAR, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), settings)
    model.peft_config["default"].base_model_name_or_path = os.path.relpath(base, out)
    found = list(make_batches())
    train(model, iter(found), len(found), learning_rate, out.name)
    save(model, tokenizer, out)


def train_whole(base: Path, out: Path, tokenizer: PreTrainedTokenizerBase, text: Path) -> None:
    """Train all weights on running text."""
    if out.exists():
        return
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    found = list(pieces(text, tokenizer))
    train(model, iter(found), len(found), 3e-5, out.name)
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


def rows_of(task: str, data: Path, tokenizer: PreTrainedTokenizerBase) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The train split in lm-eval's format: the ids of every prompt and of its right answer."""
    with tempfile.TemporaryDirectory() as folder:  # relative data files of a task lie beside its YAML file
        path = Path(folder) / f"{task}.yaml"
        path.write_text((TASKS / path.name).read_text("utf-8"), "utf-8")
        (Path(folder) / "data").symlink_to(data.resolve())
        (loaded,) = load_tasks([str(path)])
        pairs = [encode_pair(*right_answer(example), tokenizer) for example in loaded.examples("train")]
    return [pair for pair in pairs if sum(map(len, pair)) <= LONGEST]


def right_answer(example: Example) -> tuple[str, str]:
    """The prompt and the continuation that is right."""
    request = example.requests[example.choices.index(str(example.gold))]
    assert isinstance(request, Continuation)
    return request.context, request.text


def batches(
    rows: list[tuple[tuple[int, ...], tuple[int, ...]]], task: str, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Batch]:
    """Ids, mask and labels (rows, longest), padded on the right; only the answer is learned."""
    num, size = STEPS[task]
    rng = random.Random(SEED)
    order: list[Any] = []
    for _ in range(num):
        if len(order) < size:
            order = rng.sample(rows, len(rows))
        chosen, order = order[:size], order[size:]
        longest = max(sum(map(len, pair)) for pair in chosen)
        batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for prompt, answer in chosen:
            gap = longest - len(prompt) - len(answer)
            batch["input_ids"].append([*prompt, *answer, *[tokenizer.eos_token_id] * gap])
            batch["attention_mask"].append([1] * (longest - gap) + [0] * gap)
            batch["labels"].append([-100] * len(prompt) + [*answer] + [-100] * gap)
        yield {name: torch.tensor(values) for name, values in batch.items()}


if __name__ == "__main__":
    main()
