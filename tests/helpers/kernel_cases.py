"""What every kernel implementation must do: cases that other files run on their own `ops`, an implementation module."""

from __future__ import annotations

import itertools
import math
from types import ModuleType

import pytest
import torch
from ensembler_kernels import reference
from ensembler_kernels.combination import Combination
from ensembler_kernels.weights import Weights
from helpers.member_cases import (
    BF16,
    COMBINATIONS,
    DTYPES,
    EVEN_TOL,
    FP16,
    FP32,
    GRIDS,
    INF,
    NAN,
    ONE,
    RATIO,
    WIDTHS,
    assert_same_draws,
    assert_same_scores,
    assert_scored,
    assert_three_way,
    make_members,
    make_noise,
    near_the_top,
    product_of_cases,
    rules,
    run,
    to_device,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close


class KernelCases:
    """`ops`: a fixture of the class that inherits this, the module under test."""

    draws_slowly = False

    @pytest.mark.parametrize(("how", "widths", "dtypes"), product_of_cases())
    def test_all_three_are_as_exact_as_the_reference(self, ops: ModuleType, how: str, widths: str, dtypes: str) -> None:
        logits = make_members(len(COMBINATIONS[how].constant), 3, WIDTHS[widths], DTYPES[dtypes])
        self.check_all_three(ops, COMBINATIONS[how], logits)

    def check_all_three(self, ops: ModuleType, how: Combination, logits: list[Tensor]) -> None:
        weights = Weights.of((how, [0.0, 0.7, 1.5]))
        truth = reference.combine(logits, weights, dtype=torch.float64)
        assert_three_way(run(ops.combine, logits, weights, None), reference.combine(logits, weights), truth)

        targets = torch.tensor([0, 3, logits[how.anchor].shape[-1] - 1])
        assert_scored(ops, logits, Weights.of((how, [0.0, 0.7, -0.4])), targets)

        arguments = (logits, weights, None, torch.tensor([0.0, 1.0, 0.6]), make_noise(3))
        tokens, logprobs = run(ops.combine_sample, *arguments)
        expected, single = reference.combine_sample(*arguments)
        assert torch.equal(tokens, expected)
        assert_three_way(logprobs, single, reference.combine_sample(*arguments, dtype=torch.float64).logprobs)

    # -- what is not finite -------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
    def test_alpha_zero_is_the_anchor_bit_for_bit(self, ops: ModuleType, dtype: torch.dtype) -> None:
        anchor = torch.tensor([[1.25, -3.5, 7.0, -INF, 0.1, -INF, 60000.0, 1e-7]]).to(dtype)
        up = torch.tensor([[-INF, -INF, INF, 1.0, 0.3, -INF, 1.0, 2.0]]).to(dtype)
        down = torch.tensor([[-INF, 2.0, INF, 1.0, -0.7, 3.0, -INF, 5.0]]).to(dtype)
        for how in (RATIO, Combination(RATIO.constant, RATIO.slope, cutoff=0.5)):
            assert torch.equal(run(ops.combine, [anchor, up, down], Weights.of((how, 0.0)), None), anchor.float())

    @pytest.mark.parametrize("alpha", [0.0, 2.0, -2.0, 3e38])
    def test_infinities_nan_and_overflow(self, ops: ModuleType, alpha: float) -> None:
        values = torch.tensor([1.0, -INF, INF, NAN, 7.0])
        logits = [z.reshape(1, -1) for z in torch.cartesian_prod(values, values, values).unbind(-1)]
        weights = Weights.of((RATIO, alpha))
        expected = reference.combine(logits, weights)
        assert_close(run(ops.combine, logits, weights, None), expected, rtol=0, atol=0, equal_nan=True)

    def test_a_member_without_weight_is_not_looked_at(self, ops: ModuleType) -> None:
        """By any output, or by one output of a call in which others read it."""
        logits = [torch.tensor([[1.0, 2.0]]), torch.tensor([[NAN, INF]])]
        alone = Weights.of((Combination((1, 0), (0.5, 0)), 1.0))
        assert run(ops.combine, logits, alone, None).tolist() == [[1.5, 3.0]]
        beside = Weights.of((Combination((1, 0), (0.5, 0)), 1.0), (Combination((0, 1), (0.5, 0)), 1.0))
        z = run(ops.combine, logits, beside, torch.zeros(2, dtype=torch.int32))
        assert z[0].tolist() == [1.5, 3.0]
        assert z[1].isnan().tolist() == [True, False]
        assert z[1, 1].item() == -INF

    def test_a_forbidden_row_and_a_row_with_nan(self, ops: ModuleType) -> None:
        """They are found from the result: token −1, log-prob NaN."""
        weights = Weights.of((ONE, [0.0, 1.0]))
        logits = torch.zeros(3, 5000)
        logits[0] = -INF
        logits[1, 4321] = NAN
        one = weights.replace_table(weights.table[:1])
        for temperature, noise in ((None, None), (torch.tensor([0.0, 1.0, 1.0]), make_noise(3))):
            tokens, logprobs = run(ops.combine_sample, [logits], one, None, temperature, noise)
            assert (tokens < 0).tolist()[::2] == [True, False]
            assert logprobs.isnan().tolist()[1:] == [True, False]
        targets = torch.tensor([0, 4321, 5])  # where argmax finds −inf, and NaN
        logprobs, greedy, log_z = run(ops.combine_logprob, [logits], weights, targets, None, True)
        assert logprobs.isnan().tolist() == [[True, True, False]] * 2
        assert not greedy.any()
        assert log_z.isnan().tolist() == [[True, True, False]] * 2

    @pytest.mark.parametrize("cutoff", [None, 0.1])
    def test_a_nan_among_forbidden_tokens_is_nan_and_not_minus_one(self, ops: ModuleType, cutoff: float | None) -> None:
        logits = torch.full((1, 3000), -INF)
        logits[0, 2500] = NAN
        weights = Weights.of((Combination((1,), (0,), cutoff=cutoff), 1.0))
        assert run(ops.combine_sample, [logits], weights, None, torch.ones(1), make_noise(1)).logprobs.isnan().item()

    def test_where_a_member_gives_nan_nothing_is_cut(self, ops: ModuleType) -> None:
        logits = make_members(3, 3, (700,), (FP32,))
        logits[0][1, 5] = logits[1][2, 6] = NAN
        weights = Weights.of((Combination((1, 0, 0), (0, 1, -1), cutoff=0.1), 1.0))
        z, expected = run(ops.combine, logits, weights, None), reference.combine(logits, weights)
        assert_close(z, expected, equal_nan=True)
        cut = (z == -INF).sum(-1).tolist()
        assert cut[0] > 400 > max(cut[1:]), cut
        assert z[1, 5].isnan()
        assert z[2, 6].isnan()
        scored = run(ops.combine_logprob, logits, weights, torch.zeros(3, dtype=torch.int64), None, False)
        assert scored.logprobs.isnan().tolist() == [[False, True, True]]

    def test_a_logit_that_overflows_between_the_ends_of_a_grid(self, ops: ModuleType) -> None:
        """One allowed id, whose log-ratio is finite and huge: its log-prob is 0 at every α."""
        anchor, up = torch.full((1, 600), -INF), torch.zeros(1, 600)
        anchor[0, 7], up[0, 7] = 0.0, 1e38
        weights = Weights.of((Combination((1, 0), (0, 1)), [1.0, 2.0, 3.0, 4.0]))
        scored = run(ops.combine_logprob, [anchor, up], weights, torch.tensor([7]), None, False)
        assert scored.logprobs.flatten().tolist() == [0.0] * 4
        assert scored.greedy.all()

    # -- choosing -----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("tie", [[7, 2900], [2047, 2048], [0, 4999]])
    def test_the_lowest_of_equal_ids_wins(self, ops: ModuleType, tie: list[int]) -> None:
        logits = torch.zeros(1, 5000)
        logits[0, tie] = 3.0
        assert run(ops.combine_sample, [logits], Weights.of((ONE, 0.0)), None, None, None).tokens.tolist() == [tie[0]]
        for alphas in ([0.0], [0.0, 0.5, 1.0]):
            for target, is_best in ((tie[0], True), (tie[1], False)):
                scored = run(
                    ops.combine_logprob, [logits], Weights.of((ONE, alphas)), torch.tensor([target]), None, False
                )
                assert scored.greedy.tolist() == [[is_best]] * len(alphas)
                assert scored.log_z is None

    def test_equal_logits_leave_the_lowest_id(self, ops: ModuleType) -> None:
        """Of bf16 logits many are equal; ties within one α have to fall to the lowest id."""
        generator = torch.Generator().manual_seed(4)
        logits = [torch.randint(-2, 3, (3, 1000), generator=generator).bfloat16() for _ in range(3)]
        weights = Weights.of((RATIO, [0.0, 0.5, 1.0, 1.5]))
        for k, alpha in enumerate(weights.alphas.tolist()):
            one = Weights.of((RATIO, alpha))
            tokens, _ = run(ops.combine_sample, logits, one, None, None, None)
            assert torch.equal(tokens, reference.combine(logits, one).argmax(-1))
            actual = run(ops.combine_logprob, logits, weights, tokens, None, False)
            assert actual.greedy[k].all()
            assert torch.equal(actual.greedy, reference.combine_logprob(logits, weights, tokens).greedy)

    @pytest.mark.parametrize("seed", [0, 1, -1, 2**32, 2**63 - 1, -(2**63)])
    def test_draws_are_those_of_the_reference(self, ops: ModuleType, seed: int) -> None:
        """Equal logits: the token is the one with the largest draw, so that every draw is looked at."""
        noise = make_noise(4, seed)
        noise[2:, 1:] += 2**32 - 1  # more bits than count
        arguments = ([torch.zeros(4, 3001)], Weights.of((ONE, 0.0)), None, torch.tensor([1.0, 0.3, 2.0, 1e-3]), noise)
        tokens, _ = run(ops.combine_sample, *arguments)
        assert torch.equal(tokens, reference.combine_sample(*arguments).tokens)
        assert len(set(tokens.tolist())) > 1

    def test_a_draw_depends_on_its_noise_alone(self, ops: ModuleType) -> None:
        """In another order, in another batch, of another row and in a wider vocabulary it is the same."""
        logits, noise, weights = [torch.zeros(1, 1501).expand(6, -1)], make_noise(6), Weights.of((ONE, 0.0))
        warm = torch.ones(1)
        tokens, _ = run(ops.combine_sample, logits, weights, None, warm, noise)
        order = torch.tensor([4, 0, 5, 1, 3, 2])
        assert torch.equal(run(ops.combine_sample, logits, weights, None, warm, noise[order]).tokens, tokens[order])
        first = torch.zeros(2, dtype=torch.int32)
        assert torch.equal(run(ops.combine_sample, logits, weights, first, warm, noise[3:5]).tokens, tokens[3:5])
        again = noise[[1, 1, 5, 1, 5, 5]]  # points of a grid may share their noise
        assert torch.equal(
            run(ops.combine_sample, logits, weights, None, warm, again).tokens, tokens[[1, 1, 5, 1, 5, 5]]
        )
        wide = [torch.nn.functional.pad(z, (0, 2600), value=-INF) for z in logits]
        assert torch.equal(run(ops.combine_sample, wide, weights, None, warm, noise).tokens, tokens)
        shifted = [torch.nn.functional.pad(z, (1, 0), value=-INF) for z in logits]  # the token counts as well
        assert (run(ops.combine_sample, shifted, weights, None, warm, noise).tokens != tokens + 1).all()

    @pytest.mark.parametrize("column", range(4), ids=["seed", "prompt", "sample", "position"])
    def test_each_number_of_the_noise_changes_draws(self, ops: ModuleType, column: int) -> None:
        noise = torch.tensor([[9, 1, 2, 3]]).repeat(6, 1)
        noise[:, column] = torch.arange(6)
        logits = [torch.zeros(6, 1501)]
        tokens, _ = run(ops.combine_sample, logits, Weights.of((ONE, 0.0)), None, torch.ones(1), noise)
        assert len(set(tokens.tolist())) == 6

    @pytest.mark.parametrize("scale", [0.5, 12.0])
    def test_some_outputs_are_greedy(self, ops: ModuleType, scale: float) -> None:
        """Greedy outputs beside drawn ones; at the larger scale few tokens may win."""
        logits = [(scale * z).masked_fill(z == -INF, -INF) for z in make_members(3, 6, (1999,), (FP32,))]
        weights, noise = Weights.of((RATIO, torch.linspace(0, 1, 6))), make_noise(6)
        temperature = torch.tensor([0.0, 0.3, 1.0, 0.0, 2.0, 0.7])
        actual = run(ops.combine_sample, logits, weights, None, temperature, noise)
        assert_same_draws(actual, reference.combine_sample(logits, weights, None, temperature, noise))
        greedy = run(ops.combine_sample, logits, weights, None, None, None)
        assert torch.equal(actual.tokens[::3], greedy.tokens[::3])
        assert_close(actual.logprobs[::3], greedy.logprobs[::3], rtol=2e-6, atol=2e-6)
        cold = run(ops.combine_sample, logits, weights, None, torch.zeros(1), noise)
        assert_same_draws(cold, greedy)

    @pytest.mark.parametrize(("alpha", "temperature"), [(0.0, 0.8), (0.7, 1.3), (1.5, 0.8)])
    def test_samples_are_distributed_as_softmax_says(self, ops: ModuleType, alpha: float, temperature: float) -> None:
        """Chi-square over 12 tokens that are allowed, 20,000 outputs of one row for each of five seeds."""
        if self.draws_slowly:
            pytest.skip("100,000 draws take minutes here; draws are compared with the reference's instead")
        stats = pytest.importorskip("scipy.stats")
        generator = torch.Generator().manual_seed(5)
        few = [torch.randn(1, 12, generator=generator) for _ in range(3)]
        logits = [torch.nn.functional.pad(z, (3, 49), value=0.0 if i else -INF) for i, z in enumerate(few)]
        weights = Weights.of((RATIO, alpha))
        p = (reference.combine(few, weights, dtype=torch.float64)[0] / temperature).softmax(-1)
        numbers = torch.cartesian_prod(torch.arange(20), torch.arange(20), torch.arange(50))  # prompt, sample, position
        rows, found = torch.zeros(len(numbers), dtype=torch.int32), []
        for seed in range(5):
            noise = torch.nn.functional.pad(numbers, (1, 0), value=seed)
            tokens, _ = run(ops.combine_sample, logits, weights, rows, torch.tensor([temperature]), noise)
            counts = torch.bincount(tokens - 3, minlength=12)
            found.append(stats.chisquare(counts.numpy(), (p * len(numbers)).numpy()).pvalue)
        assert min(found) > 1e-4, found
        assert max(found) > 0.05, found

    # -- rows, points and rules ---------------------------------------------------------------------------------------

    def test_rows_repeat_skip_and_permute(self, ops: ModuleType) -> None:
        """Outputs of an index are those of the logits indexed first, with weights that are indexed as well."""
        logits, rows = make_members(3, 5, (1999, 2003), (BF16, FP32)), torch.tensor([3, 0, 0, 2, 3], dtype=torch.int32)
        taken = [z[rows.long()] for z in logits]
        points = Weights.of((COMBINATIONS["neutral cutoff"], [0.0, 0.7, 1.5]))
        weights = points.replace_table(points.table[[2, 0, 1, 1, 2]])
        assert torch.equal(run(ops.combine, logits, weights, rows), run(ops.combine, taken, weights, None))
        warmth, targets = (torch.tensor([1.0, 0.0, 0.7, 1.0, 2.0]), make_noise(5)), torch.tensor([0, 1, 98, 7, 1])
        actual = run(ops.combine_sample, logits, weights, rows, *warmth)
        assert_same_draws(actual, run(ops.combine_sample, taken, weights, None, *warmth))
        actual = run(ops.combine_logprob, logits, points, targets, rows, False)
        assert_same_scores(actual, run(ops.combine_logprob, taken, points, targets, None, False))

    def test_rows_that_do_not_exist(self, ops: ModuleType) -> None:
        """The dispatcher refuses them where it can; the kernel must not touch memory for them even so: NaN."""
        logits, weights = make_members(3, 2, (515,), (FP32,)), Weights.of((RATIO, 0.5))
        rows = torch.tensor([-1, 1, 2, 2**31 - 1, -(2**31)], dtype=torch.int32)
        missing = [True, False, True, True, True]
        z = run(ops.combine, logits, weights, rows)
        assert z[[0, 2, 3, 4]].isnan().all()
        assert torch.equal(z[1], run(ops.combine, logits, weights, None)[1])
        sampled = run(ops.combine_sample, logits, weights, rows, torch.ones(1), make_noise(5))
        assert sampled.logprobs.isnan().tolist() == missing
        for alphas in ([0.5], [0.0, 0.5, 1.0]):
            given = logits, Weights.of((RATIO, alphas)), torch.zeros(5, dtype=torch.int64), rows, True
            scored = run(ops.combine_logprob, *given)
            assert scored.logprobs.isnan().tolist() == scored.log_z.isnan().tolist() == [missing] * len(alphas)
            assert not scored.greedy[:, missing].any()

    @pytest.mark.parametrize(("shared", "neutral"), [(None, False), (300, False), (300, True)])
    def test_rules_in_one_call_equal_each_on_its_own(self, ops: ModuleType, shared: int | None, neutral: bool) -> None:
        """Outputs of a narrower anchor end in forbidden ids."""
        logits, parts = make_members(3, 3, (700, 650, 720), (BF16, FP32, FP16)), rules(shared, neutral)
        together, rows = Weights.of(*parts), torch.tensor([0, 1, 2, 2, 0, 1, 1], dtype=torch.int32)
        warmth, noise, targets = torch.tensor([1, 0, 1, 0.7, 1, 0, 2]), make_noise(7), torch.tensor([0, 98, 7])
        z = run(ops.combine, logits, together, rows)
        tokens, logprobs = run(ops.combine_sample, logits, together, rows, warmth, noise)
        scored = run(ops.combine_logprob, logits, together, targets, None, True)
        assert z.shape == (7, 720)
        start = 0
        for how, alphas in parts:
            own, part = Weights.of((how, alphas)), slice(start, start := start + len(alphas))
            own_z = run(ops.combine, logits, own, rows[part])
            assert_close(z[part, : own_z.shape[1]], own_z, rtol=1e-6 * neutral, atol=1e-5 * neutral, equal_nan=True)
            assert (z[part, own_z.shape[1] :] == -INF).all()
            sampled = run(ops.combine_sample, logits, own, rows[part], warmth[part], noise[part])
            assert_same_draws(sampled, type(sampled)(tokens[part], logprobs[part]))
            own_scored = run(ops.combine_logprob, logits, own, targets, None, True)
            assert_same_scores(own_scored, type(scored)(*(one[part] for one in scored)), 4e-6)
            assert_close(own_scored.log_z, scored.log_z[part], rtol=1e-5, atol=2e-5)

    @pytest.mark.parametrize("how", [RATIO, COMBINATIONS["neutral cutoff"]], ids=["ratio", "neutral cutoff"])
    def test_a_grid_in_one_launch_equals_its_points(self, ops: ModuleType, how: Combination) -> None:
        """Every (point, row) pair is an output of `combine` and `combine_sample`."""
        logits, alphas = make_members(3, 2, (1999, 2003), (BF16, FP32)), [0.0, 0.4, 0.8, 1.7]
        pairs = Weights.of((how, [alpha for alpha in alphas for _ in range(2)]))
        rows, noise = torch.arange(8, dtype=torch.int32) % 2, make_noise(8)
        warmth = torch.tensor([1.0, 0.0, 0.7, 1.0, 2.0, 0.0, 1.0, 1.0])
        z = run(ops.combine, logits, pairs, rows)
        sampled = run(ops.combine_sample, logits, pairs, rows, warmth, noise)
        for k, alpha in enumerate(alphas):
            one, part = Weights.of((how, alpha)), slice(2 * k, 2 * k + 2)
            assert torch.equal(z[part], run(ops.combine, logits, one, None))
            alone = run(ops.combine_sample, logits, one, None, warmth[part], noise[part])
            assert_same_draws(alone, type(sampled)(*(found[part] for found in sampled)))

    @pytest.mark.parametrize("how", [RATIO, COMBINATIONS["neutral cutoff"]], ids=["ratio", "neutral cutoff"])
    @pytest.mark.parametrize("grid", GRIDS)
    def test_log_probs_of_a_grid_equal_its_points(self, ops: ModuleType, grid: str, how: Combination) -> None:
        logits = make_members(3, 2, (1999, 2003), (BF16, FP32))
        targets = near_the_top(logits, how)
        weights = Weights.of((how, GRIDS[grid]))
        assert_scored(ops, logits, weights, targets, EVEN_TOL)
        logprobs, greedy, _ = run(ops.combine_logprob, logits, weights, targets, None, False)
        for k in range(0, len(weights), 4):
            one = run(ops.combine_logprob, logits, Weights.of((how, GRIDS[grid][k])), targets, None, False)
            assert_close(logprobs[k], one.logprobs[0], rtol=EVEN_TOL, atol=EVEN_TOL)
            assert torch.equal(greedy[k], one.greedy[0])

    @pytest.mark.parametrize("scale", [1.0, 10.0, 60.0, 1000.0])
    def test_a_grid_over_logits_that_underflow(self, ops: ModuleType, scale: float) -> None:
        """A token that starts below what exp can hold, and becomes the best one, is not lost."""
        generator = torch.Generator().manual_seed(3)
        logits = [scale * torch.randn(4, 257, generator=generator) for _ in range(3)]
        weights = Weights.of((RATIO, torch.linspace(0, 3, 16)))
        best = torch.stack([reference.combine(logits, Weights.of((RATIO, a))).argmax(-1) for a in (0.0, 1.0, 3.0)])
        for targets in (torch.arange(4), *best):  # the best somewhere, and not everywhere
            assert_scored(ops, logits, weights, targets, EVEN_TOL)

    @pytest.mark.parametrize("target", range(3))
    def test_a_grid_whose_best_token_changes(self, ops: ModuleType, target: int) -> None:
        rising = [torch.tensor([[0.0, -200.0, -400.0]]), torch.tensor([[0.0, 300.0, 450.0]])]
        weights = Weights.of((Combination((1, 0), (0, 1)), torch.linspace(0, 1, 11)))
        assert_scored(ops, rising, weights, torch.tensor([target]), EVEN_TOL)

    def test_a_grid_that_overflows(self, ops: ModuleType) -> None:
        logits = [torch.tensor([[0.0, 5.0, 0.0, 1.0]]), torch.tensor([[3.0, 1.0, -1.0, 3.0]])]
        weights = Weights.of((Combination((1, 0), (0, 1)), [0.0, 1e38, 2e38, 3e38]))
        for target in range(4):
            given = logits, weights, torch.tensor([target]), None, False
            assert_same_scores(run(ops.combine_logprob, *given), reference.combine_logprob(*given))

    def test_log_z_is_zero_where_members_agree(self, ops: ModuleType) -> None:
        """Equal members agree at every α; at α = 0 the anchor stands alone."""
        logits, targets = make_members(3, 2, (1999,), (FP32,)), torch.tensor([0, 98])
        for (how, _), neutral in itertools.product(rules()[:2], (False, True)):
            how = Combination(how.constant, how.slope, neutral=neutral, anchor=how.anchor)
            alone = run(ops.combine_logprob, logits, Weights.of((how, 0.0)), targets, None, True)
            equal = run(ops.combine_logprob, logits[:1] * 3, Weights.of((how, [0.0, 0.5, 1.0])), targets, None, True)
            for log_z in (alone.log_z, equal.log_z):
                assert log_z.abs().max().item() < 2e-5, log_z

    # -- shapes and layouts -------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("how", [RATIO, COMBINATIONS["neutral cutoff"]], ids=["ratio", "neutral cutoff"])
    def test_positions_are_rows(self, ops: ModuleType, how: Combination) -> None:
        """(rows, positions, V) as `logits_to_keep` leaves it: a slice that no view can flatten."""
        logits = [z.view(2, 3, -1)[:, 1:] for z in make_members(3, 6, (515, 512), (BF16, FP32))]
        weights, flat = Weights.of((how, [0.5, 2.0, 0.0, 1.0])), [z.reshape(4, -1) for z in logits]
        actual = run(ops.combine, logits, weights, None)
        assert actual.is_contiguous()
        assert_close(actual, reference.combine(flat, weights))
        for rows in (None, torch.tensor([3, 1, 1, 0], dtype=torch.int32)):
            warmth, targets = (torch.ones(1), make_noise(4)), torch.tensor([0, 1, 98, 5])
            assert torch.equal(run(ops.combine, logits, weights, rows), run(ops.combine, flat, weights, rows))
            actual = run(ops.combine_sample, logits, weights, rows, *warmth)
            assert_same_draws(actual, reference.combine_sample(flat, weights, rows, *warmth))
            actual = run(ops.combine_logprob, logits, weights, targets, rows, False)
            assert_same_scores(actual, reference.combine_logprob(flat, weights, targets, rows))

    def test_no_rows_and_no_outputs(self, ops: ModuleType) -> None:
        weights, grid = Weights.of((RATIO, 0.5)), Weights.of((RATIO, [0.0, 1.0]))
        for count, rows in ((0, None), (2, torch.zeros(0, dtype=torch.int32))):
            logits = [torch.zeros(count, 7)] * 3
            assert run(ops.combine, logits, weights, rows).shape == (0, 7)
            for warmth in ((None, None), (torch.ones(1), make_noise(0))):
                tokens, logprobs = run(ops.combine_sample, logits, weights, rows, *warmth)
                assert tokens.shape == logprobs.shape == (0,)
            scored = run(ops.combine_logprob, logits, grid, torch.zeros(0, dtype=torch.int64), rows, True)
            assert scored.logprobs.shape == scored.greedy.shape == scored.log_z.shape == (2, 0)

    def test_a_target_out_of_range_is_not_read(self, ops: ModuleType) -> None:
        """The dispatcher refuses it where it can; the kernel must not touch memory for it even so."""
        for target, alphas in itertools.product((-1, 64, 2**40), ([0.0], [0.0, 0.5, 1.0])):
            targets = torch.tensor([target, 1])
            given = [torch.zeros(2, 64)] * 3, Weights.of((RATIO, alphas)), targets, None, False
            logprobs, greedy, _ = run(ops.combine_logprob, *given)
            assert logprobs[:, 0].isnan().all()
            assert logprobs[:, 1].tolist() == pytest.approx([-math.log(64)] * len(alphas))
            assert not greedy[:, 0].any()

    def test_results_are_the_callers(self, ops: ModuleType) -> None:
        """A second call with the same shapes does not write where the results of the first are."""
        first, second = make_members(3, 4, (515,), (FP32,)), [torch.zeros(4, 515)] * 3
        weights, noise, targets = Weights.of((RATIO, 0.5)), make_noise(4), torch.tensor([0, 1, 98, 5])
        for operation, *others in (
            (ops.combine, None),
            (ops.combine_sample, None, torch.ones(1), noise),
            (ops.combine_logprob, targets, None, True),
        ):
            found = [operation(*map(to_device, (given, weights, *others))) for given in (first, second)]
            kept, again = ([one] if isinstance(one, Tensor) else one for one in found)
            for one, other in zip(kept, again, strict=True):
                assert one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()

    @settings(
        max_examples=40,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.differing_executors],
    )
    @given(case=st.data())
    def test_any_layout_of_rows(self, ops: ModuleType, case: st.DataObject) -> None:
        """Members whose rows are views of every kind and start at every alignment."""
        rows, num = case.draw(st.integers(1, 3)), case.draw(st.integers(1, 4))
        generator = torch.Generator().manual_seed(case.draw(st.integers(0, 1000)))
        logits = []
        for _ in range(num):
            width, shift, gap = (case.draw(st.integers(*bounds)) for bounds in ((1, 150), (0, 9), (0, 9)))
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
        numbers = st.sampled_from([0.0, 1.0, -1.0, 0.5])
        constant, slope = (tuple(case.draw(numbers) for _ in range(num)) for _ in range(2))
        anchor, neutral = case.draw(st.integers(0, num - 1)), case.draw(st.booleans())
        how = Combination(constant, slope, case.draw(st.sampled_from([None, 9])), neutral, anchor=anchor)
        index = case.draw(st.none() | st.lists(st.integers(0, rows - 1), min_size=1, max_size=4))
        chosen, outputs = (None, rows) if index is None else (torch.tensor(index, dtype=torch.int32), len(index))
        weights = Weights.of((how, [case.draw(st.sampled_from([0.0, 0.5, 3.0, -1.0])) for _ in range(outputs)]))
        before = [z.clone() for z in logits]
        expected = reference.combine(logits, weights, chosen)
        assert_close(run(ops.combine, logits, weights, chosen), expected, rtol=1e-6, atol=1e-6)
        given = logits, weights, chosen, torch.ones(1), make_noise(outputs)
        actual, expected = run(ops.combine_sample, *given), reference.combine_sample(*given)
        assert torch.equal(actual.tokens, expected.tokens)
        assert_close(actual.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5)
        grid = Weights.of((how, case.draw(st.sampled_from([[0.0, 0.5, 1.0], [0.5, 0.0, 3.0]]))))
        targets = torch.randint(0, logits[anchor].shape[-1], (outputs,), generator=generator)
        actual = run(ops.combine_logprob, logits, grid, targets, chosen, False)
        assert_same_scores(actual, reference.combine_logprob(logits, grid, targets, chosen), 1e-5)
        for z, old in zip(logits, before, strict=True):
            assert torch.equal(z, old)  # members are not written to
