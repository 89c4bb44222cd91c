"""Speculative decoding gives the texts of plain decoding, token by token, whatever is drafted and by whom."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import make_pair, save_adapter, save_base
from speculative_cases import (
    ROLES,
    assert_drafted,
    assert_same,
    counted,
    drafted,
    make_trio,
    plain,
    plain_ids,
    prompts_of,
)
from tiny import make_model, random_ids
from transformers import PreTrainedTokenizerFast

from ensembler import EnsembleForCausalLM
from ensembler.decoding.batches import make_batches
from ensembler.decoding.prompts import EncodedPrompt, text_ids
from ensembler.decoding.speculative import SpeculativeDecoder
from ensembler.decoding.texts import DecodingOptions
from ensembler.demo import demo_folder

POINTS = [("base-change", 0.5), ("base-change", 1.0), ("eft", 0.7), ("eft", 1.2)]


# -- greedy: the embedded family --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> EnsembleForCausalLM:
    return EnsembleForCausalLM.from_pretrained(demo_folder())


@pytest.mark.parametrize(("rule", "alpha"), POINTS)
def test_greedy_texts_of_the_demo(demo: EnsembleForCausalLM, rule: str, alpha: float) -> None:
    lines = (demo_folder() / "data" / "test.jsonl").read_text("utf-8").splitlines()[:200]
    prompts = [EncodedPrompt(i, text_ids(demo.tokenizer, json.loads(line)["prompt"])) for i, line in enumerate(lines)]
    model = EnsembleForCausalLM.from_members(rule=rule, alpha=alpha, members=dict(demo.members.items()))
    model.generation_config = demo.generation_config
    options = DecodingOptions(max_new_tokens=16)
    expected = plain(model, demo.tokenizer, prompts, options, batch_size=200)
    for num in (1, 3, 8):
        found, decoder = drafted(model, demo.tokenizer, prompts, options, "source_ft", num, batch_size=200)
        assert_same(found, expected)
        assert decoder.stats.plain_reason is None
        assert (decoder.stats.num_rounds > 0) == (num > 1)
        if num > 1:
            assert 0.1 < decoder.stats.num_accepted / decoder.stats.num_drafted < 1  # both sides are seen


# -- greedy: random members -------------------------------------------------------------------------------------------

WIDTHS = {"same": (64, 64, 64), "wide anchor": (72, 64, 70), "narrow anchor": (64, 80, 72)}


@pytest.mark.parametrize("outside", ["mask", "neutral"])
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize(("rule", "alpha"), [("base-change", 0.2), ("eft", 0.9)])
def test_greedy_texts_of_random_members(
    tokenizer: PreTrainedTokenizerFast, rule: str, alpha: float, widths: str, outside: str
) -> None:
    model, prompts = make_trio(WIDTHS[widths], rule=rule, alpha=alpha, outside=outside), prompts_of(7)
    options = DecodingOptions(max_new_tokens=14, repetition_penalty=1.1)
    expected = plain(model, tokenizer, prompts, options, batch_size=4)
    ways = [("source_ft", 1), ("source_ft", 3), ("source_ft", 8), ("source_ft", None)]
    for draft, num in [*ways, ("source_pt", 3), ("target_pt", 8)]:
        found, _ = drafted(model, tokenizer, prompts, options, draft, num, batch_size=4)
        assert_same(found, expected)


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize(("rule", "alpha"), [("base-change", 0.2), ("eft", 0.9)])
def test_greedy_texts_that_repeat_themselves(
    tokenizer: PreTrainedTokenizerFast, rule: str, alpha: float, widths: str
) -> None:
    model, prompts = make_trio(WIDTHS[widths], rule=rule, alpha=alpha), prompts_of(7)
    model.generation_config.eos_token_id = None  # long texts go round in circles
    options = DecodingOptions(max_new_tokens=60)
    expected = plain(model, tokenizer, prompts, options, batch_size=4)
    for num in (3, 8):
        found, decoder = drafted(model, tokenizer, prompts, options, "ngram", num, batch_size=4)
        assert_same(found, expected)
        assert 0 < decoder.stats.num_accepted < decoder.stats.num_drafted  # both sides are seen


MEMBERS = {
    ("base-change", 0.1): [("llama", 16, 72), ("qwen2", 24, 64), ("gpt2", 32, 70)],
    ("base-change", 0.6): [("gpt_neox", 16, 64), ("bloom", 32, 80), ("opt", 16, 72)],
    ("eft", 0.8): [("gemma", 24, 64), ("llama", 16, 64), ("gpt_neox", 32, 66)],
    ("eft", 1.2): [("opt", 16, 70), ("gpt2", 24, 70), ("qwen2", 16, 64)],
}  # family, hidden size and vocabulary of source FT, source PT, target PT


@pytest.mark.parametrize(("rule", "alpha"), MEMBERS)
def test_greedy_texts_of_random_members_of_many_families(
    tokenizer: PreTrainedTokenizerFast, rule: str, alpha: float
) -> None:
    """200 prompts of 1 to 24 tokens, in batches whose rows are padded."""
    made = (
        make_model(family, seed, hidden_size=hidden, vocab_size=vocab, num_layers=1 + seed % 2)
        for seed, (family, hidden, vocab) in enumerate(MEMBERS[rule, alpha], 11)
    )
    model = EnsembleForCausalLM.from_members(rule=rule, alpha=alpha, members=dict(zip(ROLES, made, strict=True)))
    prompts, options = prompts_of(200, longest=24), DecodingOptions(max_new_tokens=20)
    batches = make_batches(model, prompts, 25, 20)
    assert all(len(batch) == 25 for batch in batches)
    assert sum(len({len(prompt.ids) for prompt in batch}) > 1 for batch in batches) > 5  # rows are padded
    expected = plain(model, tokenizer, prompts, options, batch_size=25)
    assert len({tuple(sample.ids) for (sample,) in expected.values()}) > 150
    for num in (1, 3, 8):
        found, decoder = drafted(model, tokenizer, prompts, options, "source_ft", num, batch_size=25)
        assert_same(found, expected)
        assert num == 1 or 0 < decoder.stats.num_accepted < decoder.stats.num_drafted  # both sides are seen


@pytest.mark.parametrize("family", ["bloom", "opt", "gpt_neox", "gemma", "mistral"])
def test_families_whose_positions_differ(tokenizer: PreTrainedTokenizerFast, family: str) -> None:
    """Rows that are shifted keep their positions, in families that take them and in those that count the mask."""
    settings = {"sliding_window": 64} if family == "mistral" else {}
    members = dict(zip(ROLES, (make_model(family, seed, **settings) for seed in (1, 2, 3)), strict=True))
    model = EnsembleForCausalLM.from_members(alpha=0.15, members=members)
    prompts, options = prompts_of(6), DecodingOptions(max_new_tokens=20)
    expected = plain(model, tokenizer, prompts, options, batch_size=6)
    found, decoder = drafted(model, tokenizer, prompts, options, "source_ft", 4, batch_size=6)
    assert_same(found, expected)
    assert decoder.stats.num_accepted > 10
    assert decoder.stats.num_accepted < decoder.stats.num_drafted


@pytest.mark.parametrize("batch_size", [1, 5])
def test_prompts_behind_one_header(tokenizer: PreTrainedTokenizerFast, batch_size: int) -> None:
    """What all rows begin with is read once; rounds go on in the cache that holds it."""
    header = random_ids(1, 40, seed=1)[0].tolist()
    model, options = make_trio(alpha=0.15), DecodingOptions(max_new_tokens=16)
    prompts = [EncodedPrompt(prompt.number, header + prompt.ids) for prompt in prompts_of(15)]
    expected = plain(model, tokenizer, prompts, options, batch_size=batch_size, share_headers=False)
    with counted(model) as calls:
        found, decoder = drafted(model, tokenizer, prompts, options, "source_ft", 4, batch_size=batch_size)
    assert_same(found, expected)
    assert sum(length > 9 for length in calls[("target_pt",)].lengths) == 1  # the header
    assert 0 < decoder.stats.num_accepted < decoder.stats.num_drafted


@pytest.mark.parametrize("rule", ["base-change", "eft"])
def test_members_on_one_backbone_draft_together(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, rule: str) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    model = make_pair(base, adapter, make_model("gpt2", 3), rule=rule, alpha=0.2).shared
    prompts, options = prompts_of(7), DecodingOptions(max_new_tokens=14)
    expected = plain(model, tokenizer, prompts, options, batch_size=7)
    for num in (1, 3, 8):
        found, decoder = drafted(model, tokenizer, prompts, options, "source_pt", num, batch_size=7)
        assert_same(found, expected)
        assert decoder.stats.draft == "source_ft+source_pt"


def test_an_alpha_for_each_row(tokenizer: PreTrainedTokenizerFast) -> None:
    model, ids = make_trio(), random_ids(4, 5)
    model.generation_config.eos_token_id = int(plain_ids(model, ids)[1, 9])  # some rows leave the batch early
    model.alpha = torch.tensor([0.0, 0.2, 0.5, 1.0])
    decoder = SpeculativeDecoder("source_ft", num_positions=4, is_fixed=True)
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False}
    found = model.generate(ids, **options, custom_generate=decoder)
    assert_drafted(decoder)
    assert found.tolist() == model.generate(ids, **options).tolist()
