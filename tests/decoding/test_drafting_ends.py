"""Where drafted texts end, what a streamer is given, and in which state caches are left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.drafting_cases import assert_drafted, assert_same, drafted, fixed, make_trio, plain, plain_ids, prompts_of
from helpers.tiny import random_ids
from transformers import PreTrainedTokenizerFast, StoppingCriteriaList, TextStreamer
from transformers.generation import StopStringCriteria
from transformers.generation.streamers import BaseStreamer

from ensembler.decoding.decoder import Decoder
from ensembler.decoding.decoding_options import DecodingOptions
from ensembler.decoding.prompts import EncodedPrompt

WAYS = pytest.mark.parametrize("way", [{}, {"temperature": 0.8, "seed": 4}], ids=["greedy", "sampled"])

# -- where texts end --------------------------------------------------------------------------------------------------


@WAYS
@pytest.mark.parametrize("num", [3, 8])
def test_an_end_token_in_a_draft_ends_the_text(
    tokenizer: PreTrainedTokenizerFast, num: int, way: dict[str, Any]
) -> None:
    model, prompts, options = make_trio(alpha=0.1), prompts_of(6), DecodingOptions(max_new_tokens=16, **way)
    whole = plain(model, tokenizer, prompts, options, batch_size=6)
    ends = {whole[0][0].ids[4], whole[3][0].ids[7]}
    model.generation_config.eos_token_id = sorted(ends)
    expected = plain(model, tokenizer, prompts, options, batch_size=6)
    found, _ = drafted(model, tokenizer, prompts, options, "source_ft", num, batch_size=6)
    assert_same(found, expected)
    assert {sample.finish_reason for (sample,) in found.values()} == {"stop", "length"}
    for (sample,) in found.values():
        assert ends.isdisjoint(sample.ids[:-1])


@WAYS
@pytest.mark.parametrize("num", [3, 8])
def test_a_stop_text_within_a_round(tokenizer: PreTrainedTokenizerFast, num: int, way: dict[str, Any]) -> None:
    model, prompts = make_trio(alpha=0.1), prompts_of(6)
    whole = plain(model, tokenizer, prompts, DecodingOptions(max_new_tokens=16, **way), batch_size=6)
    options = DecodingOptions(max_new_tokens=16, stop=(whole[2][0].text[4:6], whole[4][0].text[7]), **way)
    expected = plain(model, tokenizer, prompts, options, batch_size=6)
    found, _ = drafted(model, tokenizer, prompts, options, "source_ft", num, batch_size=6)
    assert_same(found, expected)
    stopped = [sample for (sample,) in found.values() if sample.finish_reason == "stop"]
    assert stopped
    assert not any(stop in sample.text for sample in stopped for stop in options.stop)


def test_a_criterion_of_transformers_ends_a_round(tokenizer: PreTrainedTokenizerFast) -> None:
    model, ids = make_trio(alpha=0.1), random_ids(1, 5)
    stop = tokenizer.decode(plain_ids(model, ids)[0, 9:11])
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, [stop])])
    expected = plain_ids(model, ids, stopping_criteria=criteria, use_cache=False)
    assert expected.shape[1] < 5 + 16
    for num in (2, 3, 8):
        decoder = fixed(num=num)
        assert plain_ids(model, ids, stopping_criteria=criteria, custom_generate=decoder).tolist() == expected.tolist()
        assert_drafted(decoder)


@pytest.mark.parametrize("room", [1, 2, 5, 9])
def test_the_greatest_length_ends_a_round(tokenizer: PreTrainedTokenizerFast, room: int) -> None:
    model, prompts = make_trio(alpha=0.1), prompts_of(5)
    options = DecodingOptions(max_new_tokens=room)
    expected = plain(model, tokenizer, prompts, options, batch_size=5)
    found, _ = drafted(model, tokenizer, prompts, options, "source_ft", 8, batch_size=5)
    assert_same(found, expected)
    assert {sample.num_tokens for (sample,) in found.values()} == {room}


def test_a_text_ends_at_the_shortest_context(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_trio(alpha=0.1)
    assert model.shortest_context is not None
    lengths = [model.shortest_context[1] - 6, 3]
    prompts = [EncodedPrompt(number, random_ids(1, length)[0].tolist()) for number, length in enumerate(lengths)]
    options = DecodingOptions(max_new_tokens=30)
    found, _ = drafted(model, tokenizer, prompts, options, "source_ft", 8, batch_size=2)
    assert_same(found, plain(model, tokenizer, prompts, options))
    assert [found[number][0].num_tokens for number in (0, 1)] == [6, 30]


# -- streamers --------------------------------------------------------------------------------------------------------


class Noted(BaseStreamer):
    """Notes what it is given."""

    def __init__(self) -> None:
        self.values: list[list[int]] = []
        self.num_ends = 0

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value.flatten().tolist())

    def end(self) -> None:
        self.num_ends += 1


@pytest.mark.parametrize("sampling", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_streamer_gets_every_token_once_and_in_order(rows: int, sampling: bool) -> None:
    model, ids = make_trio(alpha=0.1), random_ids(rows, 5)
    options = {"do_sample": sampling, "temperature": 0.7} if sampling else {}
    whole = plain_ids(model, ids, **options, custom_generate=Decoder("none", seed=1))
    model.generation_config.eos_token_id = int(whole[0, 11])
    expected, found = Noted(), Noted()
    plainly, decoder = Decoder("none", seed=1, streamer=expected), fixed(num=4, seed=1, streamer=found)
    sequences = plain_ids(model, ids, **options, streamer=expected, custom_generate=plainly)
    drafted_ids = plain_ids(model, ids, **options, streamer=found, custom_generate=decoder)
    assert_drafted(decoder)
    assert drafted_ids.tolist() == sequences.tolist()
    assert found.values[1:] == sequences[:, 5:].t().tolist()
    assert (found.values, found.num_ends) == (expected.values, 1)


def test_a_streamer_does_not_wait_for_the_end() -> None:
    """After each round it has what was accepted."""
    model, ids, rounds = make_trio(alpha=0.1), random_ids(1, 5), []
    model.generation_config.eos_token_id = None
    noted = Noted()
    target = model.members["target_pt"].register_forward_pre_hook(lambda *_: rounds.append(len(noted.values)))
    decoder = fixed(num=4, streamer=noted)
    plain_ids(model, ids, custom_generate=decoder)
    target.remove()
    assert len(rounds) == 1 + decoder.stats.num_rounds + decoder.stats.num_plain_steps
    assert rounds == sorted(set(rounds))  # each time more than before


def test_a_text_streamer_prints_the_text(tokenizer: PreTrainedTokenizerFast, capsys: Any) -> None:
    model, prompts = make_trio(alpha=0.1), prompts_of(1)
    options = DecodingOptions(max_new_tokens=12)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    found, _ = drafted(model, tokenizer, prompts, options, "source_ft", 5, decoder={"streamer": streamer})
    assert capsys.readouterr().out.rstrip("\n") == found[0][0].text


# -- caches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft", ["source_ft", "ngram"])
@pytest.mark.parametrize("num", [3, 8])
def test_a_cache_that_was_given_is_gone_on_with(num: int, draft: str) -> None:
    """It holds the text but for its last token, as plain decoding leaves it, also where a text ends within a round."""
    model, ids = make_trio(alpha=0.1), random_ids(1, 5)
    model.generation_config.eos_token_id = int(plain_ids(model, ids)[0, 12])
    cache = model.member_set.row_cache(1, 5)  # too short: it grows
    decoders = [fixed(draft, num) for _ in range(2)]
    first = plain_ids(model, ids, past_key_values=cache, custom_generate=decoders[0])
    assert cache.lengths == [first.shape[1] - 1]
    longer = torch.cat([first, random_ids(1, 3, seed=8)], dim=1)
    second = plain_ids(model, longer, past_key_values=cache, custom_generate=decoders[1])
    for decoder in decoders:
        assert_drafted(decoder, has_rounds=draft != "ngram")
    assert second.tolist() == plain_ids(model, longer, use_cache=False).tolist()


@pytest.mark.parametrize("is_drafted", [False, True])
def test_rows_of_different_lengths_are_gone_on_with(is_drafted: bool) -> None:
    model, ids = make_trio(alpha=0.1), random_ids(3, 7)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7, [0, 1, 1, 1, 1, 1, 1]])
    ids = ids.masked_fill(mask == 0, 3)
    model.generation_config.eos_token_id = int(plain_ids(model, ids, attention_mask=mask)[1, 12])
    decoders = [fixed(num=4) if is_drafted else Decoder("none") for _ in range(2)]
    output = plain_ids(
        model, ids, attention_mask=mask, custom_generate=decoders[0], return_dict_in_generate=True, max_new_tokens=12
    )
    texts = []
    for row, is_seen in zip(output.sequences.tolist(), mask.tolist(), strict=True):
        new = row[7:]
        end = model.generation_config.eos_token_id
        new = new[: new.index(end) + 1] if end in new else new
        texts.append([token for token, seen in zip(row[:7], is_seen, strict=True) if seen] + new)
    assert len(set(map(len, texts))) > 1
    cache = output.past_key_values
    assert cache.lengths[:3] == [len(text) - 1 for text in texts]
    texts = [[*text, 9, 4 + row] for row, text in enumerate(texts)]
    longest = max(map(len, texts))
    longer = torch.tensor([[3] * (longest - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    second = plain_ids(model, longer, attention_mask=mask, past_key_values=cache, custom_generate=decoders[1])
    assert second.tolist() == plain_ids(model, longer, attention_mask=mask, use_cache=False).tolist()
    assert not is_drafted or all(decoder.stats.num_rounds for decoder in decoders)


def test_a_prompt_can_be_read_in_chunks() -> None:
    model, ids = make_trio(alpha=0.1), random_ids(3, 11)
    decoder = fixed(num=4)
    found = plain_ids(model, ids, custom_generate=decoder, prefill_chunk_size=4)
    assert_drafted(decoder)
    assert found.tolist() == plain_ids(model, ids).tolist()
