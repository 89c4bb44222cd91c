"""The benchmarks of vLLM run small on the embedded family, and their rows hold what they say.

.venv-vllm/bin/python -m pytest -m long tests/docs/test_vllm_benchmarks.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.scripts import ROOT

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own: make test-vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.long]  # an engine for each way: make test-vllm is for every day


def bench(script: str, *arguments: object) -> str:
    """Run a script as people run it, since vLLM starts processes that import it again; return what it prints."""
    command = [sys.executable, ROOT / "benchmarks" / script, *arguments]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def row_of(script: str, results: Path, *arguments: object) -> dict[str, Any]:
    """Return the row that a script appends, of one eager repeat."""
    bench(script, *arguments, "--repeats", 1, "--eager", "--results", results)
    (line,) = results.read_text("utf-8").splitlines()
    row: dict[str, Any] = json.loads(line)
    return row


def test_throughput_of_the_family(tmp_path: Path) -> None:
    row = row_of("vllm_throughput.py", tmp_path / "rows.jsonl", "demo", "--new-tokens", 4)
    assert (row["model"], row["target"]) == ("demo", "target_pt")
    assert row["mixed"] == [["base-change", "eft"], 32]
    rates = row["tokens_per_second"]
    assert rates.keys() >= {"vllm 32", "vllm mixed 32", "target 32", "transformers 32"}
    assert row["ratios"]["mixed over single"][0] == pytest.approx(rates["vllm mixed 32"] / rates["vllm 32"], abs=2e-3)


def test_a_grid_makes_the_texts_of_transformers(tmp_path: Path) -> None:
    row = row_of("grid_vllm.py", tmp_path / "rows.jsonl", "--new-tokens", 6, "--block-size", 32)
    assert row["texts"] == row["as_transformers"] == 16 * 32 > row["different"] > 32
    assert row["block_size"] == 32
    assert row["over_one"] == pytest.approx(row["grid_seconds"] / row["one_seconds"], rel=0.05)


def test_engines_have_the_threads_that_were_asked_for(tmp_path: Path) -> None:
    row = row_of("vllm_latency.py", tmp_path / "rows.jsonl", "--new-tokens", 4, "--threads", 2, 1)
    assert row["worker_threads"] == {"2": 2, "1": 1}
    assert row["step_ms"].keys() == {"1", "2"}
    assert row["over_first"].keys() == {"1"}


def test_the_section_of_a_gpu_runs_small(tmp_path: Path) -> None:
    printed = bench("gpu.py", "--device", "cpu", "--small", "--sections", "vllm", "--out", tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "vllm.jsonl").read_text("utf-8").splitlines()]
    ways = {(row["way"], row["requests"]) for row in rows}
    assert ways == {("ensemble", 1), ("ensemble", 32), ("ensemble, mixed", 32), ("target", 1), ("target", 32)}
    for row in rows:
        assert row["tokens_per_second"] == sorted(row["tokens_per_second"])
        assert (row["over_target"] == 1) == (row["way"] == "target")
    assert "small in vLLM, 32 requests, eager" in printed
