"""Logits, rules, grids and comparisons for tests of the kernels, and the device on which these run.

Three-way tolerance: the truth is `reference` in float64 on the members as they are (fp32, bf16, fp16); the error of an
implementation may be that of `reference` in float32, plus a few roundings. ENSEMBLER_TEST_DEVICE names the device.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from ensembler_kernels import reference
from ensembler_kernels.combination import Combination
from ensembler_kernels.weights import Weights
from torch import Tensor
from torch.testing import assert_close

DEVICE = torch.device(os.environ.get("ENSEMBLER_TEST_DEVICE", "cpu"))

INF, NAN = math.inf, math.nan
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
EVEN_TOL = 1e-5  # of log-probs on an evenly spaced grid, where a run of products stands for exponentials

ONE = Combination((1,), (0,))
RATIO = Combination((1, 0, 0), (0, 1, -1))
COMBINATIONS = {
    "one": ONE,
    "two": Combination((1, 0), (1, -1)),
    "ratio": RATIO,
    "neutral": Combination((1, 0, 0), (0, 1, -1), neutral=True),
    "raw": Combination((1, 0, 0), (0, 1, -0.5), neutral=True, raw=(False, True, False)),
    "cutoff": Combination((1, 0, 0), (1, 0, -1), cutoff=0.1),
    "neutral cutoff": Combination((1, 0, 0), (0, 1, -1), neutral=True, cutoff=0.02),
    "shared": Combination((0.5, 0.5, 0), (0, 1, -1), shared=100),
    "last anchor": Combination((0, 0, 1), (1, -1, 0), neutral=True, cutoff=0.02, anchor=2),
    "five": Combination((0.5, 0.25, 0.25, 0, 0), (0, 0, 1, 0.5, -1.5)),
    "eight": Combination((1, 0, 0, 0, 0, 0, 0, 0.5), (0, 1, -1, 0.5, -0.5, 0.25, -0.25, 0)),
}
WIDTHS = {
    "tiny": (5,),
    "even": (2048,),
    "odd": (1999, 2003, 1997),
    "padded": (2064, 2048, 2080),
    "narrow anchor": (1021, 1024, 1030),
}
DTYPES = {"fp32": (FP32,), "bf16": (BF16,), "fp16": (FP16,), "mixed": (BF16, FP32, FP16)}
GRIDS = {
    "even": [k / 10 for k in range(16)],
    "uneven": [0.0, 0.1, 0.5, 2.0],
    "backwards": [1.5, 1.0, 0.5, 0.0],
    "two": [-0.5, 2.0],
    "a run": [k / 16 for k in range(32)],
    "over a run": [k / 16 for k in range(33)],
}


def to_device(value: Any, device: torch.device = DEVICE) -> Any:
    """Return tensors, lists of them or weights on a device. Views keep strides, alignment and what lies around."""
    if isinstance(value, list):
        return [to_device(one, device) for one in value]
    if device.type == "cpu" or not isinstance(value, Tensor | Weights):
        return value
    if isinstance(value, Weights):
        return value.to(device)
    whole = value.as_strided((value.untyped_storage().nbytes() // value.element_size(),), (1,), 0)
    return whole.to(device).as_strided(value.shape, value.stride(), value.storage_offset())


def run(operation: Callable[..., Any], *arguments: Any) -> Any:
    """Return what an operation gives on the device of the tests, on the CPU."""
    found = operation(*map(to_device, arguments))
    if isinstance(found, Tensor):
        return found.cpu()
    return type(found)(*(part if part is None else part.cpu() for part in found))


def product_of_cases() -> list[tuple[str, str, str]]:
    """Every combination with every width, the dtypes taking turns; the log-ratio of odd widths with every dtype."""
    turns = itertools.cycle(DTYPES)
    cases = [(how, widths, next(turns)) for how in COMBINATIONS for widths in WIDTHS]
    return sorted({*cases, *itertools.product(["ratio"], ["odd"], DTYPES)})


def make_members(num: int, rows: int, widths: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> list[Tensor]:
    """Logits (rows, V_i) with large ones rigged in and one in ten forbidden; id 0 is always allowed."""
    generator = torch.Generator().manual_seed(num * 1000 + rows)
    logits = []
    for i in range(num):
        z = 4 * torch.randn(rows, widths[i % len(widths)], generator=generator)
        z[:, 1::97] += 30
        forbidden = torch.rand(z.shape, generator=generator) < 0.1
        forbidden[:, 0] = False
        logits.append(z.masked_fill(forbidden, -INF).to(dtypes[i % len(dtypes)]))
    return logits


def make_noise(outputs: int, seed: int = 1234567890123456789) -> Tensor:
    """Noise (outputs, 4) whose prompts, samples and positions all differ between outputs."""
    number = torch.arange(outputs)
    return torch.stack([torch.full((outputs,), seed), number, 2 * number + 1, 100 - number], dim=-1)


def make_logits(
    rows: int, width: int, members: int, dtype: torch.dtype, *, seed: int = 0, forbidden: bool = False
) -> list[Tensor]:
    """Logits of members that resemble one another; every other one is wider, as a padded vocabulary is."""
    generator = torch.Generator().manual_seed(seed)
    common = 4 * torch.randn(rows, width, generator=generator)
    found = []
    for i in range(members):
        z = common + torch.randn(rows, width, generator=generator)
        if forbidden:
            z[:, torch.randint(0, width, (1 + width // 100,), generator=generator)] = -INF
        found.append(torch.nn.functional.pad(z, (0, 128 * (i % 2)), value=3.0).to(dtype))
    return found


def rules(shared: int | None = None, neutral: bool = False) -> list[tuple[Combination, list[float]]]:
    """Base-change, EFT and contrastive decoding on the same three members, each with its own anchor and α."""
    return [
        (Combination((1, 0, 0), (0, 1, -1), shared, neutral), [0.0, 0.5, 1.0]),
        (Combination((0, 1, 0), (1, 0, -1), shared, neutral, anchor=1), [0.5, 1.7]),
        (Combination((0, 0, 1), (0, -1, 1), shared, neutral, cutoff=0.1, anchor=2), [0.0, 1.0]),
    ]


def assert_three_way(actual: Tensor, single: Tensor, truth: Tensor, tol: float | None = None, size: float = 1) -> None:
    """−inf and NaN where the truth has them; elsewhere an error no larger than the reference's in float32 and a bit.

    Errors are relative to numbers above 1. `tol`: the bit, else a few roundings of the largest number or of `size`.
    """
    assert actual.dtype == FP32
    assert actual.shape == truth.shape
    assert torch.equal(actual == -INF, truth == -INF)
    assert torch.equal(actual.isnan(), truth.isnan())
    finite = truth.isfinite()
    if finite.any():
        scale = truth[finite].abs().clamp(min=1.0)
        error = ((actual.double() - truth)[finite].abs() / scale).max().item()
        allowed = ((single.double() - truth)[finite].abs() / scale).max().item()
        tol = 4 * torch.finfo(FP32).eps * max(scale.max().item(), size) if tol is None else tol
        assert error <= allowed + tol, f"error {error:.3g}; the reference has {allowed:.3g}; tolerance {tol:.3g}"


def assert_scored(
    ops: ModuleType, logits: list[Tensor], weights: Weights, targets: Tensor, tol: float | None = None
) -> None:
    """Compare log-probs, log Z and greedy flags with the reference in three ways."""
    actual = run(ops.combine_logprob, logits, weights, targets, None, True)
    single = reference.combine_logprob(logits, weights, targets, None, True)
    truth = reference.combine_logprob(logits, weights, targets, None, True, dtype=torch.float64)
    size = max(z[z.isfinite()].abs().max().item() for z in logits)  # log Z is a difference of sums of this size
    assert_three_way(actual.logprobs, single.logprobs, truth.logprobs, tol)
    assert_three_way(actual.log_z, single.log_z, truth.log_z, tol and tol * max(size, 1), size)
    assert torch.equal(actual.greedy, single.greedy), (actual.greedy ^ single.greedy).nonzero()


def assert_same_draws(actual: Any, expected: Any) -> None:
    """Tokens exactly, log-probs to rounding: the sum of a row may be cut into other parts."""
    assert torch.equal(actual.tokens, expected.tokens), (actual.tokens, expected.tokens)
    assert_close(actual.logprobs, expected.logprobs, rtol=2e-6, atol=2e-6, equal_nan=True)


def assert_same_scores(actual: Any, expected: Any, tol: float = 2e-6) -> None:
    assert torch.equal(actual.greedy, expected.greedy), (actual.greedy ^ expected.greedy).nonzero()
    assert_close(actual.logprobs, expected.logprobs, rtol=tol, atol=tol, equal_nan=True)


def near_the_top(logits: Sequence[Tensor], how: Combination) -> Tensor:
    """Targets that are the best token at α = 0.5 in even rows, and any in odd ones."""
    best = reference.combine(logits, Weights.of((how, 0.5))).argmax(-1)
    return torch.where(torch.arange(len(best)) % 2 == 0, best, best // 2)
