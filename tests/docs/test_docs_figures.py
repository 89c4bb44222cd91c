"""Figures in the docs of serving and of images are those of the committed rows, and what `plan` prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.server_cases import HEADS, trio

from ensembler.cli.tables import print_serving
from ensembler.planning.serving import propose_serving

ROOT = Path(__file__).parents[2]
SERVING, VISION = ((ROOT / "docs" / name).read_text("utf-8") for name in ("serving.md", "vision.md"))


def last_row(name: str) -> dict[str, Any]:
    row: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / name).read_text("utf-8").splitlines()[-1])
    return row


def test_throughput_in_vllm() -> None:
    row = last_row("vllm_throughput.jsonl")
    for way, columns in (("vllm", (1, 8, 32, "unequal")), ("target", (1, 8, 32)), ("transformers", (1, 32, "unequal"))):
        rates = [row["tokens_per_second"][f"{way} {column}"] for column in columns]
        shown = [f"{rate + 1e-9:.1f}" for rate in rates]  # halves upwards, as people round
        (line,) = (each for each in SERVING.splitlines() if f"| {shown[0]} |" in each)
        assert [cell for cell in line.replace("|", " ").split() if cell.replace(".", "").isdigit()] == shown
    text = " ".join(SERVING.split())
    for name, digits in (
        ("vllm 32 over transformers 1", 1),
        ("vllm 32 over transformers 32", 2),
        ("vllm over transformers, unequal", 2),
        ("vllm 1 over transformers 1", 2),
        ("ensemble over target, 1", 2),
        ("ensemble over target, 32", 2),
    ):
        ratio, (low, high) = row["ratios"][name]
        between = " times" if name.startswith("vllm") else ""
        assert f"{ratio:.{digits}f}{between} ({low:.{digits}f} to {high:.{digits}f})" in text, name


def test_16_alphas_over_one() -> None:
    row = last_row("grid_images.jsonl")
    low, high = row["time_spread"]
    assert f"{row['time_ratio']:.2f} times ({low:.2f} to {high:.2f}" in " ".join(VISION.split())


def test_the_plan_of_a_trio(capsys: pytest.CaptureFixture[str]) -> None:
    found = propose_serving(trio(), HEADS, [80 * 2**30] * 2, context=4096)
    print_serving(found, f"ensembler serve my-ensemble -- {' '.join(found.flags())}")
    for line in capsys.readouterr().out.splitlines():
        assert line.rstrip() in SERVING
