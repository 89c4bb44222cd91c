"""Kernel cases on the device that ENSEMBLER_TEST_DEVICE names: `benchmarks/gpu.py` runs this file; a plain pytest not.

On a CPU under TRITON_INTERPRET=1 the Triton cases run, slowly.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from ensembler_kernels import implementations, reference
from ensembler_kernels.weights import Weights
from helpers.kernel_cases import KernelCases
from helpers.member_cases import (
    BF16,
    COMBINATIONS,
    DEVICE,
    EVEN_TOL,
    RATIO,
    assert_same_draws,
    assert_same_scores,
    make_logits,
    make_noise,
    near_the_top,
    run,
    to_device,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # numpy, on −inf and NaN


@pytest.fixture(scope="module", params=["triton", "cuda"])
def ops(request: pytest.FixtureRequest) -> ModuleType:
    """An implementation, or a skip with the reason why it cannot run on the device."""
    if reason := implementations.why_not(request.param, DEVICE):
        pytest.skip(f"{request.param}: {reason}")
    return implementations.load(request.param)


class TestOnDevice(KernelCases):
    """What every implementation must do, and what only a device can show."""

    draws_slowly = DEVICE.type == "cpu"

    @pytest.mark.parametrize(("rows", "width"), [(1, 128_256), (8, 151_936), (40, 128_256)])
    def test_wide_rows(self, ops: ModuleType, rows: int, width: int) -> None:
        if self.draws_slowly:
            pytest.skip("wide rows take minutes here")
        logits, targets = make_logits(rows, width, 3, BF16, forbidden=True), torch.zeros(rows, dtype=torch.int64)
        for how in (RATIO, COMBINATIONS["neutral cutoff"]):
            weights, grid = (
                Weights.of((how, torch.linspace(0, 1.5, rows))),
                Weights.of((how, torch.linspace(0, 1.5, 16))),
            )
            z = run(ops.combine, logits, weights, None)
            torch.testing.assert_close(z, reference.combine(logits, weights), rtol=2e-6, atol=2e-5)
            for warmth in ((None, None), (torch.full((1,), 0.8), make_noise(rows))):
                sampled = run(ops.combine_sample, logits, weights, None, *warmth)
                assert_same_draws(sampled, reference.combine_sample(logits, weights, None, *warmth))
            targets = near_the_top(logits, how)
            scored = run(ops.combine_logprob, logits, grid, targets, None, False)
            assert_same_scores(scored, reference.combine_logprob(logits, grid, targets), EVEN_TOL)

    @pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs are captured on a GPU")
    @pytest.mark.parametrize("how", [RATIO, COMBINATIONS["neutral cutoff"]], ids=["ratio", "neutral cutoff"])
    def test_a_graph_replays_with_other_logits(self, ops: ModuleType, how: object) -> None:
        """All three operations in one CUDA graph."""
        first, second = (make_logits(4, 5000, 3, BF16, seed=seed) for seed in (1, 2))
        logits = to_device(first)
        weights, grid, targets, rows, warmth, noise = map(
            to_device,
            (Weights.of((how, 0.7)), Weights.of((how, [0.0, 0.5, 1.0])), torch.arange(4),
             torch.tensor([3, 1, 1, 0], dtype=torch.int32), torch.ones(1), make_noise(4)),
        )  # fmt: skip

        def all_three() -> list[torch.Tensor]:
            z = ops.combine(logits, weights, rows)
            sampled = ops.combine_sample(logits, weights, rows, warmth, noise)
            return [z, *sampled, *ops.combine_logprob(logits, grid, targets, rows, True)]

        all_three()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = all_three()
        for given in (first, second, first):
            for z, new in zip(logits, given, strict=True):
                z.copy_(new)
            graph.replay()
            torch.cuda.synchronize()
            replayed = [one.clone() for one in captured]
            for one, expected in zip(replayed, all_three(), strict=True):
                assert torch.equal(one, expected)
