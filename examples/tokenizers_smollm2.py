"""Carry fine-tunes of SmolLM2 to Gemma 3, which writes text in other tokens, and measure what becomes of them.

    python examples/tokenizers_smollm2.py SOURCE TARGET DATA OUT [--task sst2]

SOURCE is the folder of SmolLM2-135M, TARGET that of Gemma 3 270M, DATA one with sst2/, mrpc/, boolq/ and gsm8k/ as the
files of examples/tasks expect them. OUT gets

    OUT/TASK/source_ft       a LoRA of SOURCE (r = 8, all attention and MLP matrices), one pass over some training rows
    OUT/TASK/RULE            the folder of `ensembler sweep` for base-change and for EFT
    OUT/rows.jsonl           the methods with their intervals, and each pair of them with the exact test of McNemar

Of SST-2, MRPC and BoolQ the first 100 rows of the dev set choose α and the next ones report it; of GSM8K 100 questions
are answered at given α, and the share is counted that ends in the required form, `#### ` and a number. Some hours on
two CPU cores; a finished part is not made again.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import torch
import yaml
from jinja2 import Environment
from make_smollm2_trio import SEED, train_lora
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ensembler.evaluation.statistics import compare, holm, metric_interval

TASKS = Path(__file__).parent / "tasks"
RULES = ("base-change", "eft")
ALPHAS = "0,0.25,0.5,0.75,1,1.25,1.5"
CHOOSING = 100  # rows that choose α
ROWS = {
    "sst2": (1200, 500),
    "mrpc": (720, 400),
    "boolq": (320, 300),
    "gsm8k": (160, 100),
}  # of training, of the dev set
BATCH = 8
FORM = re.compile(r"#### -?[0-9]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("source", "target", "data", "out"):
        parser.add_argument(name, type=lambda text: Path(text).absolute())
    parser.add_argument("--task", choices=ROWS, action="append", help="some of them (default: all)")
    parser.add_argument("--train-only", action="store_true", help="stop behind the fine-tunes")
    given = parser.parse_args()
    tasks = given.task or list(ROWS)
    tokenizer = AutoTokenizer.from_pretrained(given.source)
    for task in tasks:
        batches = list(training_batches(task, given.data, tokenizer))
        train_lora(given.source, given.out / task / "source_ft", tokenizer, batches)
    if given.train_only:
        return
    rows: list[dict[str, Any]] = []
    for task in tasks:
        methods: list[Method] = []
        for rule in RULES:
            folder = given.out / task / rule
            run_sweep(task, rule, given.source, given.target, given.data, folder)
            methods += read_methods(rule, folder)
        rows += figures(task, methods)
    path = given.out / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def training_batches(task: str, data: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Tensor]]:
    """Yield ids, mask and labels (rows, longest), padded on the right; only the answers are learned."""
    settings = yaml.safe_load((TASKS / f"{task}.yaml").read_text(encoding="utf-8"))
    file = data / settings["dataset_kwargs"]["data_files"]["train"].removeprefix("data/")
    docs = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    random.Random(SEED).shuffle(docs)
    templates = Environment(autoescape=False, keep_trailing_newline=True)
    ask, answer = (templates.from_string(settings[name]) for name in ("doc_to_text", "doc_to_target"))
    choices = settings.get("doc_to_choice")
    rows = []
    for doc in docs[: ROWS[task][0]]:
        target = answer.render(doc)
        text = " " + (choices[int(target)] if choices else target.strip())
        prompt = tokenizer(ask.render(doc))["input_ids"][-384:]
        rows.append((prompt, [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]))
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        longest = max(len(prompt) + len(reply) for prompt, reply in part)
        columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for prompt, reply in part:
            num = len(prompt) + len(reply)
            columns["input_ids"].append([*prompt, *reply] + [tokenizer.eos_token_id] * (longest - num))
            columns["attention_mask"].append([1] * num + [0] * (longest - num))
            columns["labels"].append([-100] * len(prompt) + reply + [-100] * (longest - num))
        yield {name: torch.tensor(values) for name, values in columns.items()}


def run_sweep(task: str, rule: str, source: Path, target: Path, data: Path, folder: Path) -> None:
    """Run `ensembler sweep`, which goes on where it was interrupted."""
    members = ["--source-ft", folder.parent / "source_ft", "--source-pt", source, "--target-pt", target]
    command = [sys.executable, "-m", "ensembler", "sweep", *members, "--rule", rule, "--output", folder]
    command += ["--task", TASKS / f"{task}.yaml", "--limit", ROWS[task][1]]
    if task == "gsm8k":
        command += ["--alpha", "0,1", "--gen-kwargs", "max_gen_toks=128", "--batch-size", 16]
    else:
        command += ["--alpha", ALPHAS, "--validation", CHOOSING]
    subprocess.run([str(one) for one in command], cwd=data.parent, check=True)


@dataclass(frozen=True)
class Method:
    """A point of a sweep: the rule and α, whether α was chosen on other rows, and the metric of each row by name."""

    name: str
    alpha: float
    is_chosen: bool
    values: dict[str, float]


def read_methods(rule: str, folder: Path) -> list[Method]:
    """Return some points of a finished sweep: the anchor, the α that was chosen on other rows, and 1."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["tasks"][0]
    chosen = {one["alpha"] for one in summary["methods"] if one["chosen_by"] is not None}
    anchor = "source FT" if rule == "base-change" else "target PT"
    found = []
    for alpha, values in sorted(measured(folder, rule).items()):
        if alpha == 0:
            found.append(Method(anchor, alpha, is_chosen=False, values=values))
        if alpha in chosen or alpha == 1:
            found.append(Method(rule, alpha, is_chosen=alpha in chosen, values=values))
    return found


