"""Weights of outputs: the numbers of rules at their α, how they are cut into runs, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ensembler_kernels import Combination, Weights, combine
from ensembler_kernels.weights import LONGEST_RUN, Run
from helpers.member_cases import INF, NAN, RATIO, rules
from torch.testing import assert_close


def test_rows_are_constants_slopes_alpha_and_log_of_the_cutoff() -> None:
    cut = Combination((0, 1, 0.5), (1, 0, -1), cutoff=0.1, anchor=1)
    weights = Weights.of((RATIO, [0.5, 2.0]), (cut, 1))
    expected = torch.tensor(
        [[1, 0, 0, 0, 1, -1, 0.5, -INF], [1, 0, 0, 0, 1, -1, 2.0, -INF], [0, 1, 0.5, 1, 0, -1, 1.0, math.log(0.1)]]
    )
    assert_close(weights.table, expected)
    assert len(weights) == 3
    assert weights.alphas.tolist() == [0.5, 2.0, 1.0]
    assert (weights.anchors, weights.cuts) == ((0, 1), True)
    assert weights.width([7, 9, 11]) == 9


@pytest.mark.parametrize(
    ("shared", "neutral", "held", "limits"),
    [(None, False, 5, (5, 5, 5)), (4, False, 4, (4, 4, 4)), (None, True, 7, (7, 5, 7)), (4, True, 7, (7, 5, 7))],
)
def test_ids_that_are_read(shared: int | None, neutral: bool, held: int, limits: tuple[int, ...]) -> None:
    weights = Weights.of((Combination((1, 0, 0), (0, 1, -1), shared, neutral), 0.5))
    assert weights.held_width([7, 5, 9]) == held
    assert weights.limits([7, 5, 9]) == limits
    assert weights.normalises([7, 5, 9]) is neutral
    assert not weights.normalises([4, 4, 4])


def test_runs_split_rules_and_grids() -> None:
    """A run is evenly spaced or has step 0, holds one rule, and is not longer than LONGEST_RUN."""
    parts = [*rules(), (RATIO, [k / 8 for k in range(LONGEST_RUN + 8)]), (RATIO, [2.0, 1.0, 0.0]), (RATIO, [0.5, 0.5])]
    counts, found = [3, 2, 2, LONGEST_RUN, 8, 3, 2], Weights.of(*parts).runs
    assert [run.count for run in found] == counts
    assert [run.first for run in found] == [sum(counts[:k]) for k in range(len(counts))]
    assert [run.step for run in found] == [0.5, pytest.approx(1.2), 1.0, 0.125, 0.125, -1.0, 0.0]
    assert Weights.of((RATIO, [0.0, 0.1, 0.5])).runs == (Run(0, 3, 0.0),)
    assert Weights.of((RATIO, [k / 8 for k in range(LONGEST_RUN + 1)])).runs[1] == Run(LONGEST_RUN, 1, 0.0)


def test_alpha_is_a_number_several_or_a_tensor() -> None:
    for alpha in (0.5, 1, [0.5, 1.0], (0.5,), torch.tensor(0.5), torch.tensor([0.5, 1.0]).double()):
        expected = torch.as_tensor(alpha, dtype=torch.float32).reshape(-1)
        assert torch.equal(Weights.of((RATIO, alpha)).alphas, expected)


def test_a_table_that_is_indexed_is_no_grid() -> None:
    weights = Weights.of((RATIO, [0.0, 0.5, 1.0]))
    taken = weights.replace_table(weights.table[[2, 0]])
    assert taken.alphas.tolist() == [1.0, 0.0]
    assert taken.runs == (Run(0, 1, 0.0), Run(1, 1, 0.0))
    assert taken.anchors == weights.anchors


def test_gradients_reach_alpha() -> None:
    alpha = torch.tensor([0.5, 2.0], requires_grad=True)
    Weights.of((RATIO, alpha)).table.sum().backward()
    assert alpha.grad is not None
    assert alpha.grad.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (NAN, "alphas: expected a finite float32 number, got nan"),
        (1e39, r"alphas: expected a finite float32 number, got 1e\+39"),
        ([0.5, -INF], "alphas: expected a finite float32 number, got -inf"),
        (torch.tensor([0.5, INF]), "alphas: expected finite numbers, got"),
        ([], r"alphas: expected a number, or a grid of shape \(K,\), got none"),
        (torch.zeros(0), r"alphas: expected a number, or a grid of shape \(K,\), got shape \(0,\)"),
        (torch.zeros(2, 1), r"alphas: expected a number, or a grid of shape \(K,\), got shape \(2, 1\)"),
    ],
)
def test_bad_alpha(alpha: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Weights.of((RATIO, alpha))


@pytest.mark.parametrize("other", [{"shared": 5}, {"neutral": True}, {"raw": (False, True, False)}])
def test_rules_that_do_not_agree(other: dict[str, Any]) -> None:
    for how in (Combination(RATIO.constant, RATIO.slope, **other), Combination((1, 0), (0, 1))):
        with pytest.raises(ValueError, match="expected rules for the same members and vocabulary"):
            Weights.of((RATIO, 0.5), (how, 0.5))


def test_bad_tables() -> None:
    weights = Weights.of((RATIO, 0.5))
    for table in (weights.table[0], weights.table[:, 1:], weights.table.double()):
        with pytest.raises(ValueError, match=r"weights: expected float32 \(outputs, 8\), got"):
            weights.replace_table(table)
    with pytest.raises(ValueError, match="weights: expected finite numbers"):
        weights.replace_table(weights.table * NAN)
    with pytest.raises(ValueError, match="expected at least one rule with its alphas, got none"):
        Weights.of()


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"constant": (), "slope": ()}, r"expected one constant and one slope per member, got 0 constants, 0 slopes"),
        ({"constant": (1,), "slope": (1, 2)}, r"got 1 constants, 2 slopes, 1 raw"),
        ({"constant": (1,), "slope": (NAN,)}, r"expected finite constants and slopes"),
        ({"constant": (1,), "slope": (0,), "shared": 0}, r"expected at least 1 shared id, got 0"),
        ({"constant": (1,), "slope": (0,), "cutoff": 1.5}, r"expected a cutoff above 0 and at most 1, got 1.5"),
        ({"constant": (1,), "slope": (0,), "anchor": 1}, r"expected an anchor in \[0, 1\), got 1"),
    ],
)
def test_bad_combination(numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Combination(**numbers)


def test_a_table_is_taken_as_a_kernel_can_read_it() -> None:
    weights = Weights.of((Combination((1, 0), (0, 1)), 0.5))
    assert weights.replace_table(weights.table.expand(3, -1)).table.is_contiguous()
    with pytest.raises(ValueError, match="weights: expected rows on cpu, got meta"):
        weights.replace_table(weights.table.to("meta"))


def test_a_cutoff_in_a_table_of_weights_without_one_does_not_count() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(1, 50, generator=generator) for _ in range(2)]
    plain, cut = (Weights.of((Combination((1, 0), (0, 1), cutoff=cutoff), 0.5)) for cutoff in (None, 0.5))
    for impl in ("reference", "torch"):
        assert combine(logits, plain.replace_table(cut.table), impl=impl).isfinite().all()
        assert not combine(logits, cut, impl=impl).isfinite().all()
