"""The probability of a text is the sum over all ways to write it: compared with an enumeration of token sequences."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensembler.engine.text_cover import NextTokens, Path, ceiling, cover
from ensembler.tokenization.token_bytes import TokenBytes

ALPHABET = "ab"


def node_of(probabilities: np.ndarray, end: float = 0.0) -> NextTokens:
    sums = np.concatenate([[0.0], np.cumsum(probabilities)])
    with np.errstate(divide="ignore"):
        return NextTokens(np.log(probabilities), sums, end)


@dataclass
class Toy:
    """A member with a random table of next tokens for each path, and the pairs of tokens that its tokenizer writes."""

    tokens: TokenBytes
    seed: int
    pairs: Callable[[int, int], bool]

    def distribution(self, path: Path) -> np.ndarray:
        """The probabilities of all tokens by id, and that of the end as the last."""
        generator = np.random.default_rng([self.seed, *path])
        return generator.dirichlet(np.full(len(self.tokens) + 1, 0.5))

    def node(self, path: Path) -> NextTokens:
        probabilities = self.distribution(path)
        return node_of(probabilities[self.tokens.order], float(probabilities[-1]))

    def can_follow(self, first: int, second: int) -> bool:
        return self.pairs(first, second)

    def can_go_on(self, token: int, text: bytes) -> bool:
        """As of a writer: any token that is part of the text, or that begins with it."""
        first, last = self.tokens.starting(text)
        near = [*range(first, last), *self.tokens.within(text)]
        return any(self.pairs(token, int(self.tokens.order[place])) for place in near)

    def leaves(self, text: bytes) -> bool:
        """Whether another tokenizer cuts before this text."""
        return random.Random(f"{self.seed} {text!r}").random() < 0.7

    def truth(self, text: bytes, path: Path = (), *, ends: bool = False) -> float:
        """The sum over the token sequences that begin with, or spell, the text; each pair but the last is written."""
        probabilities = self.distribution(path)
        if not text:
            return float(probabilities[-1]) if ends else 1.0
        total = 0.0
        for token, spelled in self.tokens.texts.items():
            if spelled.startswith(text) and (not ends or spelled == text):
                rest = 1.0 if not ends else self.truth(b"", (*path, token), ends=True)
                is_last = not ends
            elif text.startswith(spelled):
                if not self.can_go_on(token, text[len(spelled) :]):
                    continue
                rest, is_last = self.truth(text[len(spelled) :], (*path, token), ends=ends), False
            else:
                continue
            if path and not is_last and not self.pairs(path[-1], token):
                continue
            total += float(probabilities[token]) * rest
        return total

    def truth_of_cut(self, text: bytes, path: Path = ()) -> float:
        """The same of texts that the other tokenizer cuts behind `text`; the token that goes beyond it tells."""
        probabilities = self.distribution(path)
        if not text:
            kept = sum(
                float(probabilities[token]) for token, spelled in self.tokens.texts.items() if self.leaves(spelled)
            )
            return kept + float(probabilities[-1])
        total = 0.0
        for token, spelled in self.tokens.texts.items():
            rest = text[len(spelled) :]
            if spelled.startswith(text) and spelled != text:
                total += float(probabilities[token]) * self.leaves(spelled[len(text) :])
            elif text.startswith(spelled) and (not rest or self.can_go_on(token, rest)):
                is_written = not path or self.pairs(path[-1], token)
                total += is_written and float(probabilities[token]) * self.truth_of_cut(rest, (*path, token))
        return total


@dataclass
class Cut:
    """The end of a text, behind which another tokenizer cuts as the toy says."""

    toy: Toy
    text: bytes

    def kept(self, tokens: TokenBytes, sums: np.ndarray, first: int, last: int, start: int) -> tuple[float, float]:
        """By place, one after the other."""
        found = (place for place in range(first, last) if len(tokens.spelled[place]) > start)
        kept = [place for place in found if self.toy.leaves(tokens.spelled[place][start:])]
        return float(sum(sums[place + 1] - sums[place] for place in kept)), 0.0


texts = st.text(ALPHABET, min_size=0, max_size=6)


@st.composite
def toys(draw: st.DrawFn) -> Toy:
    pieces = draw(st.lists(st.text(ALPHABET, min_size=1, max_size=3), min_size=1, max_size=7, unique=True))
    tokens = TokenBytes({token: piece.encode() for token, piece in enumerate(pieces)})
    seed = draw(st.integers(0, 10**6))
    if draw(st.booleans()):
        return Toy(tokens, seed, lambda first, second: True)
    allowed = random.Random(seed).choices([True, False], [3, 1], k=100)
    return Toy(tokens, seed, lambda first, second: allowed[first * 10 + second])


def evaluated(toy: Toy, text: bytes, num: int, *, ends: bool) -> tuple[dict[Path, NextTokens], bool]:
    """The nodes after `num` evaluations, most open mass first, and whether none is open any more."""
    nodes: dict[Path, NextTokens] = {}
    for _ in range(num):
        bounds = cover(nodes, toy.tokens, toy, text, ends=ends)
        if not bounds.open:
            return nodes, True
        path = max(bounds.open, key=bounds.open.__getitem__)
        nodes[path] = toy.node(path)
    return nodes, not cover(nodes, toy.tokens, toy, text, ends=ends).open


@given(toys(), texts, st.booleans())
@settings(max_examples=400, deadline=None)
def test_all_splits_are_the_sum_over_all_token_sequences(toy: Toy, text: str, ends: bool) -> None:
    nodes, is_closed = evaluated(toy, text.encode(), 500, ends=ends)
    bounds = cover(nodes, toy.tokens, toy, text.encode(), ends=ends)
    assert is_closed
    assert bounds.low == pytest.approx(toy.truth(text.encode(), ends=ends), abs=1e-12)


@given(toys(), texts, st.booleans(), st.integers(0, 6))
@settings(max_examples=400, deadline=None)
def test_the_truth_lies_in_every_interval(toy: Toy, text: str, ends: bool, num: int) -> None:
    nodes, _ = evaluated(toy, text.encode(), num, ends=ends)
    bounds = cover(nodes, toy.tokens, toy, text.encode(), ends=ends)
    truth = toy.truth(text.encode(), ends=ends)
    assert bounds.low - 1e-12 <= truth <= bounds.high + 1e-12, (bounds, truth)
    assert bounds.low <= bounds.middle <= bounds.high


@given(toys(), texts, st.integers(0, 200))
@settings(max_examples=400, deadline=None)
def test_a_cut_counts_the_sequences_that_leave_it(toy: Toy, text: str, num: int) -> None:
    """To 1e-12 where no node is open any more; else the truth lies in the interval."""
    cut: Any = Cut(toy, text.encode())
    nodes: dict[Path, NextTokens] = {}
    bounds = cover(nodes, toy.tokens, toy, cut.text, cut=cut)
    for _ in range(num):
        if not bounds.open:
            break
        path = max(bounds.open, key=bounds.open.__getitem__)
        nodes[path] = toy.node(path)
        bounds = cover(nodes, toy.tokens, toy, cut.text, cut=cut)
    truth = toy.truth_of_cut(cut.text)
    assert bounds.low - 1e-12 <= truth <= bounds.high + 1e-12
    if not bounds.open:
        assert bounds.low == pytest.approx(truth, abs=1e-12)


@pytest.mark.parametrize("small", [1e-3, 1e-12, 1e-40])
def test_short_ranges_keep_their_digits_behind_a_large_sum(small: float) -> None:
    tokens = TokenBytes({0: b"a", 1: b"z", 2: b"zz"})
    nodes = {(): node_of(np.array([1 - 2 * small, small, small]))}
    assert cover(nodes, tokens, Toy(tokens, 0, lambda *_: True), b"z").low == pytest.approx(2 * small, rel=1e-4)


@given(toys(), texts, st.booleans(), st.integers(0, 6))
@settings(max_examples=400, deadline=None)
def test_nothing_is_above_the_bound_that_is_found_at_once(toy: Toy, text: str, ends: bool, num: int) -> None:
    nodes, _ = evaluated(toy, text.encode(), num, ends=ends)
    found = ceiling(nodes, toy.tokens, text.encode(), ends=ends)
    cut = None if ends else Cut(toy, text.encode())
    assert found.low == 0
    assert found.high >= toy.truth(text.encode(), ends=ends) - 1e-12
    assert found.high >= cover(nodes, toy.tokens, toy, text.encode(), ends=ends, cut=cut).high - 1e-12


def test_a_path_that_cannot_go_on_to_what_is_told_apart_is_settled() -> None:
    """Behind `a` the tokenizer writes `b` or does not: it has `ab` in one token."""
    tokens = TokenBytes({0: b"a", 1: b"b", 2: b"ab"})
    for joins in (True, False):
        toy = Toy(tokens, 3, lambda first, second, joins=joins: not joins or (first, second) != (0, 1))
        nodes = {(): toy.node(())}
        cut: Any = Cut(toy, b"a")
        in_one = float(toy.distribution(())[2]) * toy.leaves(b"b")
        settled = cover(nodes, tokens, toy, b"a", cut=cut, longer=(b"b",))
        assert settled.low == pytest.approx(in_one + (toy.distribution(())[0] if joins else 0.0))
        assert settled.open == ({} if joins else {(0,): pytest.approx(toy.distribution(())[0])})
        assert list(cover(nodes, tokens, toy, b"a", cut=cut).open) == [(0,)]
