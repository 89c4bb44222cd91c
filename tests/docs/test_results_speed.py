"""The figures in docs/results-speed.md are those of the committed rows."""

from __future__ import annotations

import json
from typing import Any

import pytest
from helpers.scripts import ROOT

PAGE = (ROOT / "docs" / "results-speed.md").read_text("utf-8")
CELLS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")]
TABLE = {cells[0]: cells[1:] for cells in CELLS}


def rows(name: str, /, **fields: Any) -> list[dict[str, Any]]:
    """Return the rows of a benchmark that have these values."""
    lines = (ROOT / "benchmarks" / "results" / f"{name}.jsonl").read_text("utf-8").splitlines()
    return [row for row in map(json.loads, lines) if fields.items() <= row.items()]


def rounded(value: float, digits: int = 2) -> str:
    return f"{value + 1e-9:.{digits}f}"  # halves upwards, as people round


def spread(ratio: float, ends: list[float], between: str = "", digits: int = 2) -> str:
    return f"{rounded(ratio, digits)}{between} ({rounded(ends[0], digits)} to {rounded(ends[1], digits)})"


def test_decoding() -> None:
    cost, shared, compiled, prefix = (
        rows(name)[-1] for name in ("decode_cost", "shared_backbone", "compiled_decode", "prefix_reuse")
    )
    greedy = spread(cost["greedy_ratio"], cost["greedy_spread"])
    sampled = spread(cost["sampling_ratio"], cost["sampling_spread"])
    expected = {
        "a token of three, over the sum of their bare forwards": (
            f"greedy {greedy}, sampled {sampled}; memory {rounded(cost['memory_ratio'])}"
        ),
        "a base and its LoRA on a shared backbone, over the base": (
            f"{spread(shared['shared_ratio'], shared['shared_spread'])}; "
            f"memory {rounded(shared['shared_memory_ratio'])}"
        ),
        "the same as two copies": (
            f"{spread(shared['copies_ratio'], shared['copies_spread'])}; "
            f"memory {rounded(shared['copies_memory_ratio'])}"
        ),
        "three compiled, tokens per second over eager": (
            f"{spread(compiled['faster'], compiled['faster_spread'])}; first call {compiled['first_call_s']:.0f} s"
        ),
        "8 prompts behind 400 shared tokens, times faster to the first token": (
            spread(prefix["over_whole"], prefix["over_whole_spread"])
        ),
    }
    assert {label: TABLE[label][0] for label in expected} == expected
    earlier = [rounded(row["shared_ratio"]) for row in rows("shared_backbone")[:2]]
    faster = rounded(rows("compiled_decode")[0]["faster"])
    assert f"{earlier[0]} and {earlier[1]} for the shared backbone and {faster} for compiled members" in PAGE


def test_grids_over_one_alpha() -> None:
    expected = {
        f"16 α over one: {label}": spread(row[ratio], row[f"{ratio.removesuffix('_ratio')}_spread"])
        for label, ratio, row in (
            ("scored texts", "time_ratio", rows("grid_score")[-1]),
            ("generated texts", "ratio", rows("grid_generate")[-1]),
            ("images", "time_ratio", rows("grid_images")[-1]),
            ("a whole sweep, scored", "over_one", rows("grid_process", case="score")[-1]),
        )
    }
    assert {label: TABLE[label][0] for label in expected} == expected
    sums = rows("grid_process", case="generate", num_points=32)[-1]
    assert TABLE["32 points over one: a whole sweep, generated"][0] == spread(sums["over_one"], sums["over_one_spread"])


@pytest.mark.parametrize(
    ("label", "rule", "temperature"),
    [
        ("base-change, greedy", "base-change", 0.0),
        ("base-change, temperature 0.8", "base-change", 0.8),
        ("EFT, greedy", "eft", 0.0),
        ("EFT, temperature 0.8 (older version)", "eft", 0.8),
    ],
)
def test_drafts_of_a_costly_target(label: str, rule: str, temperature: float) -> None:
    row = rows("speculative", case="large", rule=rule, temperature=temperature)[-1]
    ratios = [spread(row["ratios"][name], row["spreads"][name]) for name in ("plain over auto", "target over auto")]
    assert TABLE[label] == [*ratios, rounded(row["stats"]["auto"]["acceptance"])]
    assert row["identical"] in (1.0, None)