def measured(folder: Path, rule: str) -> dict[float, dict[str, float]]:
    """Return the metric of each reported row, by α and the row's name: accuracy, or whether a text has the form."""
    with sqlite3.connect(folder / "results.sqlite") as store:
        rows = store.execute(
            "SELECT alpha, name, metric_values, answer FROM measurements"
            " JOIN points ON points.id = measurements.point JOIN documents ON documents.id = measurements.document"
            " JOIN answers ON answers.point = points.id AND answers.document = documents.id AND request = 0"
            " WHERE rule = ? AND COALESCE(part, '') != 'validation'",
            (rule,),
        )
        found: dict[float, dict[str, float]] = {}
        for alpha, name, metrics, answer in rows:
            values = json.loads(metrics)
            is_right = values["acc"] if "acc" in values else float(FORM.search(json.loads(answer)[0]) is not None)
            found.setdefault(alpha, {})[name] = is_right
    return found


def figures(task: str, methods: Sequence[Method]) -> Iterator[dict[str, Any]]:
    """Yield a row for each method, with its 95 % interval, and rows of pairs, with the exact test of McNemar.

    Pairs: both rules, at the α that was chosen (else 1), with source FT, target PT and each other.
    """
    metric = "share with the form" if task == "gsm8k" else "accuracy"
    for one in methods:
        found = metric_interval(list(one.values.values()))
        yield {"task": task, "method": one.name, "alpha": one.alpha, "chosen": one.is_chosen, "metric": metric} | {
            name: getattr(found, name) for name in ("estimate", "low", "high", "num_rows")
        }
    has_choice = any(one.is_chosen for one in methods)
    compared = [one for one in methods if one.name in RULES and one.is_chosen == has_choice]
    alone = [one for one in methods if one.name not in RULES]
    pairs = [*product(alone, compared), *combinations(compared, 2)]
    tests = [compare([b.values[name] for name in a.values], list(a.values.values())) for a, b in pairs]
    for (a, b), test, p_holm in zip(pairs, tests, holm([one.p_value for one in tests]), strict=True):
        yield {
            "task": task,
            "method": f"{b.name} α = {b.alpha:g}",
            "minus": f"{a.name} α = {a.alpha:g}",
            "difference": test.difference.estimate,
            "low": test.difference.low,
            "high": test.difference.high,
            "p": test.p_value,
            "p_holm": p_holm,
        }


if __name__ == "__main__":
    main()
