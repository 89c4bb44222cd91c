"""The Triton kernels under Triton's interpreter; `test_triton_ops` runs this file in a process of its own."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from ensembler_kernels import reference, scratch, triton_configs, triton_ops
from ensembler_kernels.combination import Combination
from ensembler_kernels.weights import Weights
from helpers.kernel_cases import KernelCases
from helpers.member_cases import (
    BF16,
    COMBINATIONS,
    FP32,
    RATIO,
    assert_same_draws,
    assert_same_scores,
    make_members,
    make_noise,
    rules,
)
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # numpy, on −inf and NaN


@pytest.fixture(scope="module")
def ops() -> ModuleType:
    assert triton_ops.unavailable(torch.device("cpu")) is None
    return triton_ops


class TestTriton(KernelCases):
    """What every implementation must do."""

    draws_slowly = True


def set_launch(patch: pytest.MonkeyPatch, block: int, programs: int = 10_000) -> None:
    """Launch every kernel with this block, and `sample` with at most this many programs."""
    patch.setattr(triton_configs, "CONFIGS", dict.fromkeys(triton_configs.CONFIGS, ((block, 4),) * 2))
    patch.setattr(triton_configs, "MULTIPROCESSORS", 1)
    patch.setattr(triton_configs, "PROGRAMS_EACH", programs)


@pytest.mark.parametrize("how", [RATIO, COMBINATIONS["neutral cutoff"]], ids=["ratio", "neutral cutoff"])
def test_results_do_not_depend_on_the_launch(monkeypatch: pytest.MonkeyPatch, how: Combination) -> None:
    """Of any block, of few programs that take several blocks each, of scratch that a smaller call left."""
    logits = make_members(3, 2, (1999, 2003), (BF16, FP32))
    weights, grid, targets = Weights.of((how, [0.7, 1.2])), Weights.of((how, [0.0, 0.5, 1.0])), torch.tensor([0, 98])
    warmth, results = (torch.tensor([1.0, 0.0]), make_noise(2)), []
    for launch in ((2048,), (128,), (512,), (128, 6), (128, 1)):
        set_launch(monkeypatch, *launch)
        z = triton_ops.combine(logits, weights, None)
        sampled = triton_ops.combine_sample(logits, weights, None, *warmth)
        results.append((z, sampled, triton_ops.combine_logprob(logits, grid, targets, None, True)))
    for z, sampled, scored in results[1:]:
        torch.testing.assert_close(z, results[0][0], rtol=1e-6, atol=1e-6)
        assert_same_draws(sampled, results[0][1])
        assert_same_scores(scored, results[0][2])


@pytest.mark.parametrize("width", [31999, 49152])
def test_wide_rows(width: int) -> None:
    arguments = (make_members(3, 1, (width,), (BF16,)), Weights.of((RATIO, 0.7)), None, torch.ones(1), make_noise(1))
    assert_same_draws(triton_ops.combine_sample(*arguments), reference.combine_sample(*arguments))


def test_one_row_fills_a_gpu_and_many_do_not_flood_it() -> None:
    for kind in triton_configs.CONFIGS:
        assert triton_configs.launch(kind, 1, 1).splits == 1
        assert 60 <= triton_configs.launch(kind, 1, 128_256).splits <= 512
    assert 512 * triton_configs.launch("sample", 512, 128_256).splits <= 4096


class Waits(TorchDispatchMode):
    """Records operations that wait for a device, which a CUDA graph cannot hold."""

    NAMES = ("_local_scalar_dense", "nonzero", "equal", "_unique2", "masked_select", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.NAMES or name.startswith("index_put") or (name == "index" and args[1][0].dtype == torch.bool):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("neutral", [False, True])
def test_a_second_call_can_be_captured(monkeypatch: pytest.MonkeyPatch, neutral: bool) -> None:
    """By a stub in place of launches: the second call waits for nothing, and allocates no scratch."""
    launched, allocated, allocate = [], [], scratch._allocate
    monkeypatch.setattr(triton_ops, "_run", lambda kernel, *arguments: launched.append(kernel))
    monkeypatch.setattr(scratch, "_allocate", lambda *sizes: allocated.append(sizes) or allocate(*sizes))
    monkeypatch.setattr(triton_ops, "_scratch", scratch.Scratch())
    logits, weights = make_members(3, 4, (700, 650, 720), (BF16,)), Weights.of(*rules(300, neutral))
    rows, targets = torch.tensor([0, 1, 2, 3, 0, 1, 2], dtype=torch.int32), torch.zeros(7, dtype=torch.int64)
    calls = (
        (triton_ops.combine, (rows,)),
        (triton_ops.combine_sample, (rows, torch.ones(7), make_noise(7))),
        (triton_ops.combine_logprob, (targets, rows, True)),
    )
    for operation, arguments in calls:
        operation(logits, weights, *arguments)
    first, num = list(launched), len(allocated)
    assert 1 <= num <= len(calls)
    with Waits() as waits:
        for operation, arguments in calls:
            operation(logits, weights, *arguments)
    assert launched == 2 * first
    assert len(allocated) == num
    assert waits.found == []
