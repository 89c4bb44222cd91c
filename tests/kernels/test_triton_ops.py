"""Runs `triton_cases.py`, and a few of `gpu_cases.py`, under Triton's interpreter, in a process of its own.

TRITON_INTERPRET counts when triton is first imported, and another test of this process may have imported it already.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.member_cases import to_device

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run_cases(name: str, *options: str) -> str:
    """Run a file of cases under the interpreter; return the lines of its report."""
    path = str(Path(__file__).parents[1] / "helpers" / name)
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", path]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "ENSEMBLER_TEST_DEVICE": "cpu"}
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


def test_cases_pass_under_the_interpreter() -> None:
    run_cases("triton_cases.py")


def test_cases_for_a_gpu_run_under_the_interpreter_too() -> None:
    few = "bit_for_bit or repeat or one_launch or target_out_of_range or wide_rows"
    report = run_cases("gpu_cases.py", "-k", f"triton and ({few})")
    assert "test_rows_repeat_skip_and_permute[triton]" in report


def test_a_call_is_one_launch_and_compiles_nothing_as_texts_end() -> None:
    """In a process of its own, with launches that do nothing: kernels of 1 to 64 outputs are the same few."""
    code = """
import torch
from ensembler_kernels import Combination, Weights, make_noise, triton_kernels as kernels, triton_ops as ops
from triton_stub import launching_into_nothing
logits = [torch.empty(64, 32000, dtype=torch.bfloat16) for _ in range(3)]
one = Weights.of((Combination((1, 0, 0), (0, 1, -1)), 0.5))
with launching_into_nothing() as stub:
    for outputs in (64, 62, 33, 32, 22, 17, 16, 11, 8, 3, 2, 1):
        here = [z[:outputs] for z in logits]
        rows = torch.arange(outputs, dtype=torch.int32)
        ops.combine(here, one, rows)
        ops.combine_sample(here, one, rows, torch.ones(1), make_noise(0, range(outputs)))
        ops.combine_logprob(here, one, torch.zeros(outputs, dtype=torch.int64), rows, False)
        assert set(stub.launched.values()) == {1}, stub.launched
        stub.launched.clear()
for kernel in (kernels.combine_kernel, kernels.sample_kernel, kernels.logprob_kernel):
    print(len(kernel.device_caches[0][0]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2] / "kernels")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    combine, sample, logprob = map(int, done.stdout.split())
    assert combine <= 3, combine  # FEW and more outputs; one row, which has stride 0
    assert sample <= 2, sample
    assert logprob <= 3, logprob


def test_views_keep_their_layout_on_a_device() -> None:
    whole = torch.arange(60, dtype=torch.bfloat16).view(3, 20)
    for view in (whole[:, 3:9], whole[1:, ::2], whole.t()[5:], whole[:1].expand(4, -1), whole[:0]):
        moved = to_device([view], torch.device("meta"))[0]
        assert (moved.shape, moved.stride()) == (view.shape, view.stride())
        assert moved.storage_offset() == view.storage_offset()
        assert moved.untyped_storage().nbytes() == view.untyped_storage().nbytes()


def test_without_the_interpreter_a_cpu_is_refused_with_the_reason() -> None:
    code = "import torch; from ensembler_kernels import triton_ops; print(triton_ops.unavailable(torch.device('cpu')))"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "run on a GPU, got device cpu" in done.stdout, done.stderr
