"""`combine`, by the reference and by plain torch: against a loop over numbers, and in the corners of its meaning."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from ensembler_kernels import Combination, Weights, reference
from ensembler_kernels import combine as combine_by
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

INF = math.inf
NAN = math.nan


def combine(
    logits: Sequence[Tensor],
    constant: Sequence[float],
    slope: Sequence[float],
    alpha: float | list[float] | Tensor,
    *,
    shared: int | None = None,
    neutral: bool = False,
    raw: Sequence[bool] | None = None,
    cutoff: float | None = None,
) -> Tensor:
    """The result of plain torch, after the reference was seen to agree with it, bits of what is not finite included."""
    how = Combination(tuple(constant), tuple(slope), shared, neutral, None if raw is None else tuple(raw), cutoff)
    weights = Weights.of((how, alpha))
    expected = combine_by(logits, weights, impl="reference")
    actual = combine_by(logits, weights, impl="torch")
    assert_close(actual, expected, atol=2e-5, rtol=2e-6, equal_nan=True)
    return actual


def by_hand(
    logits: Sequence[Tensor], constant: Sequence[float], slope: Sequence[float], alpha: Sequence[float], shared: int
) -> list[list[float]]:
    """The stated meaning, one number at a time, on (rows, V_i): no tensor arithmetic."""
    result = []
    for r, a in enumerate(alpha):
        row = []
        for v in range(logits[0].shape[-1]):
            if v >= shared:
                row.append(-INF)
                continue
            given_base = [c * float(z[r, v]) for z, c in zip(logits, constant, strict=True) if c]
            given_ratio = [s * float(z[r, v]) for z, s in zip(logits, slope, strict=True) if s]
            if any(math.isnan(x) for x in (*given_base, *given_ratio)):
                row.append(NAN)
                continue
            base, term = sum(given_base), sum(given_ratio)
            term = a * term
            term = 0.0 if math.isnan(term) or term == INF else term
            row.append(-INF if math.isnan(base) or base in (INF, -INF) else base + term)
        result.append(row)
    return result


NUMBERS = st.sampled_from([0.0, 1.0, -1.0, 0.5, -0.25, 2.0])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Tensor], list[float], list[float], list[float], int | None]:
    """1-8 members of mixed dtypes and widths, some as views, with −inf entries; one α per row."""
    num, rows = draw(st.integers(1, 8)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    logits = []
    for _ in range(num):
        width = draw(st.integers(3, 17))
        z = 4 * torch.randn(rows, width, generator=generator)
        z = z.masked_fill(torch.rand(rows, width, generator=generator) < draw(st.sampled_from([0.0, 0.3])), -INF)
        z = z.to(draw(DTYPES))
        layout = draw(st.sampled_from(["plain", "transposed", "strided", "expanded"]))
        if layout == "transposed":
            z = z.t().contiguous().t()
        elif layout == "strided":
            z = torch.stack([z, torch.full_like(z, NAN)], dim=-1)[..., 0]
        elif layout == "expanded":
            z = z[:1].expand(rows, -1)
        logits.append(z)
    constant = draw(st.lists(NUMBERS, min_size=num, max_size=num))
    slope = draw(st.lists(NUMBERS, min_size=num, max_size=num))
    alpha = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0, -1.0]), min_size=rows, max_size=rows))
    return logits, constant, slope, alpha, draw(st.sampled_from([None, 2, 5, 40]))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(cases())
def test_equals_a_loop_over_numbers(
    case: tuple[list[Tensor], list[float], list[float], list[float], int | None],
) -> None:
    logits, constant, slope, alpha, shared = case
    before = [z.clone() for z in logits]
    actual = combine(logits, constant, slope, alpha, shared=shared)
    width = min(z.shape[-1] for z in logits)
    expected = by_hand(logits, constant, slope, alpha, width if shared is None else min(shared, width))
    assert actual.dtype == torch.float32
    assert_close(actual, torch.tensor(expected), atol=2e-4, rtol=1e-5, equal_nan=True)
    for z, old in zip(logits, before, strict=True):
        assert_close(z, old, rtol=0, atol=0, equal_nan=True)  # inputs are not written to


@pytest.mark.parametrize(
    ("base", "up", "down", "alpha", "expected"),
    [
        (1.0, 2.0, 3.0, 2.0, -1.0),
        (-INF, 2.0, 3.0, 2.0, -INF),  # what the anchor forbids stays forbidden ...
        (-INF, 2.0, -INF, 2.0, -INF),  # ... even where the ratio is +inf
        (1.0, -INF, 3.0, 2.0, -INF),  # what the numerator forbids is forbidden
        (1.0, -INF, -INF, 2.0, 1.0),  # undefined: log-ratio 0
        (1.0, 2.0, -INF, 2.0, 1.0),  # +inf: log-ratio 0
        (1.0, -INF, 3.0, -2.0, 1.0),  # +inf by a negative α: 0
        (1.0, 2.0, NAN, 2.0, NAN),
        (NAN, 2.0, 3.0, 0.0, NAN),
        (1.0, NAN, -INF, 0.0, NAN),
        (-INF, NAN, 1.0, 1.0, NAN),
    ],
)
def test_infinities_and_nan(base: float, up: float, down: float, alpha: float, expected: float) -> None:
    logits = [torch.tensor([[0.5, x]]) for x in (base, up, down)]
    actual = combine(logits, [1, 0, 0], [0, 1, -1], alpha)
    assert_close(actual, torch.tensor([[0.5, expected]]), equal_nan=True)


def test_outside_ids_masked_or_neutral() -> None:
    generator = torch.Generator().manual_seed(0)
    anchor, up, down = (torch.randn(2, width, generator=generator) for width in (7, 5, 6))
    masked = combine([anchor, up, down], [1, 0, 0], [0, 1, -1], 0.5)
    assert_close(masked[:, :5], anchor[:, :5] + 0.5 * (up - down[:, :5]))
    assert masked[:, 5:].tolist() == [[-INF, -INF]] * 2

    neutral = combine([anchor, up, down], [1, 0, 0], [0, 1, -1], 0.5, neutral=True)
    ratio = up.log_softmax(-1) - down[:, :5].log_softmax(-1)
    assert_close(neutral, torch.cat([anchor[:, :5] + 0.5 * ratio, anchor[:, 5:]], -1))
    assert torch.equal(combine([anchor, up, down], [1, 0, 0], [0, 1, -1], 0.0, neutral=True), anchor)


def test_what_is_forbidden_or_undefined_outside_stays_forbidden() -> None:
    anchor, second = torch.tensor([[1.0, 2.0, -INF, -INF, 5.0]]), torch.tensor([[1.0, 2.0, -INF, 3.0, -INF]])
    ratio = torch.tensor([[1.0, 2.0]])
    for weight in (0.5, -0.5):  # −inf + inf, −inf, +inf where the weight is negative
        actual = combine([anchor, second, ratio], [1, weight, 0], [0, 0, 1], 0.5, neutral=True)
        assert actual[0, 2:].tolist() == [-INF, -INF, -INF], actual


def test_neutral_does_not_normalise_a_raw_score() -> None:
    anchor, reward = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[10.0, 20.0]])
    actual = combine([anchor, reward], [1, 0], [0, 1], 1.0, neutral=True, raw=[False, True])
    assert_close(actual, torch.tensor([[11.0, 22.0, 3.0]]))


def test_neutral_ratio_is_invariant_to_a_shift_of_a_member() -> None:
    generator = torch.Generator().manual_seed(1)
    anchor, up, down = (torch.randn(2, width, generator=generator).double() for width in (9, 5, 6))
    weights = Weights.of((Combination((1, 0, 0), (0, 1, -1), neutral=True), [0.5, 2.0]))
    first = reference.combine([anchor, up, down], weights, dtype=torch.float64)
    assert_close(reference.combine([anchor, up + 100, down - 7], weights, dtype=torch.float64), first)


@pytest.mark.parametrize("neutral", [False, True])
def test_cutoff_keeps_tokens_near_the_anchors_best(neutral: bool) -> None:
    expert = torch.tensor([[0.5, 0.3, 0.04, 0.06, 0.1]]).log()
    amateur = torch.tensor([[0.1, 0.1, 0.3, 0.25, 0.25]]).log()
    actual = combine([expert, amateur], [1, 0], [1, -1], torch.tensor([1.0]), cutoff=0.1, neutral=neutral)
    kept = (2 * expert - amateur)[0, [0, 1, 3, 4]]
    assert_close(actual[0, [0, 1, 3, 4]], kept)
    assert actual[0, 2] == -INF
    assert torch.equal(combine([expert, amateur], [1, 0], [1, -1], 0.0, cutoff=0.1, neutral=neutral), expert)


def test_cutoff_applies_to_outside_ids_too() -> None:
    """ "Forbid tokens whose anchor probability is below cutoff · the largest one": ids only the anchor has, as well."""
    expert = torch.tensor([[0.5, 0.45, 0.001, 0.049]]).log()
    amateur = torch.tensor([[0.5, 0.5]]).log()
    actual = combine([expert, amateur], [1, 0], [1, -1], 1.0, cutoff=0.1, neutral=True)
    assert actual[0, 2].item() == -INF, actual
    assert actual[0, 3].item() == -INF, actual


@pytest.mark.parametrize("alpha", [1e30, 3e38])
def test_a_huge_alpha_ranks_tokens_by_the_ratio(alpha: float) -> None:
    """Any finite α ≥ 0 is allowed: α · ratio that overflows float32 must not turn into log-ratio 0."""
    base = torch.tensor([[0.0, 5.0, 0.0]])
    ratio = torch.tensor([[3.0, 1.0, -1.0]])
    actual = combine([base, ratio], [1, 0], [0, 1], alpha)
    assert actual.argmax(-1).item() == 0, actual


def test_float64_is_computed_in_float64() -> None:
    z = torch.tensor([[1.0 + 1e-12, 1.0]], dtype=torch.float64)
    weights = Weights.of((Combination((1,), (0,)), 1.0))
    assert reference.combine([z], weights, dtype=torch.float64)[0, 0].item() == 1.0 + 1e-12


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_the_cutoff_is_that_of_the_first_sum(impl: str) -> None:
    """Not of one member: 0.5 · (z_0 + z_1) finds id 2 plausible, which member 0 alone does not."""
    logits = [torch.tensor([[5.0, 0.0, 0.5]]), torch.tensor([[0.0, 5.0, 4.5]])]
    weights = Weights.of((Combination((0.5, 0.5), (1, -1), cutoff=0.9), [0.0, 0.1]))
    actual = combine_by(logits, weights, torch.zeros(2, dtype=torch.int64), impl=impl)
    assert_close(actual, torch.tensor([[2.5, 2.5, 2.5], [3.0, 2.0, 2.1]]))
    logits[1][0, 2] = 4.0
    actual = combine_by(logits, weights, torch.zeros(2, dtype=torch.int64), impl=impl)
    assert_close(actual, torch.tensor([[2.5, 2.5, 2.25], [3.0, 2.0, -INF]]))


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_the_result_is_as_wide_as_the_widest_anchor(impl: str) -> None:
    logits = [torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 8.0, 16.0]])]
    first = Combination((1, 0), (1, -1), neutral=True, raw=(True, True))
    second = Combination((0, 1), (1, -1), neutral=True, raw=(True, True), anchor=1)
    weights = Weights.of((first, 1.0), (second, 1.0))
    actual = combine_by(logits, weights, torch.tensor([0, 0]), impl=impl)
    assert actual.tolist() == [[-2.0, -4.0, -INF], [1.0, 2.0, 16.0]]


def test_a_first_sum_without_members_is_zero() -> None:
    logits = [torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 1.0]])]
    assert combine(logits, [0, 0], [1, -1], 2.0, neutral=True).tolist() == [[-6.0, 2.0]]
