"""Texts of answers: prompt and text are the whole text, in one piece and streamed; stop texts; begin and end tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.tiny import TableModel, make_tokenizer
from helpers.tokenizer_cases import make_byte_tokenizer, make_spaced_tokenizer
from transformers import PreTrainedTokenizerFast

from ensembler import EnsembleForCausalLM
from ensembler.decoding.decoding_options import DecodingOptions
from ensembler.decoding.prompts import EncodedPrompt, Prompt, chat_ids, encode_prompts, text_ids
from ensembler.decoding.samples import AnswerDecoder, TextPrinter, make_sample
from ensembler.decoding.texts import complete_prompts
from ensembler.errors import ConfigError

KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "spaced": make_spaced_tokenizer,
    "spaced, no begin": lambda: make_spaced_tokenizer(begin=False),
    "spaced, end": lambda: make_spaced_tokenizer(end=True),
    "bytes": make_byte_tokenizer,
    "bytes, begin": lambda: make_byte_tokenizer(begin=True),
    "characters": make_tokenizer,
}


def random_text(chance: random.Random, most: int, letters: str = "ab ab  \n7.é東😀") -> str:
    return "".join(chance.choices(letters, k=chance.randint(1, most)))


def streamed(tokenizer: Any, prompt: EncodedPrompt, ids: list[int], capsys: pytest.CaptureFixture[str]) -> str:
    printer = TextPrinter(tokenizer, is_chat=prompt.is_chat)
    printer.put(torch.tensor([prompt.ids]))
    for token in ids:
        printer.put(torch.tensor([token]))
    printer.end()
    assert printer.ids == ids
    return capsys.readouterr().out.removesuffix("\n")


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_text_are_the_whole_text(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, chance = KINDS[kind](), random.Random(kind)
    letters = "ab 7." if kind == "characters" else "ab ab  \n7.é東😀"
    spaces = 0
    for _ in range(150):
        prompt = "x" + random_text(chance, 40, letters)
        answer = random_text(chance, 60, letters)
        # Ids of the answer as they stand behind other text, however the tokenizer would join the two.
        ids = text_ids(tokenizer, f"\n{answer}" if "\n" in letters else answer)
        if "\n" in letters:
            ids = ids[len(text_ids(tokenizer, "\n")) :]
        decoder = AnswerDecoder(tokenizer, text_ids(tokenizer, prompt))
        sample = make_sample(ids, decoder, (), ())
        assert sample.text == answer, (prompt, ids)
        assert streamed(tokenizer, EncodedPrompt(0, text_ids(tokenizer, prompt)), ids, capsys) == answer
        spaces += answer.startswith(" ")
    assert spaces > 10


def test_an_answer_in_a_chat_begins_without_the_space_that_belongs_to_the_template(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for tokenizer, expected in ((make_spaced_tokenizer(), "ab b\n  b"), (make_byte_tokenizer(), " ab b\n  b")):
        prompt = EncodedPrompt(0, text_ids(tokenizer, "x\n"), is_chat=True)
        ids = text_ids(tokenizer, "x\n ab b\n  b")[len(prompt.ids) :]
        decoder = AnswerDecoder(tokenizer, prompt.ids, is_chat=True)
        assert make_sample(ids, decoder, (), ()).text == expected
        assert streamed(tokenizer, prompt, ids, capsys) == expected
        assert make_sample(ids, decoder, (), ("b b",)).text == expected[: expected.index("b b")]
        assert make_sample(ids, decoder, (), (" ab",)).text == ""
        assert AnswerDecoder(tokenizer, [1]).text(ids) == expected  # behind a begin token a text begins too


def test_a_character_whose_bytes_do_not_come_is_shown_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = make_byte_tokenizer()
    ids = text_ids(tokenizer, "a東")[:-1]
    assert streamed(tokenizer, EncodedPrompt(0, text_ids(tokenizer, "x")), ids, capsys) == "a\N{REPLACEMENT CHARACTER}"


def cut_by_hand(pieces: list[tuple[str, bool]], stops: tuple[str, ...]) -> tuple[str, int] | None:
    """The text before the first stop text, and the tokens up to its end: of pieces, each with whether it is special."""
    raw = "".join(piece for piece, _ in pieces)
    cuts = [raw.find(stop) for stop in stops if stop in raw]
    if not cuts:
        return None
    text, position = "", 0
    for piece, is_special in pieces:
        text += "" if is_special else piece[: max(0, min(cuts) - position)]
        position += len(piece)
    ends = (n for n in range(len(pieces) + 1) if any(s in "".join(p for p, _ in pieces[:n]) for s in stops))
    return text, next(ends)


@pytest.mark.parametrize("before", ["ab", ""])
def test_stop_texts_of_any_kind_cut_where_they_are_found(before: str) -> None:
    """Ordinary ones, special tokens, parts of both."""
    tokenizer, chance, found = make_tokenizer(), random.Random(5), 0
    decoder = AnswerDecoder(tokenizer, text_ids(tokenizer, before) if before else [1])
    for _ in range(300):
        ids = chance.choices([1, 3, *range(4, 9)], k=12)
        pieces = [(token, i < 4) for i, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)]
        raw = "".join(piece for piece, _ in pieces)
        start = chance.randrange(len(raw))
        stops = (raw[start : start + chance.randint(1, 6)], "zz")
        expected = cut_by_hand(pieces, stops)
        assert expected is not None
        padded = [*ids[: expected[1]], *[3] * 5]  # as a batch leaves a row that has ended
        for given in (ids, padded):
            sample = make_sample(given, decoder, (), stops)
            assert (sample.text, sample.num_tokens) == expected, (ids, stops)
            assert sample.finish_reason == "stop"
            assert sample.ids == ids[: expected[1]]
        found += any(is_special and piece in stops for piece, is_special in pieces)
    assert found >= 5


@pytest.mark.parametrize("kind", KINDS)
def test_stop_texts_that_an_answer_may_lack_cut_it_like_a_string(kind: str) -> None:
    """Many with a space; behind prompts, and behind nothing, where the tokenizer drops a space."""
    tokenizer, chance = KINDS[kind](), random.Random(f"stops {kind}")
    letters = "ab 7." if kind == "characters" else "ab  \n7.é東😀"
    num_lacking = num_spaces = 0
    for _ in range(300):
        prompt, answer = "x" + random_text(chance, 5, letters), random_text(chance, 8, letters)
        ids = text_ids(tokenizer, f"\n{answer}" if "\n" in letters else answer)
        if "\n" in letters:
            ids = ids[len(text_ids(tokenizer, "\n")) :]
        stops = tuple(chance.choice(["", " "]) + random_text(chance, 2, letters) for _ in range(2))
        cuts = [answer.index(stop) for stop in stops if stop in answer]
        expected = answer[: min(cuts)] if cuts else answer
        for before in (text_ids(tokenizer, prompt), []):
            sample = make_sample(ids, AnswerDecoder(tokenizer, before), (), stops)
            is_dropped = kind.startswith("spaced") and not before and expected.startswith(" ")
            assert sample.text == (expected[1:] if is_dropped else expected), (prompt, answer, stops)
            assert sample.finish_reason == ("stop" if cuts else "length")
            assert cuts or sample.num_tokens == len(ids)
        num_lacking += not cuts
        num_spaces += any(stop[0] == " " and stop[1:] and answer.startswith(stop[1:]) for stop in stops)
    assert num_lacking > 100
    assert num_spaces > 10


def counting(tokenizer: PreTrainedTokenizerFast, tokens: list[str]) -> EnsembleForCausalLM:
    """Members that write these tokens one behind the other, round and round."""
    ids = tokenizer.convert_tokens_to_ids(tokens)
    table = torch.zeros(len(tokenizer), len(tokenizer))
    for token, following in zip(ids, [*ids[1:], ids[0]], strict=True):
        table[token, following] = 9.0
    members = {"reference": TableModel(table), "aligned": TableModel(table)}
    return EnsembleForCausalLM.from_members(rule="realign", alpha=0.5, members=members)


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("stop", ["<|end|>", "d<|end|>", "<|end|>e"])
def test_a_special_token_as_a_stop_text_ends_a_text(num_beams: int, stop: str) -> None:
    """In a batch beside a text that goes on, in the loop and in transformers' own."""
    tokenizer = make_spaced_tokenizer()
    model = counting(tokenizer, [*"bcd", "<|end|>", *"efgh"])
    prompts = [EncodedPrompt(i, tokenizer.convert_tokens_to_ids(list(one))) for i, one in enumerate(("c", "def"))]
    options = DecodingOptions(max_new_tokens=9, stop=(stop,), num_beams=num_beams)
    samples = {one.number: one.samples[0] for one in complete_prompts(model, tokenizer, prompts, options, batch_size=2)}
    num = 2 + stop.endswith("e")
    assert (samples[0].num_tokens, samples[0].finish_reason) == (num, "stop")
    assert samples[0].text == ("" if stop.startswith("d") else "d")
    assert (samples[1].num_tokens, samples[1].finish_reason) == (4 + num, "stop")


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_a_text_have_one_begin_token_and_no_end(kind: str) -> None:
    tokenizer = KINDS[kind]()
    ids = text_ids(tokenizer, "ab 7")
    plain = tokenizer("ab 7", add_special_tokens=False)["input_ids"]
    begin = [1] if kind in ("spaced", "spaced, end", "bytes, begin") else []
    assert ids == [*begin, *plain]
    if kind != "characters":  # whose tokenizer writes no special tokens of a text
        assert text_ids(tokenizer, "<s>ab 7")[:1] == [1]
        assert text_ids(tokenizer, "<s>ab 7").count(1) == 1
        assert text_ids(tokenizer, "ab</s>")[-1] == 2  # the text's own


