"""Plain torch in blocks against the reference: the common cases, and the widths of families of models."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from ensembler_kernels import Combination, Weights, combine, combine_sample, reference, torch_ops
from helpers.kernel_cases import KernelCases
from helpers.member_cases import (
    BF16,
    EVEN_TOL,
    FP16,
    FP32,
    GRIDS,
    assert_same_draws,
    assert_scored,
    assert_three_way,
    make_logits,
    make_noise,
    near_the_top,
)

NUMBERS = {  # members: (constant, slope)
    1: ((1.0,), (0.5,)),
    2: ((1.0, 0.0), (1.0, -1.0)),
    3: ((1.0, 0.0, 0.0), (0.0, 1.0, -1.0)),
    5: ((1.0, 0.25, 0.0, 0.0, -0.5), (0.0, 1.0, -1.0, 0.5, -0.5)),
}
FAMILIES = (31_999, 32_000, 32_016, 49_152, 128_256, 151_936)
ROWS, DTYPES = (1, 3, 64), (FP32, BF16, FP16)
CASES = [  # every width, number of rows and of members, in turn; 64 rows of the widest would take gigabytes in float64
    (width, ROWS[(i + j) % 3] if width < 128_000 else ROWS[i % 2], (1, 2, 3, 5)[(i + j) % 4], DTYPES[(i + 2 * j) % 3])
    for i, width in enumerate(FAMILIES)
    for j in range(4)
]


@pytest.fixture(scope="module")
def ops() -> ModuleType:
    return torch_ops


class TestTorch(KernelCases):
    """What every implementation must do."""


@pytest.mark.parametrize(("width", "rows", "members", "dtype"), CASES)
def test_combine_in_three_ways(width: int, rows: int, members: int, dtype: torch.dtype) -> None:
    logits, how = make_logits(rows, width, members, dtype, forbidden=True), Combination(*NUMBERS[members])
    weights = Weights.of((how, torch.linspace(0, 1.5, rows)))
    truth = reference.combine(logits, weights, dtype=torch.float64)
    assert_three_way(combine(logits, weights, impl="torch"), reference.combine(logits, weights), truth, 1e-6)
    if sum(map(bool, how.constant)) == 1:
        assert torch.equal(combine(logits, Weights.of((how, 0.0)), impl="torch"), logits[0].float())  # bit for bit


@pytest.mark.parametrize(("width", "rows", "members", "dtype"), CASES[::3])
def test_a_grid_and_draws_in_three_ways(width: int, rows: int, members: int, dtype: torch.dtype) -> None:
    rows = min(rows, 8)
    logits, how = make_logits(rows, width, members, dtype), Combination(*NUMBERS[members])
    grid = Weights.of((how, torch.linspace(0, 1.5, 7)))
    assert_scored(torch_ops, logits, grid, near_the_top(logits, how), EVEN_TOL)
    for warmth in ((None, None), (torch.full((1,), 0.7), make_noise(rows, width))):
        arguments = logits, Weights.of((how, 0.7)), None, *warmth
        tokens, logprobs = torch_ops.combine_sample(*arguments)
        expected, single = reference.combine_sample(*arguments)
        assert torch.equal(tokens, expected)
        truth = (
            reference.combine(*arguments[:2], dtype=torch.float64) / (1 if warmth[0] is None else 0.7)
        ).log_softmax(-1)
        assert_three_way(logprobs, single, truth.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), EVEN_TOL)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("forbidden", [False, True])
@pytest.mark.parametrize("outside", ["none", "mask", "neutral", "cutoff"])
def test_a_grid_with_ids_outside(grid: str, forbidden: bool, outside: str) -> None:
    logits = make_logits(5, 3001, 3, BF16, forbidden=forbidden)
    shared = 2800 if outside in ("mask", "neutral") else None
    cutoff = 0.1 if outside == "cutoff" else None
    how = Combination(*NUMBERS[3], shared, neutral=outside == "neutral", cutoff=cutoff)
    assert_scored(torch_ops, logits, Weights.of((how, GRIDS[grid])), near_the_top(logits, how), EVEN_TOL)


def test_rows_of_more_than_one_block() -> None:
    """An index and several rules over outputs that are handled in many blocks, some of rows that follow one another."""
    logits = make_logits(70, 5000, 3, FP32)
    parts = [(Combination(*NUMBERS[3]), 0.5), (Combination((0, 1, 0), (1, 0, -1), anchor=1), 1.0)]
    points = Weights.of(*parts)
    generator = torch.Generator().manual_seed(0)
    rows = torch.cat([torch.arange(64), torch.randint(0, 70, (80,), generator=generator)]).int()
    weights = points.replace_table(points.table[torch.randint(0, 2, (len(rows),), generator=generator)])
    expected = reference.combine(logits, weights, rows)
    torch.testing.assert_close(combine(logits, weights, rows, impl="torch"), expected, rtol=1e-6, atol=1e-6)
    given = {"temperature": torch.linspace(0, 2, len(rows)), "noise": make_noise(len(rows))}
    actual = combine_sample(logits, weights, rows, impl="torch", **given)
    assert_same_draws(actual, combine_sample(logits, weights, rows, impl="reference", **given))
