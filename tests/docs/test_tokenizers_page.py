"""The figures of the page on different tokenizers are those of the committed rows."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
ROWS = [json.loads(line) for line in (RESULTS / "text_members.jsonl").read_text().splitlines()]
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
    agreed, named, first = (
        f"{row[name]:.1%}"[:-1] for name in ("agreement", "agreement_by_name", "agreement_by_first_token")
    )
    free, own, aligned = (
        f"{row[name]:.3f}".replace("-", "−")
        for name in ("likelihood", "likelihood_of_own", "likelihood_by_first_token")
    )
    assert f"{row['num_prompts']} prompts of 40 tokens" in PAGE
    assert f"under Gemma (its own: {own}) |" in PAGE
    assert f"| this | {agreed} % | {free} |" in PAGE
    assert f"as in UniTE | {first} % | {aligned} |" in PAGE
    assert f"matched by name | {named} % |" in PAGE
    certain, host = (f"{share:.0%}"[:-1] for share in (row["certain"], row["host_share"]))
    assert f"{row['evaluations']['target_pt']:.2f} evaluations of the target a token, {certain} % of the" in PAGE
    assert f"{row['seconds_ratio']:.1f} times the time of three SmolLM2s, {host} % of it outside" in PAGE
    on_host = row["seconds"] * row["host_share"] / (row["num_prompts"] * 40)
    assert f"({on_host * 1e3:.0f} ms a token)" in PAGE


def test_byte_by_byte() -> None:
    (row,) = map(json.loads, (RESULTS / "byte_sampler.jsonl").read_text().splitlines())
    free, own = (f"{row[name]:.3f}".replace("-", "−") for name in ("likelihood", "likelihood_of_own"))
    assert f"{row['num_prompts']} of these prompts), has {row['agreement']:.1%}"[:-1] in PAGE
    assert f"free texts of {free} (Gemma's own there {own}); it takes {row['forwards']:.2f} evaluations" in PAGE


def test_fine_tunes_that_are_carried_over() -> None:
    rows = [json.loads(line) for line in (RESULTS / "tokenizers_smollm2.jsonl").read_text().splitlines()]
    points = [row for row in rows if "alpha" in row]
    assert points
    for row in points:
        shown = f"{row['estimate'] * 100:.1f} ({row['low'] * 100:.1f} to {row['high'] * 100:.1f})"
        shown += f", α = {row['alpha']:g}" if row["chosen"] else ""
        assert shown in PAGE, (row["task"], row["method"])
    (gain,) = (
        row
        for row in rows
        if (row["task"], row.get("minus")) == ("sst2", "target PT α = 0") and row["method"].startswith("eft")
    )
    assert gain["p_holm"] < 1e-20
    assert f"{gain['difference'] * 100:.0f} points above it" in PAGE


def test_the_row_of_the_readme() -> None:
    rows = [json.loads(line) for line in (RESULTS / "tokenizers_smollm2.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["task"] == "sst2" and "alpha" in row]
    shown = {row["method"]: f"{row['estimate'] * 100:.1f}" for row in sorted(rows, key=lambda row: bool(row["chosen"]))}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    start = "| SmolLM2-135M, SST-2, Gemma 3 270M as the new base, [other tokens](docs/tokenizers.md) | "
    assert f"{start}{shown['source FT']} | {shown['base-change']} | {shown['eft']} | does not fit | |" in readme
    assert f"Gemma alone has {shown['target PT']} %" in readme
