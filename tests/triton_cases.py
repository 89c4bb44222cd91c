"""The Triton kernels under Triton's interpreter; `test_triton_ops` runs this file in a process of its own."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
import triton
from ensembler_kernels import reference, triton_kernels, triton_ops
from ensembler_kernels.combination import Combination
from kernel_cases import BF16, COMBINATIONS, FP32, RATIO, KernelCases, make_members


@pytest.fixture(scope="module")
def ops() -> ModuleType:
    assert triton_ops.unavailable(torch.device("cpu")) is None
    return triton_ops


pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # numpy, on −inf and NaN


class TestTriton(KernelCases):
    pass


TUNED = (triton_kernels.combine_kernel, triton_kernels.sample_kernel, triton_kernels.logprob_kernel)


@pytest.mark.parametrize("how", [RATIO, COMBINATIONS["neutral cutoff"]], ids=["ratio", "neutral cutoff"])
def test_results_do_not_depend_on_the_block(monkeypatch: pytest.MonkeyPatch, how: Combination) -> None:
    logits = make_members(3, 2, (1999, 2003), (BF16, FP32))
    alpha, seed, targets = torch.tensor([0.7, 1.2]), torch.tensor(5), torch.tensor([0, 98])
    results = []
    for block in (128, 512, 2048):
        for kernel in TUNED:
            monkeypatch.setattr(kernel, "configs", [triton.Config({"BLOCK": block})])
        results.append(
            (
                triton_ops.combine(logits, how, alpha),
                *triton_ops.combine_sample(logits, how, alpha, torch.tensor([1.0, 0.0]), seed),
                *triton_ops.combine_logprob(logits, how, alpha, targets),
            )
        )
    for z, tokens, logprobs, scored, greedy in results[1:]:
        first_z, first_tokens, first_logprobs, first_scored, first_greedy = results[0]
        assert torch.equal(z, first_z)
        assert torch.equal(tokens, first_tokens)
        assert torch.equal(greedy, first_greedy)
        torch.testing.assert_close(logprobs, first_logprobs, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(scored, first_scored, rtol=2e-6, atol=2e-6)


def test_the_autotuner_chooses_and_the_merge_follows_its_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it times every configuration; here a stand-in for the clock prefers the last, the largest block."""
    logits = make_members(3, 2, (1999,), (FP32,))
    arguments = (logits, RATIO, torch.ones(2), torch.ones(2), torch.tensor(5))
    kernel = triton_kernels.sample_kernel
    timed = []

    def clock(call: object, quantiles: object) -> list[float]:
        call()  # type: ignore[operator]
        timed.append(call)
        return [1.0 / len(timed)] * 3

    monkeypatch.setattr(kernel, "configs", [triton.Config({"BLOCK": block}) for block in (64, 256, 1024)])
    monkeypatch.setattr(kernel, "_do_bench", clock)
    kernel.__dict__.pop("do_bench", None)
    monkeypatch.setattr(kernel, "cache", {})
    tokens, logprobs = triton_ops.combine_sample(*arguments)
    kernel.__dict__.pop("do_bench", None)
    assert len(timed) == 3
    assert kernel.best_config.kwargs["BLOCK"] == 1024
    expected_tokens, expected_logprobs = reference.combine_sample(*arguments)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logprobs, expected_logprobs, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("width", [31999, 49152])
def test_wide_rows(width: int) -> None:
    logits = make_members(3, 1, (width,), (BF16,))
    arguments = (logits, RATIO, torch.tensor([0.7]), torch.tensor([0.8]), torch.tensor(11))
    assert torch.equal(triton_ops.combine_sample(*arguments)[0], reference.combine_sample(*arguments)[0])
