"""Drafting gives the texts of plain decoding, token by token, greedy and sampled, whoever drafts how much."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapter_cases import make_pair, save_adapter, save_base
from helpers.drafting_cases import (
    ROLES,
    assert_drafted,
    assert_same,
    counted,
    drafted,
    fixed,
    make_trio,
    num_texts,
    plain,
    plain_ids,
    prompts_of,
)
from helpers.tiny import make_model, random_ids
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from ensembler import EnsembleForCausalLM
from ensembler.decoding.decoder import Decoder
from ensembler.decoding.decoding_options import DecodingOptions
from ensembler.decoding.prompts import EncodedPrompt, text_ids
from ensembler.decoding.texts import complete_grid
from ensembler.demo import demo_folder
from ensembler.engine.grid import GridPoint

POINTS = [("base-change", 0.5), ("base-change", 1.0), ("eft", 0.7), ("eft", 1.2)]
GREEDY: dict[str, Any] = {}
SAMPLED = {"temperature": 0.9, "seed": 7}
WAYS = pytest.mark.parametrize("way", [GREEDY, SAMPLED], ids=["greedy", "sampled"])


# -- the embedded family ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> EnsembleForCausalLM:
    return EnsembleForCausalLM.from_pretrained(demo_folder())


@pytest.fixture(scope="module")
def demo_prompts(demo: EnsembleForCausalLM) -> list[EncodedPrompt]:
    lines = (demo_folder() / "data" / "test.jsonl").read_text("utf-8").splitlines()[:200]
    return [EncodedPrompt(i, text_ids(demo.tokenizer, json.loads(line)["prompt"])) for i, line in enumerate(lines)]


@WAYS
@pytest.mark.parametrize(("rule", "alpha"), POINTS)
def test_texts_of_the_demo(
    demo: EnsembleForCausalLM, demo_prompts: list[EncodedPrompt], rule: str, alpha: float, way: dict[str, Any]
) -> None:
    """200 prompts at each point."""
    model = EnsembleForCausalLM.from_members(rule=rule, alpha=alpha, members=dict(demo.members.items()))
    model.generation_config = demo.generation_config
    options = DecodingOptions(max_new_tokens=12, **way)
    expected = plain(model, demo.tokenizer, demo_prompts, options, batch_size=200)
    assert num_texts(expected) > 50
    for num, batch_size in ((1, 200), (3, 70), (8, 200)):
        found, decoder = drafted(model, demo.tokenizer, demo_prompts, options, "source_ft", num, batch_size=batch_size)
        assert_same(found, expected)
        if num > 1:
            assert 0.1 < decoder.stats.num_accepted / decoder.stats.num_drafted < 1  # both sides are seen


@WAYS
@pytest.mark.parametrize("draft", ["source_ft", "target_pt", "ngram"])
def test_a_grid_is_drafted_for(
    demo: EnsembleForCausalLM, demo_prompts: list[EncodedPrompt], draft: str, way: dict[str, Any]
) -> None:
    """Points whose texts agree share a row and its drafts, and part within rounds."""
    prompts, options = demo_prompts[:20], DecodingOptions(max_new_tokens=12, **way)
    points = [GridPoint(*point) for point in POINTS]
    decoder = fixed(draft, 4, points=points)
    found = list(complete_grid(demo, demo.tokenizer, prompts, points, options, batch_size=7, decoder=decoder))
    assert_drafted(decoder)
    assert 0 < decoder.stats.num_accepted < decoder.stats.num_drafted
    for point in points:
        model = EnsembleForCausalLM.from_members(rule=point.rule, alpha=point.alpha, members=dict(demo.members.items()))
        model.generation_config = demo.generation_config
        expected = plain(model, demo.tokenizer, prompts, options, batch_size=20)
        assert_same({one.number: one.samples[point] for one in found}, expected)


# -- random members ---------------------------------------------------------------------------------------------------

WIDTHS = {"same": (64, 64, 64), "wide anchor": (72, 64, 70), "narrow anchor": (64, 80, 72)}


@pytest.mark.parametrize("outside", ["mask", "neutral"])
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize(("rule", "alpha"), [("base-change", 0.2), ("eft", 0.9)])
def test_texts_of_random_members(
    tokenizer: PreTrainedTokenizerFast, rule: str, alpha: float, widths: str, outside: str
) -> None:
    model, prompts = make_trio(WIDTHS[widths], rule=rule, alpha=alpha, outside=outside), prompts_of(7)
    ways = [("source_ft", 1), ("source_ft", 3), ("source_pt", 8), ("target_pt", 3), ("auto", None)]
    for way in (GREEDY, SAMPLED):
        options = DecodingOptions(max_new_tokens=10, repetition_penalty=1.1, **way)
        expected = plain(model, tokenizer, prompts, options, batch_size=4)
        for draft, num in ways:
            found, _ = drafted(model, tokenizer, prompts, options, draft, num, batch_size=4)
            assert_same(found, expected)


@WAYS
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize(("rule", "alpha"), [("base-change", 0.2), ("eft", 0.9)])
def test_texts_that_repeat_themselves(
    tokenizer: PreTrainedTokenizerFast, rule: str, alpha: float, widths: str, way: dict[str, Any]
) -> None:
    model, prompts = make_trio(WIDTHS[widths], rule=rule, alpha=alpha), prompts_of(7)
    model.generation_config.eos_token_id = None  # long texts go round in circles
    options = DecodingOptions(max_new_tokens=60, **{**way, **({"temperature": 0.3} if way else {})})
    expected = plain(model, tokenizer, prompts, options, batch_size=4)
    for num in (3, 8):
        found, decoder = drafted(model, tokenizer, prompts, options, "ngram", num, batch_size=4)
        assert_same(found, expected)
        assert 0 < decoder.stats.num_accepted < decoder.stats.num_drafted  # both sides are seen


MEMBERS = {
    ("base-change", 0.1): [("llama", 16, 72), ("qwen2", 24, 64), ("gpt2", 32, 70)],
    ("base-change", 0.6): [("gpt_neox", 16, 64), ("gemma2", 32, 80), ("opt", 16, 72)],
    ("eft", 0.8): [("gemma", 24, 64), ("mistral", 16, 64), ("gpt_neox", 32, 66)],
    ("eft", 1.2): [("opt", 16, 70), ("gpt2", 24, 70), ("mixtral", 16, 64)],
}  # family, hidden size and vocabulary of source FT, source PT, target PT


@WAYS
@pytest.mark.parametrize(("rule", "alpha"), MEMBERS)
def test_texts_of_random_members_of_many_families(
    tokenizer: PreTrainedTokenizerFast, rule: str, alpha: float, way: dict[str, Any]
) -> None:
    """200 prompts of 1 to 24 tokens, in batches that are filled up again."""
    made = (
        make_model(family, seed, hidden_size=hidden, vocab_size=vocab, num_layers=1 + seed % 2)
        for seed, (family, hidden, vocab) in enumerate(MEMBERS[rule, alpha], 11)
    )
    model = EnsembleForCausalLM.from_members(rule=rule, alpha=alpha, members=dict(zip(ROLES, made, strict=True)))
    prompts, options = prompts_of(200, longest=24), DecodingOptions(max_new_tokens=16, **way)
    expected = plain(model, tokenizer, prompts, options, batch_size=50)
    assert num_texts(expected) > 150
    for num, batch_size in ((1, 50), (3, 30), (8, 50)):
        found, decoder = drafted(model, tokenizer, prompts, options, "source_ft", num, batch_size=batch_size)
        assert_same(found, expected)
        assert num == 1 or 0 < decoder.stats.num_accepted < decoder.stats.num_drafted  # both sides are seen


def make_falcon(seed: int, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "falcon", vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.5,
        eos_token_id=2, bos_token_id=1, pad_token_id=3, **settings,
    )  # fmt: skip
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return model


@WAYS
@pytest.mark.parametrize("family", ["falcon", "opt", "gpt_neox", "gemma", "gemma2", "mistral", "mixtral"])
def test_families_drafted_are_as_transformers_decodes_them(
    tokenizer: PreTrainedTokenizerFast, family: str, way: dict[str, Any]
) -> None:
    """Rows of different lengths, windows that are passed: as in `transformers`' own loop without a cache."""
    make = make_falcon if family == "falcon" else lambda seed: make_model(family, seed)
    members = dict(zip(ROLES, (make(seed) for seed in (1, 2, 3)), strict=True))
    model = EnsembleForCausalLM.from_members(alpha=0.15, members=members)
    prompts, options = prompts_of(6), DecodingOptions(max_new_tokens=20, **way)
    found, decoder = drafted(model, tokenizer, prompts, options, "source_ft", 4, batch_size=6)
    assert 10 < decoder.stats.num_accepted < decoder.stats.num_drafted
    settings: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "top_k": 0} if way else {}
    for prompt in prompts:
        alone = Decoder("none", seed=7, numbers=[prompt.number])
        settings |= {"max_new_tokens": 20, "use_cache": False, "custom_generate": alone}
        text = plain_ids(model, torch.tensor([prompt.ids]), **settings)
        assert alone.stats.by_transformers == {"use_cache is off": 1}
        assert [*prompt.ids, *found[prompt.number][0].ids] == text[0].tolist()