@pytest.mark.parametrize(
    ("label", "case", "rule"),
    [
        ("three (older version)", "equal", "base-change"),
        ("embedded family, base-change", "demo", "base-change"),
        ("embedded family, EFT", "demo", "eft"),
    ],
)
def test_drafts_that_are_not_cheap(label: str, case: str, rule: str) -> None:
    found = [rows("speculative", case=case, rule=rule, temperature=temperature)[-1] for temperature in (0.0, 0.8)]
    ratio = "plain over auto"
    assert TABLE[label] == [spread(row["ratios"][ratio], row["spreads"][ratio]) for row in found]


def test_throughput_in_vllm() -> None:
    row = rows("vllm_throughput", model="smollm2")[-1]
    for label, name, columns in (
        ("three in vLLM", "vllm", ("1", "8", "32", "unequal")),
        ("target alone in vLLM", "target", ("1", "8", "32")),
        ("three in `generate`, one batch", "transformers", ("1", "32", "unequal")),
    ):
        rates = [rounded(row["tokens_per_second"][f"{name} {column}"], 1) for column in columns]
        assert [cell for cell in TABLE[label] if cell] == rates
    text = " ".join(PAGE.split())
    for name, between in (
        ("vllm 1 over transformers 1", " times"),
        ("vllm 32 over transformers 32", " times"),
        ("vllm over transformers, unequal", " times"),
        ("ensemble over target, 1", ""),
        ("ensemble over target, 32", ""),
    ):
        ratio, ends = row["ratios"][name]
        assert spread(ratio, ends, between) in text, name
    family = rows("vllm_throughput", model="demo")[-1]["ratios"]
    for ratio, ends in (family["mixed over single"], row["ratios"]["mixed over single"]):
        assert spread(ratio, ends, " times") in text
    assert f"32 over `generate`: {spread(*family['vllm 32 over transformers 32'])}" in text
    grid = rows("grid_vllm")[-1]
    assert spread(grid["over_one"], grid["over_one_spread"], " times") in text
    assert spread(grid["over_passes"], grid["over_passes_spread"], " times") in text


@pytest.mark.parametrize(("label", "model"), [("embedded family", "demo"), ("three of MODEL", "smollm2")])
def test_latency_in_vllm_by_threads(label: str, model: str) -> None:
    found = rows("vllm_latency", model=model)[-1]["step_ms"]
    ways = ("auto", "1", "2", "unset")
    assert TABLE[label] == [spread(*found[way], digits=1) if way in found else "" for way in ways]


def test_kernels_on_a_cpu() -> None:
    for label, operation in (
        ("`combine`", "combine"),
        ("`combine_sample`, greedy", "combine_sample greedy"),
        ("`combine_sample`, T = 0.7", "combine_sample T=0.7"),
        ("`combine_logprob`, 16 α, per α", "combine_logprob"),
    ):
        expected = []
        for num_rows in (1, 64):
            speedups = [row["speedup"] for row in rows("kernels_cpu", operation=operation, rows=num_rows)]
            assert len(speedups) == 4
            expected.append(f"{rounded(min(speedups), 1)} to {rounded(max(speedups), 1)}")
        assert TABLE[label] == expected
    medians = [row["quartiles"][1] for row in rows("kernels_host")]
    assert f"{rounded(min(medians), 1)} to {rounded(max(medians), 1)} µs" in PAGE


def test_patches() -> None:
    kills = rows("patch_kill")[-1]
    left = f"{kills['absent']} left no result, {kills['whole']} a whole one, {kills['damaged']} a damaged one"
    assert f"of {kills['kills']} kills {left}" in PAGE
    accuracy = {row["name"]: 100 * row["accuracy"] for row in rows("port_smollm2") if "accuracy" in row}
    (norms,) = rows("port_smollm2", name="Table 1")
    text = " ".join(PAGE.split())
    gain, rest = accuracy["θ′ + Δθ_i"] - accuracy["θ′"], accuracy["θ′_i"] - accuracy["θ′ + Δθ_i"]
    assert f"adds {gain:.1f} points to θ′, training again {rest:.1f} more" in text
    assert f"is {norms['ratio_frobenius']:.0f} times the residual" in text
    assert f"the residual is {norms['residual_frobenius'] / norms['patch_frobenius']:.2f} ‖Δθ_i‖" in text
