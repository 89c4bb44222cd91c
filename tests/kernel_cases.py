"""What every kernel implementation must do: cases that `test_cuda_ops` and `triton_cases` run on their own `ops`.

Three-way tolerance: the truth is `reference` in float64 on the members as they are (fp32, bf16, fp16); the error of an
implementation may be that of `reference` in float32, plus a few roundings.
"""

from __future__ import annotations

import itertools
import math
from types import ModuleType

import pytest
import torch
from ensembler_kernels import reference
from ensembler_kernels.combination import Combination
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

INF, NAN = math.inf, math.nan
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

RATIO = Combination((1, 0, 0), (0, 1, -1))
COMBINATIONS = {
    "one": Combination((1,), (0,)),
    "two": Combination((1, 0), (1, -1)),
    "ratio": RATIO,
    "neutral": Combination((1, 0, 0), (0, 1, -1), neutral=True),
    "raw": Combination((1, 0, 0), (0, 1, -0.5), neutral=True, raw=(False, True, False)),
    "cutoff": Combination((1, 0, 0), (1, 0, -1), cutoff=0.1),
    "neutral cutoff": Combination((1, 0, 0), (0, 1, -1), neutral=True, cutoff=0.02),
    "shared": Combination((0.5, 0.5, 0), (0, 1, -1), shared=100),
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


def assert_three_way(actual: Tensor, single: Tensor, truth: Tensor) -> None:
    """−inf and NaN where the truth has them; elsewhere an error no larger than the reference's in float32 and a bit."""
    assert actual.dtype == FP32
    assert torch.equal(actual == -INF, truth == -INF)
    assert torch.equal(actual.isnan(), truth.isnan())
    finite = truth.isfinite()
    size = truth[finite].abs().max().item() if finite.any() else 0.0
    error = (actual.double() - truth)[finite].abs().max().item() if finite.any() else 0.0
    allowed = (single.double() - truth)[finite].abs().max().item() if finite.any() else 0.0
    assert error <= allowed + 4 * torch.finfo(FP32).eps * max(size, 1.0), (error, allowed, size)


class KernelCases:
    """`ops`: a fixture of the class that inherits this, the module under test."""

    @pytest.mark.parametrize(("how", "widths", "dtypes"), product_of_cases())
    def test_all_three_are_as_exact_as_the_reference(self, ops: ModuleType, how: str, widths: str, dtypes: str) -> None:
        logits = make_members(len(COMBINATIONS[how].constant), 3, WIDTHS[widths], DTYPES[dtypes])
        self.check_all_three(ops, COMBINATIONS[how], logits)

    def check_all_three(self, ops: ModuleType, how: Combination, logits: list[Tensor]) -> None:
        alpha = torch.tensor([0.0, 0.7, 1.5])
        truth = reference.combine(logits, how, alpha, dtype=torch.float64)
        assert_three_way(ops.combine(logits, how, alpha), reference.combine(logits, how, alpha), truth)

        alphas, targets = torch.tensor([0.0, 0.7, -0.4]), torch.tensor([0, 3, logits[0].shape[-1] - 1])
        logprobs, greedy = ops.combine_logprob(logits, how, alphas, targets)
        single, single_greedy = reference.combine_logprob(logits, how, alphas, targets)
        truth, _ = reference.combine_logprob(logits, how, alphas, targets, dtype=torch.float64)
        assert_three_way(logprobs, single, truth)
        assert torch.equal(greedy, single_greedy)

        temperature, seed = torch.tensor([0.0, 1.0, 0.6]), torch.tensor(1234567890123456789)
        tokens, logprobs = ops.combine_sample(logits, how, alpha, temperature, seed)
        expected, single = reference.combine_sample(logits, how, alpha, temperature, seed)
        assert torch.equal(tokens, expected)
        _, truth = reference.combine_sample(logits, how, alpha, temperature, seed, dtype=torch.float64)
        assert_three_way(logprobs, single, truth)

    @pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
    def test_alpha_zero_is_the_anchor_bit_for_bit(self, ops: ModuleType, dtype: torch.dtype) -> None:
        anchor = torch.tensor([[1.25, -3.5, 7.0, -INF, 0.1, -INF, 60000.0, 1e-7]]).to(dtype)
        up = torch.tensor([[-INF, -INF, INF, 1.0, 0.3, -INF, 1.0, 2.0]]).to(dtype)
        down = torch.tensor([[-INF, 2.0, INF, 1.0, -0.7, 3.0, -INF, 5.0]]).to(dtype)
        for how in (RATIO, Combination(RATIO.constant, RATIO.slope, cutoff=0.5)):
            assert torch.equal(ops.combine([anchor, up, down], how, torch.zeros(1)), anchor.float())

    @pytest.mark.parametrize("alpha", [0.0, 2.0, -2.0, 3e38])
    def test_infinities_nan_and_overflow(self, ops: ModuleType, alpha: float) -> None:
        values = torch.tensor([1.0, -INF, INF, NAN, 7.0])
        logits = [z.reshape(1, -1) for z in torch.cartesian_prod(values, values, values).unbind(-1)]
        alphas = torch.tensor([alpha])
        expected = reference.combine(logits, RATIO, alphas)
        torch.testing.assert_close(ops.combine(logits, RATIO, alphas), expected, rtol=0, atol=0, equal_nan=True)

    def test_a_member_without_weight_is_not_looked_at(self, ops: ModuleType) -> None:
        logits = [torch.tensor([[1.0, 2.0]]), torch.tensor([[NAN, INF]])]
        assert ops.combine(logits, Combination((1, 0), (0.5, 0)), torch.ones(1)).tolist() == [[1.5, 3.0]]

    def test_a_forbidden_row_and_a_row_with_nan(self, ops: ModuleType) -> None:
        """They are found from the result: token −1, log-prob NaN."""
        how, zeros = Combination((1,), (0,)), torch.zeros(3)
        logits = torch.zeros(3, 5000)
        logits[0] = -INF
        logits[1, 4321] = NAN
        for temperature in (zeros, zeros + 1):
            tokens, logprobs = ops.combine_sample([logits], how, zeros, temperature, torch.tensor(0))
            assert (tokens < 0).tolist()[::2] == [True, False]
            assert logprobs.isnan().tolist()[1:] == [True, False]
        logprobs, _ = ops.combine_logprob([logits], how, torch.zeros(2), torch.tensor([3, 4, 5]))
        assert logprobs.isnan().tolist() == [[True, True, False]] * 2

    def test_a_nan_among_forbidden_tokens_is_nan_and_not_minus_one(self, ops: ModuleType) -> None:
        logits = torch.full((1, 3000), -INF)
        logits[0, 2500] = NAN
        _, logprobs = ops.combine_sample(
            [logits], Combination((1,), (0,)), torch.zeros(1), torch.ones(1), torch.tensor(1)
        )
        assert logprobs.isnan().item()

    def test_nan_in_the_anchor_cuts_nothing(self, ops: ModuleType) -> None:
        logits = make_members(3, 2, (700,), (FP32,))
        logits[0][1, 5] = NAN
        how, alpha = COMBINATIONS["cutoff"], torch.ones(2)
        expected = reference.combine(logits, how, alpha)
        torch.testing.assert_close(ops.combine(logits, how, alpha), expected, equal_nan=True)

    @pytest.mark.parametrize("tie", [[7, 2900], [2047, 2048], [0, 4999]])
    def test_the_lowest_of_equal_ids_wins(self, ops: ModuleType, tie: list[int]) -> None:
        logits = torch.zeros(1, 5000)
        logits[0, tie] = 3.0
        how, zeros = Combination((1,), (0,)), torch.zeros(1)
        tokens, _ = ops.combine_sample([logits], how, zeros, zeros, torch.tensor(0))
        assert tokens.tolist() == [tie[0]]
        for target, is_best in ((tie[0], True), (tie[1], False)):
            _, greedy = ops.combine_logprob([logits], how, zeros, torch.tensor([target]))
            assert greedy.item() is is_best

    @pytest.mark.parametrize("seed", [0, 1, -1, 2**32, 2**63 - 1, -(2**63)])
    def test_draws_are_those_of_the_reference(self, ops: ModuleType, seed: int) -> None:
        """Equal logits: the token is the one with the largest draw, so that every draw is looked at."""
        logits, how = torch.zeros(4, 3001), Combination((1,), (0,))
        arguments = ([logits], how, torch.zeros(4), torch.tensor([1.0, 0.3, 2.0, 1e-3]), torch.tensor(seed))
        tokens, _ = ops.combine_sample(*arguments)
        assert torch.equal(tokens, reference.combine_sample(*arguments)[0])
        assert len(set(tokens.tolist())) > 1

    @pytest.mark.parametrize("count", [1, 2, 5, 32, 33])
    def test_a_grid_equals_its_alphas_one_by_one(self, ops: ModuleType, count: int) -> None:
        logits = make_members(3, 2, (1999, 2003), (BF16, FP32))
        alphas, targets = torch.linspace(-0.5, 2.0, count), torch.tensor([0, 98])
        for how in (RATIO, COMBINATIONS["neutral cutoff"]):
            logprobs, greedy = ops.combine_logprob(logits, how, alphas, targets)
            assert logprobs.shape == greedy.shape == (count, 2)
            for k in range(0, count, 4):
                one, one_greedy = ops.combine_logprob(logits, how, alphas[k : k + 1], targets)
                torch.testing.assert_close(logprobs[k], one[0], rtol=2e-6, atol=2e-6)
                assert torch.equal(greedy[k], one_greedy[0])

    @pytest.mark.parametrize("how", [RATIO, COMBINATIONS["neutral cutoff"]], ids=["ratio", "neutral cutoff"])
    def test_positions_are_rows(self, ops: ModuleType, how: Combination) -> None:
        """(rows, positions, V) as `logits_to_keep` leaves it: a slice that no view can flatten; α per row."""
        logits = [z.view(2, 3, -1)[:, 1:] for z in make_members(3, 6, (515, 512), (BF16, FP32))]
        alpha = torch.tensor([0.5, 2.0])
        expected = reference.combine(logits, how, alpha)
        actual = ops.combine(logits, how, alpha)
        assert actual.is_contiguous()
        torch.testing.assert_close(actual, expected)

    def test_no_rows(self, ops: ModuleType) -> None:
        logits, none = [torch.zeros(0, 7)] * 3, torch.zeros(0)
        assert ops.combine(logits, RATIO, none).shape == (0, 7)
        tokens, logprobs = ops.combine_sample(logits, RATIO, none, none, torch.tensor(0))
        assert tokens.shape == logprobs.shape == (0,)
        logprobs, greedy = ops.combine_logprob(logits, RATIO, torch.zeros(2), torch.zeros(0, dtype=torch.int64))
        assert logprobs.shape == greedy.shape == (2, 0)

    def test_a_target_out_of_range_is_not_read(self, ops: ModuleType) -> None:
        """The dispatcher refuses it; the kernel must not touch memory for it even so."""
        logits = [torch.zeros(2, 64)] * 3
        for target in (-1, 64, 2**40):
            logprobs, greedy = ops.combine_logprob(logits, RATIO, torch.zeros(1), torch.tensor([target, 1]))
            assert logprobs[0, 1].item() == pytest.approx(-math.log(64))
            assert not greedy[0, 0]

    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(case=st.data())
    def test_any_layout_of_rows(self, ops: ModuleType, case: st.DataObject) -> None:
        """Members whose rows are views of every kind and start at every alignment."""
        rows, num = case.draw(st.integers(1, 3)), case.draw(st.integers(1, 4))
        generator = torch.Generator().manual_seed(case.draw(st.integers(0, 1000)))
        logits = []
        for _ in range(num):
            width, shift, gap = (case.draw(st.integers(*bounds)) for bounds in ((1, 70), (0, 9), (0, 9)))
            wide = torch.randn(rows, shift + width + gap, generator=generator)
            wide.masked_fill_(torch.rand(wide.shape, generator=generator) < 0.1, -INF)[:, shift] = 1.0
            view = wide.to(case.draw(st.sampled_from([FP32, BF16, FP16])))[:, shift : shift + width]
            layout = case.draw(st.sampled_from(["sliced", "transposed", "strided", "expanded"]))
            if layout == "transposed":
                view = view.t().contiguous().t()
            elif layout == "strided":
                view = torch.stack([view, torch.full_like(view, NAN)], dim=-1)[..., 0]
            elif layout == "expanded":
                view = view[:1].expand(rows, -1)
            logits.append(view)
        weights = st.sampled_from([0.0, 1.0, -1.0, 0.5])
        constant, slope = (tuple(case.draw(weights) for _ in range(num)) for _ in range(2))
        how = Combination(constant, slope, case.draw(st.sampled_from([None, 9])))
        alpha = torch.tensor([case.draw(st.sampled_from([0.0, 0.5, 3.0, -1.0])) for _ in range(rows)])
        before = [z.clone() for z in logits]
        expected = reference.combine(logits, how, alpha)
        torch.testing.assert_close(ops.combine(logits, how, alpha), expected, rtol=1e-6, atol=1e-6)
        temperature, seed = torch.ones(rows), torch.tensor(7)
        tokens, logprobs = ops.combine_sample(logits, how, alpha, temperature, seed)
        want_tokens, want_logprobs = reference.combine_sample(logits, how, alpha, temperature, seed)
        assert torch.equal(tokens, want_tokens)
        torch.testing.assert_close(logprobs, want_logprobs, rtol=1e-5, atol=1e-5)
        for z, old in zip(logits, before, strict=True):
            assert torch.equal(z, old)  # members are not written to
