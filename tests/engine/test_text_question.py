"""Scores of candidates of which members know more or less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensembler.engine.text_cover import Bounds
from ensembler.engine.text_member import Continuation
from ensembler.engine.text_question import Question, Scores

parts = st.floats(0, 1).map(lambda value: value if value > 1e-6 else 0.0)
shares = st.lists(st.tuples(parts, st.floats(1e-6, 1)), min_size=1, max_size=4)


def scores(slopes: dict[str, float], groups: list[list[str]], num: int) -> Scores:
    return Scores(np.zeros((1, num)), np.zeros(1), {role: np.array([one]) for role, one in slopes.items()}, groups)


@given(shares, shares, st.floats(1e-3, 1))
def test_the_ratio_of_a_pair_lies_between_where_what_is_open_counts_alike(
    ft: list[tuple[float, float]], pt: list[tuple[float, float]], counted: float
) -> None:
    num = min(len(ft), len(pt))
    known = {"source_ft": np.array(ft[:num]), "source_pt": np.array(pt[:num])}
    for role in known:  # of one tree: both are open, or both have a part that is known
        known[role][:, 0] = np.where(known["source_ft"][:, 0] == 0, 0.0, np.maximum(known[role][:, 0], 1e-6))
    found = scores({"source_ft": 1.0, "source_pt": -1.0}, [["source_ft", "source_pt"]], num)
    with np.errstate(divide="ignore"):
        low = {role: np.log(values[:, 0]) for role, values in known.items()}
        high = {role: np.log(values.sum(1)) for role, values in known.items()}
        truth = {role: np.log(values[:, 0] + counted * values[:, 1]) for role, values in known.items()}
    least, most = found.between(low, high)
    score = found.at(truth)
    assert (least - 1e-6 <= score).all()
    assert (score <= most + 1e-6).all()
    assert np.isfinite(most).all()


def test_a_member_alone_is_bounded_by_what_it_knows() -> None:
    """The target of base-change: nothing is known below 0.2, and the second candidate is wholly open."""
    found = scores({"target_pt": 2.0}, [["target_pt"]], 2)
    low, high = np.log([0.2, 1e-300]), np.log([0.5, 0.9])
    low[1] = -np.inf
    least, most = found.between({"target_pt": low}, {"target_pt": high})
    assert least[0] == pytest.approx([2 * np.log(0.2), -np.inf])
    assert most[0] == pytest.approx([2 * np.log(0.5), 2 * np.log(0.9)])


def test_an_undefined_ratio_counts_as_0() -> None:
    found = scores({"source_ft": 1.0, "source_pt": -1.0}, [["source_ft", "source_pt"]], 2)
    none = np.array([-np.inf, -np.inf])
    assert found.at({"source_ft": none, "source_pt": none}).tolist() == [[0.0, 0.0]]
    assert found.at({"source_ft": none, "source_pt": np.zeros(2)}).tolist() == [[-np.inf, -np.inf]]


@dataclass
class Known:
    """A member of which the bounds of each candidate are given: what is certain, what is open, and how much wider."""

    role: str
    numbers: list[tuple[float, float, float]]

    def begun(self, state: Any) -> Bounds:
        return Bounds(1.0)

    def bounds(self, state: Any, one: Continuation) -> Bounds:
        low, part, _ = self.numbers[int(one.text)]
        return Bounds(low, {(1,): part} if part else {})

    def ceiling(self, state: Any, one: Continuation) -> Bounds:
        low, part, wider = self.numbers[int(one.text)]
        return Bounds(undecided=low + part + wider)


numbers = st.lists(st.tuples(parts, parts, parts), min_size=1, max_size=12)


@given(numbers, st.sampled_from([-0.5, 0.5, 1.0]), st.floats(-3, 0))
def test_wide_bounds_leave_the_best_where_it_is(
    numbers: list[tuple[float, float, float]], slope: float, rest: float
) -> None:
    """Of a candidate that keeps them, the highest score is below one that is certain."""

    def asked(groups: list[list[str]]) -> Question:
        found = scores({"target_pt": slope}, groups, len(numbers))
        found = Scores(found.base, np.array([rest]), found.slopes, groups)
        texts = [Continuation(str(at).encode()) for at in range(len(numbers))]
        question = Question({"target_pt": None}, texts, found, is_greedy=True)
        question.update({"target_pt": member}, ["target_pt"])
        return question

    member = Known("target_pt", numbers)
    question = asked([["target_pt"]])
    question.narrow({"target_pt": member}, is_last=True)
    whole = Question(question.states, question.candidates, question.scores, is_greedy=True)
    whole.bounds = {"target_pt": [member.bounds(None, one) for one in whole.candidates]}
    whole.begun = question.begun
    assert question.is_certain == whole.is_certain
    assert question.weights().tolist() == whole.weights().tolist()


def test_what_one_group_forbids_stays_forbidden() -> None:
    found = scores({"source_pt": -1.0, "target_pt": 1.0}, [["source_pt"], ["target_pt"]], 1)
    none = np.array([-np.inf])
    least, most = found.between(
        {"source_pt": none, "target_pt": none}, {"source_pt": np.array([-1.0]), "target_pt": none}
    )
    assert (least.tolist(), most.tolist()) == ([[-np.inf]], [[-np.inf]])
    assert not found.has_wide