def test_a_family_without_a_cache_of_rows_is_not_drafted_for(tokenizer: PreTrainedTokenizerFast) -> None:
    for target, name in ((make_model("bloom", 3), "BloomForCausalLM"), (make_falcon(3, alibi=True), "")):
        members = {"source_ft": make_model("llama", 1), "source_pt": make_model("llama", 2), "target_pt": target}
        model = EnsembleForCausalLM.from_members(alpha=0.15, members=members)
        prompts, decoder = prompts_of(4), fixed(num=4)
        options = DecodingOptions(max_new_tokens=6, **SAMPLED)
        found = plain(model, tokenizer, prompts, options, batch_size=2, decoder=decoder)
        reason = f"{name} has not been tried on it" if name else "it makes ALiBi's biases from a mask in 2-D"
        assert decoder.stats.by_transformers == {f"target_pt cannot keep a cache of rows: {reason}": 2}
        assert (decoder.stats.draft, decoder.stats.num_rounds) == (None, 0)
        assert_same(found, plain(model, tokenizer, prompts, options, batch_size=4))


@pytest.mark.parametrize("batch_size", [1, 5])
def test_prompts_behind_one_header(tokenizer: PreTrainedTokenizerFast, batch_size: int) -> None:
    """A beginning that all rows share is read once; rounds go on behind it."""
    header = random_ids(1, 40, seed=1)[0].tolist()
    model, options = make_trio(alpha=0.15), DecodingOptions(max_new_tokens=16)
    prompts = [EncodedPrompt(prompt.number, header + prompt.ids) for prompt in prompts_of(15)]
    expected = plain(model, tokenizer, prompts, options, batch_size=batch_size, share_prefixes=False)
    with counted(model) as calls:
        found, decoder = drafted(model, tokenizer, prompts, options, "source_ft", 4, batch_size=batch_size)
    assert_same(found, expected)
    assert sum(length > 9 for length in calls[("target_pt",)].lengths) == 1  # the header
    assert 0 < decoder.stats.num_accepted < decoder.stats.num_drafted


