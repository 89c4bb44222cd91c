"""Plain torch in blocks against the reference: its error may exceed the reference's by no more than a tolerance."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from ensembler_kernels import Combination, combine, combine_logprob, combine_sample, reference, torch_grid, torch_ops
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import KernelCases
from member_cases import (
    DTYPES,
    NUMBERS,
    WIDTHS,
    assert_greedy,
    assert_three_way,
    grids,
    make_combination,
    make_logits,
)
from torch import Tensor

TOL = 1e-5
ROWS = (1, 3, 64)
CASES = [  # every width, number of rows and of members, in turn; 64 rows of the widest would take gigabytes in float64
    (width, ROWS[(i + j) % 3] if width < 128_000 else ROWS[i % 2], (1, 2, 3, 5)[(i + j) % 4], DTYPES[(i + 2 * j) % 3])
    for i, width in enumerate(WIDTHS)
    for j in range(4)
]


@pytest.fixture(scope="module")
def ops() -> ModuleType:
    return torch_ops


class TestTorch(KernelCases):
    """What every implementation must do."""

    test_any_layout_of_rows = None  # hypothesis lets one class of a process run it; below is the like of it

    def test_a_target_out_of_range_is_not_read(self, ops: ModuleType) -> None:
        for target in (-1, 2**40):
            with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
                ops.combine_logprob([torch.zeros(1, 64)], make_combination(1), torch.zeros(1), torch.tensor([target]))


def scored_in_three_ways(
    logits: list[Tensor], how: Combination, alphas: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Compare log-probs and flags of plain torch with the reference and with float64; return them."""
    actual, greedy = combine_logprob(logits, how, alphas, targets, impl="torch")
    by_reference, _ = reference.combine_logprob(logits, how, alphas, targets)
    truth, _ = reference.combine_logprob(logits, how, alphas.double(), targets, dtype=torch.float64)
    assert_three_way(actual, by_reference, truth, TOL)
    z = torch.stack([reference.combine(logits, how, a, dtype=torch.float64) for a in alphas.double()])
    assert_greedy(greedy, z, targets, 1e-4)
    return actual, greedy


