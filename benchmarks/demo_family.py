"""Accuracy of the demo family on its task: each member alone, base-change and EFT, free-running greedy decoding.

    python benchmarks/demo_family.py            run what is missing, append rows, print the tables
    python benchmarks/demo_family.py --table    print the tables (Markdown) from the rows, run nothing

alpha is chosen on the validation split (most correct; of equals the smallest), and only that alpha sees the test split.
The test split is read twice: in the task's format, and in any format (the last number in the text is the answer).
One row of `benchmarks/results/demo_family.jsonl` is one method on one split; a row that is there is not made again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ensembler.extras import require

binomtest = require("scipy.stats", "eval").binomtest
ROOT = Path(__file__).resolve().parents[1]
FAMILY = ROOT / "ensembler" / "demo" / "family"
RESULTS = ROOT / "benchmarks" / "results" / "demo_family.jsonl"
ROLES = ("source_ft", "source_pt", "target_pt")
RULES = ("base-change", "eft")
ALPHAS = tuple(round(0.1 * i, 1) for i in range(1, 16))
LABELS = {"source_ft": "source FT", "source_pt": "source PT", "target_pt": "target PT", "eft": "EFT"}
LAST_NUMBER = r"(\d+)(?!.*\d)"
ANY_FORMAT = "test, any format"
BATCH = 100


@dataclass(frozen=True)
class Row:
    """One method on one split. `correct` holds one character per example, `1` for right, in the order of the file."""

    method: str
    rule: str | None
    alpha: float | None
    split: str
    num_examples: int
    num_correct: int
    correct: str
    seed: int  # of the family; greedy decoding draws nothing
    weights_sha256: dict[str, str]
    versions: dict[str, str]

    @property
    def key(self) -> tuple[str, float | None, str, str]:
        return self.method, self.alpha, self.split, json.dumps(self.weights_sha256, sort_keys=True)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- rows -------------------------------------------------------------------------------------------------------------


def read_rows(path: Path, weights: dict[str, str]) -> list[Row]:
    """The rows made with these weights; rows of an earlier family stay in the file and count for nothing."""
    if not path.exists():
        return []
    rows = [Row(**json.loads(line)) for line in path.read_text().splitlines()]
    return [row for row in rows if row.weights_sha256 == weights]


def append_row(path: Path, row: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(asdict(row)) + "\n")


def weight_prefixes(family: Path) -> dict[str, str]:
    """The first twelve hexadecimal digits of the SHA-256 of each member's weight file."""
    return {r: hashlib.sha256((family / r / "model.safetensors").read_bytes()).hexdigest()[:12] for r in ROLES}


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "tokenizers")}


# --- decoding ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """The prompts of one split, their answers, and how an answer is read from generated text."""

    split: str
    prompts: list[str]
    answers: list[str]
    answer_pattern: str
    max_new_tokens: int
    seed: int

    @classmethod
    def load(cls, family: Path, split: str) -> Task:
        rows = [json.loads(line) for line in (family / "data" / f"{split}.jsonl").read_text().splitlines()]
        how = json.loads((family / "data" / "task.json").read_text())
        return cls(split, [r["prompt"] for r in rows], [r["answer"] for r in rows], **how)

    def is_correct(self, text: str, answer: str) -> bool:
        """The first match of the pattern in the generated text holds exactly the answer; no match is wrong."""
        found = re.search(self.answer_pattern, text)
        return found is not None and found[1] == answer