@WAYS
@pytest.mark.parametrize("rule", ["base-change", "eft"])
def test_members_on_one_backbone_draft_together(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, rule: str, way: dict[str, Any]
) -> None:
    base = save_base(tmp_path / "base")
    pair = make_pair(base, save_adapter(base, tmp_path / "adapter"), make_model("gpt2", 3), rule=rule, alpha=0.2)
    prompts, options = prompts_of(7), DecodingOptions(max_new_tokens=14, **way)
    expected = plain(pair.copies, tokenizer, prompts, options, batch_size=7)
    assert_same(plain(pair.shared, tokenizer, prompts, options, batch_size=7), expected)
    for num in (1, 3, 8):
        found, decoder = drafted(pair.shared, tokenizer, prompts, options, "source_pt", num, batch_size=7)
        assert_same(found, expected)
        assert decoder.stats.draft == "source_ft+source_pt"


@pytest.mark.parametrize("sampling", [False, True])
def test_an_alpha_for_each_row(sampling: bool) -> None:
    model, ids = make_trio(), random_ids(4, 5)
    model.generation_config.eos_token_id = int(plain_ids(model, ids)[1, 9])  # some rows leave the batch early
    model.alpha = torch.tensor([0.0, 0.2, 0.5, 1.0])
    drafting = fixed(num=4, seed=3)
    found = plain_ids(model, ids, do_sample=sampling, custom_generate=drafting)
    assert_drafted(drafting)
    expected = plain_ids(model, ids, do_sample=sampling, custom_generate=Decoder("none", seed=3))
    assert found.tolist() == expected.tolist()