def near_the_top(logits: list[Tensor], how: Combination) -> Tensor:
    """Targets that are the best token in even rows, and any in odd ones."""
    best = reference.combine(logits, how, 0.5).argmax(-1)
    return torch.where(torch.arange(len(best)) % 2 == 0, best, best // 2)


@pytest.mark.parametrize(("width", "rows", "members", "dtype"), CASES)
def test_combine_in_three_ways(width: int, rows: int, members: int, dtype: torch.dtype) -> None:
    logits, how = make_logits(rows, width, members, dtype, forbidden=True), make_combination(members)
    alpha = torch.linspace(0, 1.5, rows)
    truth = reference.combine(logits, how, alpha.double(), dtype=torch.float64)
    by_reference = reference.combine(logits, how, alpha)
    assert_three_way(combine(logits, how, alpha, impl="torch"), by_reference, truth, 1e-6)
    if sum(map(bool, how.constant)) == 1:
        assert torch.equal(combine(logits, how, 0.0), logits[0].float())  # bit for bit


@pytest.mark.parametrize(("width", "rows", "members", "dtype"), CASES[::3])
def test_a_grid_in_three_ways(width: int, rows: int, members: int, dtype: torch.dtype) -> None:
    rows = min(rows, 8)
    logits, how = make_logits(rows, width, members, dtype), make_combination(members)
    scored_in_three_ways(logits, how, torch.linspace(0, 1.5, 7), near_the_top(logits, how))


@pytest.mark.parametrize("alphas", grids(), ids=lambda grid: f"{len(grid)} from {grid[0]} to {grid[-1]}")
@pytest.mark.parametrize("forbidden", [False, True])
@pytest.mark.parametrize("outside", ["none", "mask", "neutral", "cutoff"])
def test_a_grid_equals_one_by_one(alphas: list[float], forbidden: bool, outside: str) -> None:
    logits = make_logits(5, 3001, 3, torch.bfloat16, forbidden=forbidden)
    how = make_combination(3)
    if outside in ("mask", "neutral"):
        how = Combination(how.constant, how.slope, 2800, neutral=outside == "neutral")
    elif outside == "cutoff":
        how = Combination(how.constant, how.slope, cutoff=0.1)
    targets = near_the_top(logits, how)
    actual, greedy = scored_in_three_ways(logits, how, torch.tensor(alphas), targets)
    for k, alpha in enumerate(alphas):
        one, flag = combine_logprob(logits, how, [alpha], targets, impl="torch")
        finite = one[0].isfinite()
        assert torch.equal(finite, actual[k].isfinite())
        assert (one[0] - actual[k])[finite].abs().max().item() < 3e-5
        assert torch.equal(flag[0], greedy[k])


@pytest.mark.parametrize("scale", [1.0, 10.0, 60.0, 1000.0])
def test_a_grid_over_logits_that_underflow(scale: float) -> None:
    """A token that starts below what exp can hold, and becomes the best one, is not lost."""
    generator = torch.Generator().manual_seed(3)
    logits = [scale * torch.randn(4, 257, generator=generator) for _ in range(3)]
    scored_in_three_ways(logits, make_combination(3), torch.linspace(0, 3, 16), torch.arange(4))
    rising = [torch.tensor([[0.0, -200.0, -400.0]]), torch.tensor([[0.0, 300.0, 450.0]])]
    how = Combination((1.0, 0.0), (0.0, 1.0))
    for target in range(3):
        scored_in_three_ways(rising, how, torch.linspace(0, 1, 11), torch.tensor([target]))


def test_equal_logits_leave_the_lowest_id() -> None:
    """Of bf16 logits many are equal; ties within one α, over lanes and runs, have to fall to the lowest id."""
    generator = torch.Generator().manual_seed(4)
    logits = [torch.randint(-2, 3, (6, 1000), generator=generator).bfloat16() for _ in range(3)]
    how, alphas = make_combination(3), torch.tensor([0.0, 0.5, 1.0, 1.5])
    for alpha in alphas.tolist():
        z = reference.combine(logits, how, alpha)
        tokens, _ = combine_sample(logits, how, alpha, temperature=0.0, seed=0, impl="torch")
        assert torch.equal(tokens, z.argmax(-1))
        _, greedy = combine_logprob(logits, how, alphas, tokens, impl="torch")
        assert torch.equal(greedy, reference.combine_logprob(logits, how, alphas, tokens)[1])


def test_the_recurrence_is_what_runs_on_an_even_grid() -> None:
    assert torch_grid.runs([0.1 * k for k in range(40)]) == [slice(0, 32), slice(32, 40)]
    assert torch_grid.runs([2.0, 1.0, 0.0]) == [slice(0, 3)]
    assert torch_grid.runs([0.0, 0.1, 0.5]) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert torch_grid.runs([0.5, 0.5]) == [slice(0, 1), slice(1, 2)]


@pytest.mark.parametrize(("width", "rows", "members", "dtype"), CASES[::3])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_equal_seeds_give_equal_tokens(
    width: int, rows: int, members: int, dtype: torch.dtype, temperature: float
) -> None:
    rows = min(rows, 8)
    logits, how = make_logits(rows, width, members, dtype), make_combination(members)
    tokens, logprobs = combine_sample(logits, how, 0.7, temperature=temperature, seed=width, impl="torch")
    expected, by_reference = reference.combine_sample(logits, how, 0.7, temperature, width)
    assert torch.equal(tokens, expected)
    z = reference.combine(logits, how, 0.7, dtype=torch.float64)
    truth = (z / (temperature or 1.0)).log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    assert_three_way(logprobs, by_reference, truth, TOL)


@pytest.mark.parametrize("scale", [0.5, 12.0])
def test_temperature_per_row_and_few_likely_tokens(scale: float) -> None:
    """Greedy rows beside drawn ones; at the larger scale noise is drawn for the few tokens that may win."""
    logits, how = [scale * z for z in make_logits(6, 5000, 3, torch.float32)], make_combination(3)
    temperature, alpha = torch.tensor([0.0, 0.3, 1.0, 0.0, 2.0, 0.7]), torch.linspace(0, 1, 6)
    for seed in (0, 1, 2**63 + 5, -1):
        tokens, _ = combine_sample(logits, how, alpha, temperature=temperature, seed=seed, impl="torch")
        expected, _ = combine_sample(logits, how, alpha, temperature=temperature, seed=seed, impl="reference")
        assert torch.equal(tokens, expected)


def test_a_draw_depends_on_seed_row_and_token_alone() -> None:
    logits, how = make_logits(7, 501, 3, torch.float32), make_combination(3)
    whole, _ = combine_sample(logits, how, 0.7, temperature=1.0, seed=9)
    first, _ = combine_sample([z[:3] for z in logits], how, 0.7, temperature=1.0, seed=9)
    assert torch.equal(whole[:3], first)
    assert torch.equal(combine_sample(logits, how, 0.7, temperature=1.0, seed=torch.tensor(9))[0], whole)
    others = [combine_sample(logits, how, 0.7, temperature=1.0, seed=seed)[0] for seed in range(20)]
    assert len({tuple(tokens.tolist()) for tokens in others}) == 20


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.5])
def test_samples_are_distributed_as_softmax_says(impl: str, alpha: float) -> None:
    """Chi-square over 12 tokens, 20,000 rows of one distribution for each of five seeds."""
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(5)
    one = [torch.randn(1, 12, generator=generator) for _ in range(3)]
    how, temperature, rows = make_combination(3), 0.8, 20_000
    p = (reference.combine(one, how, alpha, dtype=torch.float64)[0] / temperature).softmax(-1)
    logits = [z.expand(rows, -1) for z in one]
    found = []
    for seed in range(5):
        tokens, _ = combine_sample(logits, how, alpha, temperature=temperature, seed=seed, impl=impl)
        counts = torch.bincount(tokens, minlength=12)
        found.append(stats.chisquare(counts.numpy(), (p * rows).numpy()).pvalue)
    assert min(found) > 1e-4, found
    assert max(found) > 0.05, found


