"""The tables of docs/results.md are those of the committed rows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_tables_of_the_page_are_those_of_the_rows() -> None:
    command = [sys.executable, ROOT / "benchmarks" / "portllm_tables.py"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    page = (ROOT / "docs" / "results.md").read_text("utf-8").splitlines()
    assert len(lines) > 40
    assert [line for line in lines if line not in page] == []
