"""Runs `triton_cases.py` under Triton's interpreter, in a process of its own.

TRITON_INTERPRET counts when triton is first imported, and another test of this process may have imported it already.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

CASES = Path(__file__).with_name("triton_cases.py")


def test_cases_pass_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_without_the_interpreter_a_cpu_is_refused_with_the_reason() -> None:
    code = "import torch; from ensembler_kernels import triton_ops; print(triton_ops.unavailable(torch.device('cpu')))"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "run on a GPU, got device cpu" in done.stdout, done.stderr