def completions(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> Iterator[str]:
    """Greedy continuations of the task's prompts, in order, without the prompt."""
    for start in range(0, len(task.prompts), BATCH):
        prompts = task.prompts[start : start + BATCH]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
        ids = model.generate(**inputs, max_new_tokens=task.max_new_tokens, do_sample=False)
        yield from tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def flags(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> str:
    texts = completions(model, tokenizer, task)
    return "".join(str(int(task.is_correct(t, a))) for t, a in zip(texts, task.answers, strict=True))


# --- the run ----------------------------------------------------------------------------------------------------------


class Bench:
    """Makes the rows that are missing; holds the rows, the tokenizer and one model at a time per method."""

    def __init__(self, family: Path, results: Path) -> None:
        self.family, self.results = family, results
        self.weights = weight_prefixes(family)
        self.rows = {row.key: row for row in read_rows(results, self.weights)}
        self.tokenizer = AutoTokenizer.from_pretrained(family / "source_ft")
        self.models: dict[str, Any] = {}

    def model(self, method: str) -> Any:
        if method not in self.models:
            self.models[method] = self._load(method)
        return self.models[method]

    def _load(self, method: str) -> Any:
        if method in ROLES:
            return AutoModelForCausalLM.from_pretrained(self.family / method).eval()
        from ensembler import EnsembleForCausalLM  # not needed by --table

        members = {role: str(self.family / role) for role in ROLES}
        return EnsembleForCausalLM.from_members(rule=method, alpha=0.5, members=members).eval()

    def measure(self, method: str, alpha: float | None, task: Task) -> Row:
        """The row of one method on one split: from the file if it is there, else made now and appended."""
        rule = None if method in ROLES else method
        key = (method, alpha, task.split, json.dumps(self.weights, sort_keys=True))
        if key not in self.rows:
            model = self.model(method)
            if rule:
                model.alpha = alpha
            correct = flags(model, self.tokenizer, task)
            counts = len(correct), correct.count("1"), correct
            row = Row(method, rule, alpha, task.split, *counts, task.seed, self.weights, versions())
            append_row(self.results, row)
            self.rows[key] = row
            say(f"{task.split}: {method} alpha={alpha}: {row.num_correct} of {row.num_examples}")
        return self.rows[key]


def run(family: Path, results: Path) -> list[Row]:
    bench = Bench(family, results)
    validation, test = Task.load(family, "validation"), Task.load(family, "test")
    any_format = replace(test, split=ANY_FORMAT, answer_pattern=LAST_NUMBER)
    chosen: dict[str, float | None] = dict.fromkeys(ROLES)
    for role in ROLES:
        bench.measure(role, None, validation)
    for rule in RULES:
        chosen[rule] = best([bench.measure(rule, alpha, validation) for alpha in ALPHAS]).alpha
    for method, alpha in chosen.items():
        bench.measure(method, alpha, test)
        bench.measure(method, alpha, any_format)
    return list(bench.rows.values())


# --- tables -----------------------------------------------------------------------------------------------------------


def best(curve: list[Row]) -> Row:
    """Most correct; of equals the smallest alpha."""
    return max(curve, key=lambda row: (row.num_correct, -(row.alpha or 0.0)))


def interval(row: Row) -> str:
    """Accuracy in per cent with its 95 % Wilson interval."""
    ends = binomtest(row.num_correct, row.num_examples).proportion_ci(method="wilson")
    return f"{100 * row.num_correct / row.num_examples:.1f} ({100 * ends.low:.1f} to {100 * ends.high:.1f})"


def mcnemar(row: Row, other: Row) -> tuple[int, int, float]:
    """Examples only `row` has right, only `other` has right, and the exact two-sided McNemar p value."""
    pairs = list(zip(row.correct, other.correct, strict=True))
    won, lost = pairs.count(("1", "0")), pairs.count(("0", "1"))
    return won, lost, binomtest(won, won + lost).pvalue if won + lost else 1.0


def test_line(row: Row, anchor: Row) -> str:
    name = LABELS.get(row.method, row.method)
    alpha = "" if row.alpha is None else f"{row.alpha:g}"
    won, lost, p = mcnemar(row, anchor)
    compared = " | |" if row is anchor else f" {won} | {lost} | {p:.2g}"
    return f"| {name} | {alpha} | {row.num_correct} of {row.num_examples} | {interval(row)} |{compared} |"


def test_table(rows: list[Row], split: str) -> str:
    test = [row for row in rows if row.split == split]
    anchor = next(row for row in test if row.method == "source_ft")
    order = [*ROLES, *RULES]
    lines = [test_line(row, anchor) for row in sorted(test, key=lambda row: order.index(row.method))]
    head = "| method | alpha | correct | accuracy, % (95 % Wilson) | only it right | only source FT | p (McNemar) |"
    return "\n".join([head, "|---" * 7 + "|", *lines])


def validation_table(rows: list[Row]) -> str:
    found = {(row.method, row.alpha): row for row in rows if row.split == "validation"}
    lines = [f"| none: {LABELS[role]} | {interval(found[role, None])} | |" for role in ROLES]
    for alpha in ALPHAS:
        lines.append(f"| {alpha:g} | " + " | ".join(interval(found[rule, alpha]) for rule in RULES) + " |")
    return "\n".join(["| alpha | base-change, % | EFT, % |", "|---|---|---|", *lines])


def tables(rows: list[Row]) -> str:
    weights = ", ".join(f"{LABELS[role]} `{prefix}`" for role, prefix in rows[0].weights_sha256.items())
    made = ", ".join(f"{name} {number}" for name, number in rows[0].versions.items())
    return (
        f"Test split, alpha chosen on validation:\n\n{test_table(rows, 'test')}\n\n"
        f"The same answers, the last number counting in any format:\n\n{test_table(rows, ANY_FORMAT)}\n\n"
        f"Validation split, accuracy with 95 % Wilson intervals:\n\n{validation_table(rows)}\n\n"
        f"Weights (SHA-256): {weights}. Made with {made}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", type=Path, default=FAMILY)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the tables from the rows, run nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)  # models this small lose more to a second thread than they gain
    if options.table:
        rows = read_rows(options.results, weight_prefixes(options.family))
        if not rows:
            sys.exit("Error: no rows for these weights; run without --table first")
    else:
        rows = run(options.family, options.results)
    print(tables(rows))


if __name__ == "__main__":
    main()