TEMPLATE = (  # with the tags that transformers adds, and names that are no variables
    "{# a note on short_one #}{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    "{% for i in range(9) %}{% if i %}{% break %}{% endif %}{% endfor %}{% if short == 'word' or short %} 7{% endif %}"
)


def test_variables_of_a_chat_template() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    messages = [{"role": "user", "content": "ab"}]
    assert tokenizer.decode(chat_ids(tokenizer, messages, {"short": True})) == "ab 7"
    assert tokenizer.decode(chat_ids(tokenizer, messages, {"short": False})) == "ab"
    (prompt,) = encode_prompts([Prompt(0, "ab", "it")], tokenizer, chat=True, template_kwargs={"short": True})
    assert (tokenizer.decode(prompt.ids), prompt.is_chat) == ("ab 7", True)
    for name in ("shrot", "sho", "content", "m", "short_one", "note", "word", "range"):
        with pytest.raises(ConfigError, match=f"the chat template has no variable '{name}'; leave it out"):
            chat_ids(tokenizer, messages, {name: True})
    for name in ("messages", "add_generation_prompt"):
        with pytest.raises(ConfigError, match=f"the chat template gets '{name}' from the conversation; leave it out"):
            chat_ids(tokenizer, messages, {name: False})
    tokenizer.chat_template = "{% if short %}"
    with pytest.raises(ConfigError, match="the chat template cannot be read"):
        chat_ids(tokenizer, messages, {"short": True})
