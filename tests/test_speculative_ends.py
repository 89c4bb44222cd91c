"""Where drafted texts end, what a streamer is given, and in which state caches are left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from speculative_cases import assert_drafted, assert_same, drafted, make_tables, make_trio, plain, plain_ids, prompts_of
from tiny import random_ids
from transformers import PreTrainedTokenizerFast, StoppingCriteriaList, TextStreamer
from transformers.generation import StopStringCriteria
from transformers.generation.streamers import BaseStreamer

from ensembler.decoding.prompts import EncodedPrompt
from ensembler.decoding.speculative import SpeculativeDecoder
from ensembler.decoding.texts import DecodingOptions

# -- where texts end --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [3, 8])
def test_an_end_token_in_a_draft_ends_the_text(tokenizer: PreTrainedTokenizerFast, num: int) -> None:
    model, prompts = make_trio(alpha=0.1), prompts_of(6)
    whole = plain(model, tokenizer, prompts, DecodingOptions(max_new_tokens=16), batch_size=6)
    ends = {whole[0][0].ids[4], whole[3][0].ids[7]}
    model.generation_config.eos_token_id = sorted(ends)
    expected = plain(model, tokenizer, prompts, DecodingOptions(max_new_tokens=16), batch_size=6)
    found, _ = drafted(model, tokenizer, prompts, DecodingOptions(max_new_tokens=16), "source_ft", num, batch_size=6)
    assert_same(found, expected)
    assert {sample.finish_reason for (sample,) in found.values()} == {"stop", "length"}


@pytest.mark.parametrize("num", [3, 8])
def test_a_stop_text_within_a_round(tokenizer: PreTrainedTokenizerFast, num: int) -> None:
    model, prompts = make_trio(alpha=0.1), prompts_of(6)
    whole = plain(model, tokenizer, prompts, DecodingOptions(max_new_tokens=16), batch_size=6)
    options = DecodingOptions(max_new_tokens=16, stop=(whole[2][0].text[4:6], whole[4][0].text[7]))
    expected = plain(model, tokenizer, prompts, options, batch_size=6)
    found, _ = drafted(model, tokenizer, prompts, options, "source_ft", num, batch_size=6)
    assert_same(found, expected)
    assert any(sample.finish_reason == "stop" for (sample,) in found.values())
    ids = torch.tensor([prompts[2].ids])
    decoder = SpeculativeDecoder("source_ft", num_positions=num, is_fixed=True)
    stopped = model.generate(
        ids,
        max_new_tokens=16,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([StopStringCriteria(tokenizer, list(options.stop))]),
        custom_generate=decoder,
    )
    assert_drafted(decoder)
    assert stopped.shape[1] == ids.shape[1] + found[2][0].num_tokens  # nothing behind the stop is there


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
    prompts = [EncodedPrompt(0, random_ids(1, model.shortest_context[1] - 6)[0].tolist())]
    options = DecodingOptions(max_new_tokens=50)
    found, _ = drafted(model, tokenizer, prompts, options, "source_ft", 8)
    assert_same(found, plain(model, tokenizer, prompts, options))
    assert found[0][0].num_tokens == 6


# -- streamers and caches ---------------------------------------------------------------------------------------------


class Noted(BaseStreamer):
    """Notes what it is given."""

    def __init__(self) -> None:
        self.values: list[list[int]] = []
        self.num_ends = 0

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value.flatten().tolist())

    def end(self) -> None:
        self.num_ends += 1


@pytest.mark.parametrize("rows", [1, 4])
def test_a_streamer_gets_every_token_once_and_in_order(rows: int) -> None:
    model, ids = make_trio(alpha=0.1), random_ids(rows, 5)
    model.generation_config.eos_token_id = int(plain_ids(model, ids)[0, 11])
    expected, found = Noted(), Noted()
    sequences = plain_ids(model, ids, streamer=expected)
    decoder = SpeculativeDecoder("source_ft", num_positions=4, is_fixed=True, streamer=found)
    assert plain_ids(model, ids, streamer=found, custom_generate=decoder).tolist() == sequences.tolist()
    assert_drafted(decoder)
    assert found.values[1:] == sequences[:, 5:].t().tolist()
    assert (found.values[0], found.num_ends) == (expected.values[0], 1)


def test_a_text_streamer_prints_the_text(tokenizer: PreTrainedTokenizerFast, capsys: Any) -> None:
    model, prompts = make_trio(alpha=0.1), prompts_of(1)
    options = DecodingOptions(max_new_tokens=12)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    found, _ = drafted(model, tokenizer, prompts, options, "source_ft", 5, decoder={"streamer": streamer})
    assert capsys.readouterr().out.rstrip("\n") == found[0][0].text


@pytest.mark.parametrize("num", [3, 8])
def test_a_cache_that_was_given_is_gone_on_with(num: int) -> None:
    """It holds the text but for its last token, as plain decoding leaves it, also where a text ends within a round."""
    model, ids = make_trio(alpha=0.1), random_ids(1, 5)
    model.generation_config.eos_token_id = int(plain_ids(model, ids)[0, 12])
    cache = model.new_cache()
    decoders = [SpeculativeDecoder("source_ft", num_positions=num, is_fixed=True) for _ in range(2)]
    first = plain_ids(model, ids, past_key_values=cache, custom_generate=decoders[0])
    assert set(cache.lengths().values()) == {first.shape[1] - 1}
    longer = torch.cat([first, random_ids(1, 3, seed=8)], dim=1)
    second = plain_ids(model, longer, past_key_values=cache, custom_generate=decoders[1])
    for decoder in decoders:
        assert_drafted(decoder)
    assert second.tolist() == plain_ids(model, longer).tolist()


def test_a_prompt_can_be_read_in_chunks() -> None:
    model, ids = make_trio(alpha=0.1), random_ids(3, 11)
    decoder = SpeculativeDecoder("source_ft", num_positions=4, is_fixed=True)
    found = plain_ids(model, ids, custom_generate=decoder, prefill_chunk_size=4)
    assert_drafted(decoder)
    assert found.tolist() == plain_ids(model, ids).tolist()


def test_a_failed_round_leaves_all_members_where_they_were() -> None:
    model, ids = make_tables(vocab_size=16), random_ids(1, 4, vocab_size=16)
    cache, decoder = model.new_cache(), SpeculativeDecoder("source_ft", num_positions=3, is_fixed=True)
    target: Any = model.members["target_pt"]

    def fail_later(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].shape[1] == 3 and target.num_forwards > 2:
            target.fault = ValueError("out of luck")

    hook = target.register_forward_pre_hook(fail_later, with_kwargs=True)
    with pytest.raises(Exception, match="target_pt failed: ValueError: out of luck"):
        plain_ids(model, ids, past_key_values=cache, custom_generate=decoder)
    hook.remove()
    assert decoder.stats.num_rounds > 0
    assert set(cache.lengths().values()) == {4 + decoder.stats.num_round_tokens}
