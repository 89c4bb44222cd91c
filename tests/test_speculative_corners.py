"""Drafting where something is unusual: a draft without a token, windows as long as the text, states, full caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from speculative_cases import make_trio, plain_ids
from tiny import make_model, random_ids
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, SynthIDTextWatermarkingConfig

from ensembler import EnsembleForCausalLM
from ensembler.decoding.prompts import EncodedPrompt
from ensembler.decoding.speculative import SpeculativeDecoder
from ensembler.decoding.stats import DecodingStats, Meter
from ensembler.decoding.texts import DecodingOptions, complete_batches
from ensembler.errors import InputError


def fixed(draft: str = "source_ft", num: int = 3, **more: Any) -> SpeculativeDecoder:
    return SpeculativeDecoder(draft, num_positions=num, is_fixed=True, **more)


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
    texts = model.generate(
        ids.expand(rows, -1),
        max_new_tokens=2,
        do_sample=True,
        temperature=2.0,
        top_k=0,
        logits_processor=LogitsProcessorList([OnlyExtra()]),
        custom_generate=fixed(num=num, seed=5),
    )
    found = torch.bincount(texts[:, 5] - 66, minlength=6)
    assert chisquare(found.numpy(), (rows * p / p.sum()).double().numpy(), sum_check=False).pvalue > 1e-4


@pytest.mark.parametrize("draft", ["source_ft", "ngram"])
@pytest.mark.parametrize("slack", [0, 4])
def test_rows_that_end_apart_within_a_window_as_long_as_the_text(draft: str, slack: int) -> None:
    length = 24
    for seed in range(12):
        members = {
            "source_ft": make_model("llama", seed + 1),
            "source_pt": make_model("llama", seed + 2),
            "target_pt": make_model("mistral", seed + 1, sliding_window=length + slack, num_layers=4),
        }
        model = EnsembleForCausalLM.from_members(alpha=0.1 if seed % 2 else 0.3, members=members)
        model.generation_config.eos_token_id = None
        ids = random_ids(4, 4, seed=seed)
        longest = plain_ids(model, ids, max_new_tokens=length - 4)
        model.generation_config.eos_token_id = int(longest[seed % 4, 13])
        expected = plain_ids(model, ids, max_new_tokens=length - 4)
        decoder = fixed(draft, 8)
        found = plain_ids(model, ids, max_new_tokens=length - 4, custom_generate=decoder)
        assert found.tolist() == expected.tolist()
        assert decoder.stats.num_rounds > 0


def test_without_a_seed_each_call_draws_from_the_generator() -> None:
    model = make_trio(alpha=0.2)
    decoder = SpeculativeDecoder("source_ft")

    def draw(seed: int) -> list[int]:
        torch.manual_seed(seed)
        ids = model.generate(random_ids(1, 5), max_new_tokens=8, do_sample=True, top_k=0, custom_generate=decoder)
        found: list[int] = ids[0].tolist()
        return found

    texts = [draw(seed) for seed in range(5)]
    assert len({tuple(text) for text in texts}) > 2
    model.generate(random_ids(1, 5), max_new_tokens=2, do_sample=True, custom_generate=decoder)
    assert draw(3) == texts[3]


@pytest.mark.parametrize("rows", [1, 3])
def test_a_processor_with_a_state_is_decoded_plainly(rows: int) -> None:
    model = make_trio(alpha=0.2)
    marks = SynthIDTextWatermarkingConfig(keys=[654, 400, 836], ngram_len=3, context_history_size=16)
    options = {"max_new_tokens": 8, "do_sample": False, "watermarking_config": marks}
    decoder = fixed()
    found = model.generate(random_ids(rows, 5), **options, custom_generate=decoder)
    assert found.tolist() == model.generate(random_ids(rows, 5), **options).tolist()
    assert decoder.stats.undrafted == {
        "SynthIDTextWatermarkLogitsProcessor knows texts by their place in the batch, or keeps a state of its own": 1
    }


def test_a_cache_that_holds_the_whole_prompt_is_gone_on_with() -> None:
    model = make_trio(alpha=0.2)
    ids = random_ids(1, 6)

    def go_on(**more: Any) -> list[int]:
        cache = model.new_cache()
        model(ids, past_key_values=cache, use_cache=True)
        found: list[int] = plain_ids(model, ids, max_new_tokens=6, past_key_values=cache, **more)[0].tolist()
        return found

    decoder = fixed()
    assert go_on(custom_generate=decoder) == go_on()
    assert decoder.stats.plain_reason == "the cache that was given holds the whole prompt already"


def test_alphas_that_do_not_fit_the_batch_are_refused_as_in_plain_decoding() -> None:
    model = make_trio()
    model.alpha = torch.tensor([0.1, 0.2, 0.3])
    with pytest.raises(InputError, match="alpha has 3 values for 4 rows"):
        plain_ids(model, random_ids(4, 5), max_new_tokens=4, custom_generate=fixed())


def test_reading_a_shared_header_is_part_of_what_is_timed(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_trio(alpha=0.2)
    header = random_ids(1, 48, seed=1)[0].tolist()
    prompts = [EncodedPrompt(number, [*header, 5 + number, 9]) for number in range(4)]
    decoder = SpeculativeDecoder("source_ft", meter=Meter(DecodingStats()), owns_cache=True)
    clock = 0
    original = model.member_logits

    def read(step: Any, cache: Any = None) -> Any:
        nonlocal clock
        clock += step.input_ids.shape[1]
        return original(step, cache)

    model.member_logits = read  # type: ignore[method-assign]
    monkeypatch.setattr("ensembler.decoding.stats._now", lambda: float(clock))
    list(complete_batches(model, tokenizer, prompts, DecodingOptions(max_new_tokens=2), batch_size=2, decoder=decoder))
    assert decoder.stats.seconds == clock  # a second a position
    assert 48 < clock < 2 * 48  # the header was read once
