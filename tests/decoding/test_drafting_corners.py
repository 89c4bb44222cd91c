"""Drafting where something is unusual: a draft without a token, windows, processors with a state, full caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.drafting_cases import (
    assert_drafted,
    assert_same,
    drafted,
    fixed,
    make_tables,
    make_trio,
    plain,
    plain_ids,
    prompts_of,
)
from helpers.tiny import make_model, random_ids
from scipy.stats import chisquare
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, SynthIDTextWatermarkingConfig

from ensembler import EnsembleForCausalLM
from ensembler.decoding.decode_stats import DecodingStats, Meter
from ensembler.decoding.decoder import Decoder
from ensembler.decoding.decoding_options import DecodingOptions
from ensembler.decoding.prompts import EncodedPrompt
from ensembler.decoding.texts import complete_prompts
from ensembler.errors import InputError


class OnlyExtra(LogitsProcessor):
    """Permits the ids that the draft's members lack, and no other."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        permitted = torch.full_like(scores, -torch.inf)
        permitted[:, 66:72] = scores[:, 66:72]
        return permitted


@pytest.mark.parametrize("num", [1, 3])
def test_a_draft_that_is_left_no_token_does_not_decide(num: int) -> None:
    model = make_trio((64, 64, 72), rule="eft", alpha=0.7, outside="neutral")
    model.generation_config.eos_token_id = None
    ids = random_ids(1, 5)
    p = OnlyExtra()(ids, model(ids).logits[:, -1] / 2).softmax(-1)[0, 66:72].detach()
    rows = 3000
    settings: dict[str, Any] = {"do_sample": True, "temperature": 2.0, "top_k": 0}
    settings["logits_processor"] = LogitsProcessorList([OnlyExtra()])
    decoder = fixed(num=num, seed=5)
    texts = plain_ids(model, ids.expand(rows, -1), max_new_tokens=3, **settings, custom_generate=decoder)
    assert decoder.stats.num_accepted == 0
    found = torch.bincount(texts[:, 5] - 66, minlength=6)
    assert chisquare(found.numpy(), (rows * p / p.sum()).double().numpy(), sum_check=False).pvalue > 1e-4
    plain_texts = plain_ids(
        model, ids.expand(rows, -1), max_new_tokens=3, **settings, custom_generate=Decoder("none", seed=5)
    )
    assert torch.equal(texts, plain_texts)


