"""The figures of the page on different tokenizers are those of the committed rows."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROWS = [json.loads(line) for line in (ROOT / "benchmarks" / "results" / "text_members.jsonl").read_text().splitlines()]
PAGE = " ".join((ROOT / "docs" / "tokenizers.md").read_text(encoding="utf-8").split())


def per_token(rows: list[dict[str, float]]) -> float:
    return sum(row["evaluations"] * row["num_tokens"] for row in rows) / sum(row["num_tokens"] for row in rows)


def test_scores() -> None:
    rows = [row for row in ROWS if "reference" in row]
    errors = [abs(row["log_prob"] - row["reference"]) for row in rows]
    assert all(error <= row["bound"] + 1e-3 for error, row in zip(errors, rows, strict=True))
    assert f"in all {len(rows)}; it differs by {statistics.median(errors):.4f} nats in the median" in PAGE
    assert f"and by {max(errors):.1f} at most" in PAGE
    english = [row for row in rows if row["kind"] == "English"]
    assert f"{per_token(rows):.2f} evaluations a token, {per_token(english):.2f} in English." in PAGE


def test_decode() -> None:
    (row,) = (row for row in ROWS if "agreement" in row)
    agreed, named, certain = (f"{row[name]:.0%}"[:-1] for name in ("agreement", "agreement_by_name", "certain"))
    assert f"{row['num_prompts']} prompts of 32 tokens" in PAGE
    assert f"chooses {agreed} % of its tokens, {named} % where tokens are matched by name" in PAGE
    assert f"{row['evaluations']['target_pt']:.2f} evaluations of the target a token" in PAGE
    assert f"{certain} % of the choices certain, {row['seconds_ratio']:.1f} times" in PAGE
    free, own = (f"{row[name]:.2f}".replace("-", "−") for name in ("likelihood", "likelihood_of_own"))
    assert f"{free} nats a byte under Gemma, its own {own}" in PAGE
