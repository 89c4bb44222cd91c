"""The scripts about patches run, here on tiny models, and the tables in docs/results-speed.md are of their rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.commands import SaveMember
from helpers.patch_cases import save_lora, save_model, weights
from helpers.scripts import ROOT, run_script


def test_a_ported_patch_is_the_sum_that_it_says(save_member: SaveMember, tmp_path: Path) -> None:
    base = save_member("base", "llama", 1, num_layers=1)
    for folder in ("sst2", "text"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    lines = [json.dumps({"sentence": f"a film {i} ", "label": str(i % 2)}) + "\n" for i in range(24)]
    (tmp_path / "data" / "sst2" / "train_3000.jsonl").write_text("".join(lines))
    (tmp_path / "data" / "sst2" / "dev.jsonl").write_text("".join(lines[:6]))
    for name in ("wikitext2_raw_valid.txt", "tinyshakespeare.txt"):
        (tmp_path / "data" / "text" / name).write_text("to be or not to be, that is the question. " * 20)
    out = tmp_path / "port"
    small = ("--reviews", 24, "--epochs", 1, "--text-pieces", 8, "--text-epochs", 2)
    run_script("examples/port_smollm2.py", base, tmp_path / "data", out, *small)
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text("utf-8").splitlines()]
    assert [row["name"] for row in rows] == ["θ", "θ′", "θ_i", "θ′_i", "θ′ + Δθ_i", "Table 1"]
    assert all(row["rows"] == 6 and 0 <= row["accuracy"] <= 1 for row in rows[:-1])
    assert rows[0]["text_tokens"] == 8 * 2 * 128
    assert rows[-1]["num_tensors"] == 7
    name = "model.layers.0.self_attn.q_proj.weight"
    states = [weights(folder)[name] for folder in (base, out / "updated", out / "patched", out / "ported")]
    assert (states[3] - (states[1] + states[2] - states[0])).abs().max() < 1e-6
    assert not torch.equal(states[3], states[1])
    before = (out / "ported" / "model.safetensors").stat().st_mtime_ns
    run_script("examples/port_smollm2.py", base, tmp_path / "data", out, *small)
    assert (out / "ported" / "model.safetensors").stat().st_mtime_ns == before
    assert len((out / "rows.jsonl").read_text("utf-8").splitlines()) == 6
    assert "| θ′ + Δθ_i | σ_max |" in run_script("examples/port_smollm2.py", "--table", "--results", out / "rows.jsonl")


def test_the_benchmark_writes_its_row(tmp_path: Path) -> None:
    model, rows = save_model(tmp_path / "model"), tmp_path / "rows.jsonl"
    run_script("benchmarks/patch_apply.py", model, "--repeats", 1, "--peft-repeats", 1, "--results", rows)
    row = json.loads(rows.read_text())
    assert (row["model"], row["repeats"], row["num_files"]) == ("model", 1, 1)
    assert 0 < row["apply_peak_mb"] < row["peft_peak_mb"]
    assert "| PEFT: peak memory |" in run_script("benchmarks/patch_apply.py", "--table", "--results", rows)


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.long)])
def test_killed_at_any_moment_the_output_is_whole_or_not_there(tmp_path: Path, kills: int) -> None:
    """A few kills, and a second run after each."""
    size = {"hidden_size": 512, "vocab_size": 8192, "num_layers": 4}
    model, lora = save_model(tmp_path / "model", **size), save_lora(tmp_path / "lora", size=size)
    run_script("benchmarks/patch_kill.py", model, lora, "--kills", kills, "--results", tmp_path / "kills.jsonl")
    row = json.loads((tmp_path / "kills.jsonl").read_text())
    assert (row["whole"] + row["absent"], row["damaged"]) == (kills, 0)


@pytest.mark.parametrize(
    "script", ["examples/port_smollm2.py", "examples/transport_smollm2.py", "benchmarks/patch_apply.py"]
)
def test_the_tables_in_the_page_are_those_of_the_rows(script: str) -> None:
    """The page leaves lines out, but those that it has are the printed ones."""
    results = ROOT / "benchmarks" / "results" / f"{Path(script).stem}.jsonl"
    printed = run_script(script, "--table", "--results", results).splitlines()
    page = (ROOT / "docs" / "results-speed.md").read_text("utf-8").partition("## Patches")[2].splitlines()
    labels = {line.split("|")[1] for line in printed if line}
    shown = [line for line in page if line.startswith("| ") and line.split("|")[1] in labels]
    assert len(shown) > 5
    assert [line for line in shown if line not in printed] == []
