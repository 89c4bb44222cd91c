"""Each row has the rotary frequencies of its own text, where they depend on the length of a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapter_cases import make_pair, save_adapter
from helpers.alone_cases import STANDARD, SWITCH, make_kind
from helpers.tiny import make_model, make_tokenizer, random_ids
from transformers import GenerationConfig

from ensembler import EnsembleForCausalLM
from ensembler.decoding.decoder import Decoder
from ensembler.decoding.decoding_options import DecodingOptions
from ensembler.decoding.prompts import EncodedPrompt
from ensembler.decoding.texts import complete_prompts
from ensembler.engine.cuda_graphs import why_not_captured, why_not_compiled
from ensembler.engine.scaled_positions import PositionScale, at_lengths, scaled_rotaries, text_lengths

KINDS = ("phi3 longrope", "llama dynamic")


def make_ensemble(*kinds: str, alpha: float = 0.6) -> EnsembleForCausalLM:
    """An ensemble of models of these kinds: source_ft, source_pt, target_pt."""
    models = [make_kind(kind, seed) if " " in kind else make_model(kind, seed) for seed, kind in enumerate(kinds)]
    members = dict(zip(("source_ft", "source_pt", "target_pt"), models, strict=True))
    model = EnsembleForCausalLM.from_members(rule="base-change", alpha=alpha, members=members)
    model.generation_config = GenerationConfig(bos_token_id=1, pad_token_id=3)
    return model


def new_ids(model: EnsembleForCausalLM, ids: torch.Tensor, num: int, **options: Any) -> list[list[int]]:
    options = {**STANDARD, "max_new_tokens": num, "attention_mask": torch.ones_like(ids), **options}
    return model.generate(ids, **options)[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_have_the_frequencies_of_their_own_length(kind: str) -> None:
    """As in a forward of that length alone, after texts of any other length; 100 random batches."""
    model = make_kind(kind)
    (rotary,) = scaled_rotaries(model)
    generator = torch.Generator().manual_seed(0)
    differs = 0
    for _ in range(100):
        lengths = torch.randint(1, 3 * SWITCH, (3, 1), generator=generator)
        positions = (torch.rand(3, 4, generator=generator) * lengths).long()
        x = torch.zeros(3, 4, 16)
        with at_lengths([rotary], lengths):
            found = rotary(x, positions)
        for row, length in enumerate(lengths[:, 0].tolist()):
            (fresh,) = scaled_rotaries(make_kind(kind)) if kind == "llama dynamic" else (rotary,)
            whole = fresh(x[:1], torch.arange(length)[None])
            for mine, own in zip(found, whole, strict=True):
                torch.testing.assert_close(mine[row], own[0, positions[row]], rtol=0, atol=1e-6)
        differs += not torch.equal(rotary(x, positions)[0], found[0])
    assert differs > 50  # a plain forward takes them from its longest row


def test_the_scale_of_a_model() -> None:
    assert [PositionScale.of(model, scaled_rotaries(model)) for model in map(make_kind, KINDS)] == [
        PositionScale(SWITCH, SWITCH),
        PositionScale(SWITCH, None),
    ]
    assert scaled_rotaries(make_model("llama")) == []
    for kind in KINDS:
        assert "scaled by the length" in str(why_not_compiled(make_kind(kind), ()))
        assert "it is on cpu" in str(why_not_captured(make_kind(kind)))


def test_the_length_of_a_text_ends_with_the_last_token_that_is_seen() -> None:
    left, right = torch.tensor([[0, 0, 1, 1, 1]]), torch.tensor([[1, 1, 1, 0, 0]])
    assert text_lengths(5, 0, None, None).tolist() == [[5]]
    assert text_lengths(2, 3, None, None).tolist() == [[5]]
    assert text_lengths(5, 0, None, right).tolist() == [[3]]
    assert text_lengths(5, 0, torch.tensor([[0, 0, 0, 1, 2]]), left).tolist() == [[3]]
    assert text_lengths(1, 4, torch.tensor([[2], [4]]), None).tolist() == [[3], [5]]


@pytest.mark.parametrize("kinds", [("phi3 longrope", "llama", "phi3 longrope"), ("llama dynamic", "qwen2", "llama")])
@pytest.mark.parametrize("draft", ["ngram", "source_pt", "source_ft"])
def test_drafts_change_no_text_beyond_the_switch(kinds: tuple[str, ...], draft: str) -> None:
    """Rows reach it at different steps; rejected drafts stand on both sides of it."""
    model = make_ensemble(*kinds)
    ids = torch.cat([random_ids(1, 5, seed=seed).repeat(1, 2) for seed in range(4)])
    mask = torch.ones_like(ids)
    for row in range(4):
        mask[row, :row] = 0
    plain = new_ids(model, ids, 14, attention_mask=mask, custom_generate=Decoder("none"))
    for num in (2, 3, 5):
        decoder = Decoder(draft, num_positions=num, is_fixed=True)
        assert new_ids(model, ids, 14, attention_mask=mask, custom_generate=decoder) == plain


def test_a_text_is_read_anew_beside_members_that_keep_theirs() -> None:
    """One member drops its cache at the switch, as alone; another keeps the old frequencies of its earlier tokens."""
    model = make_ensemble("phi3 longrope", "llama dynamic", "llama", alpha=0.8)
    ids = random_ids(3, 12, seed=1)
    by_row = new_ids(model, ids, 12)
    for options in ({"cache_implementation": "dynamic"}, {"cache_implementation": "static"}):
        assert new_ids(model, ids, 12, **options) == by_row
    one_by_one = [new_ids(model, ids[row : row + 1], 12, num_beams=2)[0] for row in range(3)]
    assert new_ids(model, ids, 12, num_beams=2) == one_by_one


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_that_is_handed_on_beyond_the_switch(kind: str) -> None:
    """The next prompt is longer than the switch, or shorter after a text that was longer."""
    model = make_ensemble(kind, "llama", "qwen2")
    prompt = random_ids(1, 10, seed=3)
    for num in (4, 12):
        options = {**STANDARD, "max_new_tokens": num, "return_dict_in_generate": True}
        first = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        for following in (torch.cat([first.sequences, random_ids(1, 3, seed=4)], 1), first.sequences[:, :12]):
            copied = first.past_key_values.copied(1)
            found = new_ids(model, following, 8, past_key_values=copied)
            assert found == new_ids(model, following, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_prefixes_are_shared_up_to_the_switch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ensembler.decoding.batching.MIN_SHARED", 4)
    model, header = make_ensemble(kind, "llama", "qwen2"), random_ids(1, 12, seed=5)[0].tolist()
    prompts = [
        EncodedPrompt(number, header + random_ids(1, size, seed=size)[0].tolist())
        for number, size in enumerate((1, 2, 3, 6, 9))
    ]
    options = DecodingOptions(max_new_tokens=6)
    found = [
        {
            one.number: one.samples[0].ids
            for one in complete_prompts(model, make_tokenizer(), prompts, options, batch_size=2, share_prefixes=share)
        }
        for share in (False, True)
    ]
    assert found[0] == found[1]


def test_members_on_a_backbone(tmp_path: Path) -> None:
    """A block of rows for each member: each block has the lengths of the rows."""
    base = tmp_path / "base"
    make_kind("phi3 longrope").save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["qkv_proj", "o_proj"])
    pair = make_pair(base, adapter, make_model("qwen2", 3))
    ids = random_ids(2, 12, seed=2)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    for options in ({}, {"cache_implementation": "dynamic"}, {"use_cache": False}):
        found = [new_ids(model, ids, 8, attention_mask=mask, **options) for model in (pair.shared, pair.copies)]
        assert found[0] == found[1]