def test_philox_answers_as_published() -> None:
    """The vectors of Random123 (Salmon et al. 2011), kat_vectors, philox4x32 10."""

    def words(counter: list[int], seed: int) -> list[int]:
        return [int(word) for word in reference.philox(*(torch.tensor(c) for c in counter), seed)]

    assert words([0, 0, 0, 0], 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert words(pi, 0x299F31D0A4093822) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_noise_is_finite_at_both_ends() -> None:
    bits = torch.tensor([0, 0xFFFFFFFF])
    uniform = ((bits >> 9).float() + 0.5) * 2.0**-23
    noise = -(-uniform.log()).log()
    assert noise.isfinite().all(), noise
    assert -2.9 < noise[0] < noise[1] < 16.7, noise


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Tensor], Combination, list[float], Tensor]:
    """Members of mixed dtypes, widths and strides, with −inf; a rule with shared ids or without; a grid; targets."""
    members, rows = draw(st.sampled_from(sorted(NUMBERS))), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    logits = []
    for _ in range(members):
        width = draw(st.integers(3, 400))
        storage = 3 * torch.randn(rows * 2, width + 5, generator=generator)
        z = storage[::2, 3 : 3 + width]
        if draw(st.booleans()):
            z = z.t().contiguous().t()
        if draw(st.booleans()):
            z = z.masked_fill(torch.rand(z.shape, generator=generator) < 0.2, -math.inf)
        z[:, 1] = 1.0  # a row keeps a token
        logits.append(z.to(draw(st.sampled_from(DTYPES))))
    shared = draw(st.sampled_from([None, 2, 130, 1000]))
    how = Combination(*NUMBERS[members], shared, neutral=draw(st.booleans()))
    targets = torch.randint(0, logits[0].shape[-1], (rows,), generator=generator)
    return logits, how, draw(st.sampled_from(grids())), targets


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(cases())
def test_any_shapes_and_strides(case: tuple[list[Tensor], Combination, list[float], Tensor]) -> None:
    logits, how, alphas, targets = case
    scored_in_three_ways(logits, how, torch.tensor(alphas), targets)
    temperature = torch.linspace(0, 1, len(targets))
    tokens, logprobs = combine_sample(logits, how, alphas[-1], temperature=temperature, seed=1, impl="torch")
    expected, by_reference = combine_sample(logits, how, alphas[-1], temperature=temperature, seed=1, impl="reference")
    assert torch.equal(tokens, expected)
    assert (logprobs - by_reference).abs().max().item() < 2e-5
