"""The texts that a tokenizer cuts behind one of its tokens, asked for in the tokens of another."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from helpers.text_cases import KINDS, TEXTS
from helpers.tokenizer_cases import make_trained_tokenizer

from ensembler.tokenization.reading import plain_ids, read_writer
from ensembler.tokenization.token_cut import TokenCut


@pytest.mark.parametrize("kinds", KINDS)
def test_the_kept_share_is_that_of_the_tokens_one_by_one(kinds: tuple[str, str, str]) -> None:
    anchor, other = (read_writer("anchor", make_trained_tokenizer(kind, TEXTS, vocab_size=900)) for kind in kinds[:2])
    tokens = other.tokens
    chosen, generator = random.Random(0), np.random.default_rng(0)
    for token in chosen.sample(sorted(anchor.tokens.texts), 60):
        cut = TokenCut(anchor, token)
        sums = np.concatenate([[0.0], np.cumsum(generator.dirichlet(np.full(len(tokens), 0.1)))])
        prefix = chosen.choice(["", " ", "t", cut.text[-1:].decode(errors="ignore")]).encode()
        first, last = tokens.starting(prefix)
        longer = [place for place in range(first, last) if len(tokens.spelled[place]) > len(prefix)]
        kept = [place for place in longer if anchor.cuts_behind(cut.text, tokens.spelled[place][len(prefix) :])]
        truth = sum(sums[place + 1] - sums[place] for place in kept)
        low, undecided = cut.kept(tokens, sums, first, last, len(prefix))
        assert low - 1e-12 <= truth <= low + undecided + 1e-12
        assert undecided <= 0.15 * (sums[last] - sums[first])


def test_behind_a_space_by_itself_stands_what_has_no_space_before_it() -> None:
    tokenizer = make_trained_tokenizer("byte-level", TEXTS, vocab_size=900)
    writer = read_writer("anchor", tokenizer)
    (space,) = plain_ids(tokenizer, " ")
    assert not TokenCut(writer, space).allows(plain_ids(tokenizer, "the")[0])
    assert not writer.cuts_behind(b" ", b"the")
    assert writer.cuts_behind(b" ", b" the")
    assert writer.cuts_behind(b"x", b" the")


@pytest.mark.parametrize("kind", sorted({kind for kinds in KINDS for kind in kinds[:2]}))
def test_tokens_of_real_text_leave_each_other(kind: str) -> None:
    """Along the tokenizer's own writing, every token is cut before the next, and may stand before it."""
    tokenizer = make_trained_tokenizer(kind, TEXTS, vocab_size=900)
    writer = read_writer("anchor", tokenizer)
    for text in TEXTS[:-1]:
        ids = writer.encode(text.encode()) or []
        assert ids
        for one, two in pairwise(ids):
            assert TokenCut(writer, one).allows(two), (writer.tokens.texts[one], writer.tokens.texts[two])