class OneToken(LogitsProcessor):
    """Permits one token to the draft, which lacks the last ids, another to the ensemble."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        is_draft = scores[:, -1] == -torch.inf
        permitted = torch.full_like(scores, -torch.inf)
        permitted[is_draft, 14], permitted[~is_draft, 13] = 0.0, 0.0
        return permitted


def test_a_draft_that_is_never_right() -> None:
    model, decoder = make_trio((64, 64, 72), rule="eft", alpha=0.7, outside="neutral"), fixed()
    processors = LogitsProcessorList([OneToken()])
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": True, "logits_processor": processors}
    texts = plain_ids(model, random_ids(2, 3), **settings, custom_generate=decoder)
    assert (texts[:, 3:] == 13).all()
    assert (decoder.stats.num_rounds, decoder.stats.num_accepted) == (4, 0)  # the last token is a plain step
    assert decoder.stats.num_plain_steps == 1


@pytest.mark.parametrize("draft", ["source_ft", "ngram"])
@pytest.mark.parametrize("window", [3, 6, 24, 28])
def test_rows_that_end_apart_within_and_beyond_a_window(draft: str, window: int) -> None:
    """Of a text of 24 tokens; rejected drafts that stood in the window leave it whole."""
    num_rounds = 0
    for seed in range(5):
        members = {
            "source_ft": make_model("llama", seed + 1),
            "source_pt": make_model("llama", seed + 2),
            "target_pt": make_model("mistral", seed + 1, sliding_window=window, num_layers=4),
        }
        model = EnsembleForCausalLM.from_members(alpha=0.1 if seed % 2 else 0.3, members=members)
        model.generation_config.eos_token_id = None
        ids = random_ids(4, 4, seed=seed)
        longest = plain_ids(model, ids, max_new_tokens=20)
        model.generation_config.eos_token_id = int(longest[seed % 4, 13])
        expected = plain_ids(model, ids, max_new_tokens=20, use_cache=False)
        decoder = fixed(draft, 8)
        found = plain_ids(model, ids, max_new_tokens=20, custom_generate=decoder)
        assert found.tolist() == expected.tolist()
        assert_drafted(decoder, has_rounds=False)
        num_rounds += decoder.stats.num_rounds
    assert num_rounds > 3


def test_without_a_seed_each_call_draws_from_the_generator() -> None:
    model = make_trio(alpha=0.2)
    decoder = Decoder("source_ft")

    def draw(seed: int) -> list[int]:
        torch.manual_seed(seed)
        ids = plain_ids(model, random_ids(1, 5), max_new_tokens=8, do_sample=True, top_k=0, custom_generate=decoder)
        found: list[int] = ids[0].tolist()
        return found

    texts = [draw(seed) for seed in range(5)]
    assert len({tuple(text) for text in texts}) > 2
    plain_ids(model, random_ids(1, 5), max_new_tokens=2, do_sample=True, custom_generate=decoder)
    assert draw(3) == texts[3]


@pytest.mark.parametrize("rows", [1, 3])
def test_a_processor_with_a_state_is_decoded_plainly(rows: int) -> None:
    model = make_trio(alpha=0.2)
    marks = SynthIDTextWatermarkingConfig(keys=[654, 400, 836], ngram_len=3, context_history_size=16)
    options = {"max_new_tokens": 8, "watermarking_config": marks}
    decoder = fixed()
    found = plain_ids(model, random_ids(rows, 5), **options, custom_generate=decoder)
    assert found.tolist() == plain_ids(model, random_ids(rows, 5), **options, use_cache=False).tolist()
    assert (decoder.stats.draft, decoder.stats.num_rounds) == (None, 0)
    assert decoder.stats.by_transformers == {
        "SynthIDTextWatermarkLogitsProcessor knows texts by their place in the batch, or keeps a state of its own": 1
    }


@pytest.mark.parametrize("held", [3, 6])
def test_a_cache_that_holds_the_prompt_is_gone_on_with(held: int) -> None:
    """A part of it, or all: the last token is read again then."""
    model, ids = make_trio(alpha=0.2), random_ids(1, 6)
    expected = plain_ids(model, ids, max_new_tokens=8)
    first = plain_ids(model, ids[:, :held], max_new_tokens=3, return_dict_in_generate=True)
    cache, decoder = first.past_key_values, fixed()
    cache.lengths = [held]  # what was decoded behind it counts for nothing
    found = plain_ids(model, ids, max_new_tokens=8, past_key_values=cache, custom_generate=decoder)
    assert found.tolist() == expected.tolist()
    assert_drafted(decoder)


def test_alphas_that_do_not_fit_the_batch_are_refused() -> None:
    model = make_trio()
    model.alpha = torch.tensor([0.1, 0.2, 0.3])
    for decoder in (fixed(), Decoder("none")):
        with pytest.raises(InputError, match="alpha has 3 values for 4 rows"):
            plain_ids(model, random_ids(4, 5), max_new_tokens=4, custom_generate=decoder)


@pytest.mark.parametrize("draft", ["source_ft", "ngram"])
def test_samples_of_a_prompt_part_within_a_round(tokenizer: Any, draft: str) -> None:
    """They share a row, and its drafts, as long as they agree."""
    model, prompts = make_tables(vocab_size=64, distance=0.3), prompts_of(5)
    options = DecodingOptions(max_new_tokens=20, temperature=0.2, seed=3, num_return_sequences=12)
    expected = plain(model, tokenizer, prompts, options, batch_size=2)
    found, decoder = drafted(model, tokenizer, prompts, options, draft, 5, batch_size=3)
    assert_same(found, expected)
    assert decoder.stats.num_accepted > 5
    starts, texts = ({tuple(sample.ids[:num]) for sample in found[0]} for num in (5, 20))
    assert 1 < len(starts) < len(texts)


def test_reading_a_shared_header_is_part_of_what_is_timed(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_trio(alpha=0.2)
    header = random_ids(1, 48, seed=1)[0].tolist()
    prompts = [EncodedPrompt(number, [*header, 5 + number, 9]) for number in range(4)]
    decoder = Decoder("source_ft", meter=Meter(DecodingStats()))
    clock = 0
    original = model.member_set.logits

    def read(step: Any, *others: Any) -> Any:
        nonlocal clock
        clock += step.input_ids.shape[1]
        return original(step, *others)

    model.member_set.logits = read  # type: ignore[method-assign]
    monkeypatch.setattr("ensembler.decoding.decode_stats._now", lambda: float(clock))
    list(complete_prompts(model, tokenizer, prompts, DecodingOptions(max_new_tokens=2), batch_size=2, decoder=decoder))
    assert decoder.stats.seconds == clock  # a second a position
    assert 48 < clock < 2 * 48  # the header was read once
