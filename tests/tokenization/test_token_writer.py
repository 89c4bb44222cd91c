"""Our own writing of text in tokens is the tokenizer's, and its stable tokens stay whatever follows."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from helpers.tokenizer_cases import make_byte_tokenizer, make_spaced_tokenizer, make_trained_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import ensembler
from ensembler.errors import VocabularyError
from ensembler.tokenization.merges import merge
from ensembler.tokenization.reading import PROBES, plain_ids, read_writer
from ensembler.tokenization.stable_tokens import stable_tokens
from ensembler.tokenization.token_writer import TokenWriter, joined_bytes, split_where_apart

ROOT = Path(ensembler.__file__).parents[1]
TEXTS = (*PROBES, (ROOT / "README.md").read_text(encoding="utf-8"), (ROOT / "ensembler/modeling.py").read_text())
KINDS = ("byte-level", "byte-level, takes whole", "spaces", "spaces with a prefix", "added tokens")


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return make_trained_tokenizer(request.param, TEXTS)


@pytest.fixture(scope="module")
def writer(tokenizer: Any) -> TokenWriter:
    return read_writer("target_pt", tokenizer)


def spelled(writer: TokenWriter, ids: list[int]) -> bytes:
    return b"".join(writer.tokens.texts[token] for token in ids)


def random_parts(num: int, longest: int) -> list[str]:
    chosen = random.Random(num)
    found = []
    for _ in range(num):
        text = chosen.choice(TEXTS)
        start = chosen.randrange(len(text))
        found.append(text[start : start + chosen.randrange(1, longest)])
    return found


def test_tokens_are_those_of_the_tokenizer(tokenizer: Any, writer: TokenWriter) -> None:
    for text in random_parts(1000, 80):
        ids = plain_ids(tokenizer, text)
        assert spelled(writer, ids).endswith(text.encode())
        assert writer.encode(spelled(writer, ids)) == ids, text


def continuations(writer: TokenWriter, text: bytes, chosen: random.Random) -> list[str]:
    """Random ones, and tokens that begin inside of the text."""
    pieces = [b"".join(chosen.choices(writer.tokens.spelled, k=2)) for _ in range(10)]
    for cut in range(1, 8):
        rest = text[len(text) - cut :]
        first, last = writer.tokens.starting(rest)
        pieces += [writer.tokens.spelled[place][len(rest) :] for place in range(first, min(last, first + 40))]
    return [piece.decode() for piece in pieces if piece and is_text(piece)]


def is_text(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_stable_tokens_stay_whatever_follows(tokenizer: Any, writer: TokenWriter) -> None:
    chosen, num, held_back = random.Random(0), 0, 0
    for text in random_parts(400, 40):
        before = spelled(writer, plain_ids(tokenizer, text))
        stable = stable_tokens(writer, before)
        held_back += len(before) - len(spelled(writer, stable))
        for more in continuations(writer, before, chosen):
            ids = plain_ids(tokenizer, text + more)
            assert ids[: len(stable)] == stable, (text, more)
            num += 1
    assert num > 5000
    assert held_back / 400 < 12  # bytes: most of a text is stable


def test_neighbours_are_those_that_the_tokenizer_writes(tokenizer: Any, writer: TokenWriter) -> None:
    """Whatever it does write side by side can follow; what it writes otherwise, alone, cannot."""
    for text in random_parts(300, 60):
        ids = plain_ids(tokenizer, text)
        assert all(writer.can_follow(*pair) for pair in pairwise(ids)), text
    wrong = 0
    for first, second in pairwise(random.Random(1).choices(list(writer.tokens.texts), k=2000)):
        both = writer.tokens.texts[first] + writer.tokens.texts[second]
        if is_text(both) and not writer.can_follow(first, second):
            wrong += 1
            assert writer.encode(both) != [first, second]
    assert wrong > 0


def odd_texts(num: int) -> list[str]:
    """Characters that are written in tokens which end inside of them, beside spaces, digits and others."""
    chosen = random.Random(num)
    odd = "ßÜŁ日本№中é’—🙂½ 中  \n\n1234567890.,'sabc-("
    return ["".join(chosen.choices(odd, k=chosen.randrange(2, 12))) for _ in range(num)]


def test_tokens_follow_each_other_inside_of_characters_too(tokenizer: Any, writer: TokenWriter) -> None:
    """And so does each beginning of what follows, as one question."""
    unknown = tokenizer.unk_token_id
    for text in [*odd_texts(2000), *random_parts(100, 60)]:
        ids = plain_ids(tokenizer, text)
        if unknown in ids:
            continue
        for first, second in pairwise(ids):
            assert writer.can_follow(first, second), (text, writer.tokens.texts[first], writer.tokens.texts[second])
            after = writer.tokens.texts[second]
            assert all(writer.can_go_on(first, after[:num]) for num in range(1, len(after) + 1)), text
            assert all(writer.can_reach(first, after[:num]) for num in range(1, len(after))), text
        whole = spelled(writer, ids)
        first = ids[0]
        rest = whole[len(writer.tokens.texts[first]) :]
        assert all(writer.can_go_on(first, rest[:num]) for num in range(1, len(rest) + 1)), text


def test_tokens_by_their_next_byte(writer: TokenWriter) -> None:
    tokens = writer.tokens
    for start in (b"", b" ", b"e", b"in", b"\xe2\x80", tokens.spelled[7]):
        first, last = tokens.starting(start)
        expected: dict[int, list[int]] = {}
        for place in range(first, last):
            if len(tokens.spelled[place]) > len(start):
                expected.setdefault(tokens.spelled[place][len(start)], []).append(place)
        found = tokens.by_byte(first, last, len(start))
        assert {byte: [*range(low, high)] for byte, low, high in found} == expected


@given(st.lists(st.integers(0, 3), max_size=12), st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=None)
def test_merging_is_one_pair_at_a_time(symbols: list[int], chosen: random.Random) -> None:
    """Against the definition: again and again the leftmost pair of the lowest rank."""
    pairs = [(left, right) for left in range(7) for right in range(7)]
    chosen.shuffle(pairs)
    merges = {pair: (rank, 4 + rank % 3) for rank, pair in enumerate(pairs[:20])}
    merges = {pair: (rank, merged) for pair, (rank, merged) in merges.items()}
    expected = list(symbols)
    for _ in range(50):
        found = [(*merges[pair], at) for at, pair in enumerate(pairwise(expected)) if pair in merges]
        if not found:
            break
        _, merged, at = min(found, key=lambda one: (one[0], one[2]))
        expected[at : at + 2] = [merged]
    assert merge(symbols, merges) == expected


def test_a_token_that_only_spells_a_special_one_is_text() -> None:
    tokenizer = make_byte_tokenizer()
    writer = read_writer("target_pt", tokenizer)
    ids = plain_ids(tokenizer, "<s>")
    assert spelled(writer, ids) == b"<s>"
    assert tokenizer.bos_token_id not in writer.tokens.texts


def test_bytes_that_a_vocabulary_cannot_write() -> None:
    writer = read_writer("target_pt", make_spaced_tokenizer(num_bytes=0))
    assert writer.encode("é".encode()) is None
    assert writer.encode(b"ab") is not None


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: models.Unigram([("a", -1.0)]), "is of the kind Unigram"),
        (lambda: models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"), "is of the kind WordPiece"),
    ],
)
def test_other_kinds_are_refused_by_name(make: Any, said: str) -> None:
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(make()))
    with pytest.raises(VocabularyError, match=said):
        read_writer("target_pt", made)


def test_lower_casing_is_refused_with_the_text_that_it_changes() -> None:
    tokenizer = make_byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(VocabularyError, match=r"source_pt reads .the quick brown.* for .The quick"):
        read_writer("source_pt", tokenizer)


def test_slow_tokenizers_are_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(VocabularyError, match=r"target_pt \(Slow\) is written in Python"):
        read_writer("target_pt", Slow())


def test_a_space_that_is_put_before_a_text_stands_before_its_first_piece_alone() -> None:
    tokenizer = make_byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    writer = read_writer("target_pt", tokenizer)
    ids = plain_ids(tokenizer, "ab c")
    assert spelled(writer, ids) == b" ab c"
    assert writer.encode(b" ab c") == ids
    assert writer.boundaries(b"ab c") == [0, 2, 4]


def test_bytes_that_are_no_character_leave_the_words_around_them_apart(writer: TokenWriter) -> None:
    """All bytes are kept; what stands far behind such bytes is written as without them."""
    valid = b" The quick brown fox jumps over 13 lazy dogs"
    usual = writer.encode(valid)
    assert usual is not None
    for bad in (b"\xff", b"\xe2\x82", b"\x82\x82", b"a \xe2 b\xff\xff"):
        ids = writer.encode(bad + valid + valid)
        assert ids is not None
        assert spelled(writer, ids) == bad + valid + valid
        assert ids[-len(usual) :] == usual
        assert b"".join(writer.pieces(bad + valid)) == bad + valid
        assert writer.boundaries(valid + bad + valid)[:4] == writer.boundaries(valid)[:4]


def test_a_text_is_cut_where_no_token_joins_its_bytes() -> None:
    joined = joined_bytes([b"ab", b" b", b"b ", "é".encode(), b"\xa9a"])
    assert split_where_apart(joined, "ab ba béa") == [b"ab b", b"a", b" b", "éa".encode()]
    assert split_where_apart(joined, "b") == [b"b"]
