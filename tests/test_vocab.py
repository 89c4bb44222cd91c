"""The vocabulary contract: its four cases, what it tells, and extended and padded members end to end."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import SaveMember
from helpers.tiny import EXTRA, VOCAB, make_tokenizer, member_logits, random_ids
from torch.testing import assert_close

from ensembler import EnsembleForCausalLM, MemberConfig
from ensembler.engine.members import check_member
from ensembler.errors import VocabularyError
from ensembler.vocab import MemberVocabulary, make_contract

TOKENS = {"a": 0, "b": 1, "c": 2, "d": 3}


def vocabulary(role: str, tokens: dict[str, int] | None, width: int, **more: Any) -> MemberVocabulary:
    return MemberVocabulary(role, tokens, width, **more)


@pytest.mark.parametrize(
    ("members", "kind", "shared"),
    [
        ([(TOKENS, 4), (TOKENS, 4)], "identical", 4),
        ([(TOKENS, 4), (TOKENS, 8)], "padded", 4),
        ([(TOKENS, 8), (TOKENS, 6), (TOKENS, 7)], "padded", 4),  # ids that no tokenizer gives are masked too
        ([(TOKENS, 8), (TOKENS, 8)], "identical", 4),
        ([(TOKENS, 4), ({**TOKENS, "e": 4}, 5)], "extended", 4),
        ([({**TOKENS, "e": 4}, 5), (TOKENS, 4)], "extended", 4),
        ([({**TOKENS, "e": 4}, 8), (TOKENS, 8)], "extended", 4),  # one width hides an extra token
        ([({**TOKENS, "e": 4}, 8), (TOKENS, 6), (None, 3)], "extended", 3),
        ([(None, 4), (None, 4)], "identical", 4),
        ([(None, 8), (TOKENS, 4)], "padded", 4),
    ],
)
def test_the_cases(members: list[tuple[dict[str, int] | None, int]], kind: str, shared: int) -> None:
    contract = make_contract([vocabulary(f"m{i}", *member) for i, member in enumerate(members)])
    assert (contract.kind, contract.shared) == (kind, shared)
    assert contract.widths == {f"m{i}": width for i, (_, width) in enumerate(members)}


def test_different_names_the_first_ids_in_one_line() -> None:
    other = {"a": 0, "c": 1, "b": 2, "d": 3}
    with pytest.raises(VocabularyError) as caught:
        make_contract([vocabulary("x", TOKENS, 4), vocabulary("y", other, 4)])
    message = str(caught.value)
    assert "x and y differ in 2 of 4 ids: 1 is 'b' and 'c', 2 is 'c' and 'b'" in message
    assert "\n" not in message


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 1, 0), (1, 0, 2)])
def test_two_members_that_disagree_beyond_a_third_share_only_its_ids(order: tuple[int, int, int]) -> None:
    made = [vocabulary("a", TOKENS, 6), vocabulary("b", {**TOKENS, "e": 4}, 6), vocabulary("c", {**TOKENS, "f": 4}, 6)]
    try:
        contract = make_contract([made[i] for i in order])
    except VocabularyError:
        assert order[0] != 0
    else:
        assert contract.shared == 4


def test_differences_of_special_tokens_and_templates_are_noted() -> None:
    notes = make_contract(
        [
            vocabulary("x", TOKENS, 4, bos="a", eos="b", chat_template="T"),
            vocabulary("y", TOKENS, 4, bos="a", eos="c"),
            vocabulary("z", None, 4),
        ]
    ).notes
    assert any("eos of y is 'c'" in note and "'b'" in note for note in notes)
    assert any("chat template of y" in note for note in notes)
    assert any("z came without a tokenizer" in note for note in notes)
    assert not any("bos" in note for note in notes)


def test_different_tokenizers_are_refused_before_weights_are_loaded(
    save_member: SaveMember, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = {
        "reference": save_member("reference"),
        "aligned": save_member("aligned", seed=1, tokenizer=make_tokenizer(swapped=True)),
    }
    monkeypatch.setattr("ensembler.engine.members.load_group", lambda *a, **k: pytest.fail("weights were loaded"))
    with pytest.raises(VocabularyError, match=r"reference and aligned differ in 2 of 64 ids: 4 is 'a' and 'f'"):
        EnsembleForCausalLM.from_members(rule="realign", members=members)


@pytest.fixture
def extended(save_member: SaveMember) -> dict[str, Path]:
    """EFT whose target has 8 tokens more than the source members."""
    more = {"vocab_size": VOCAB + 8, "tokenizer": make_tokenizer(8)}
    return {
        "source_ft": save_member("source_ft", "llama", 1),
        "source_pt": save_member("source_pt", "gpt2", 2),
        "target_pt": save_member("target_pt", "llama", 3, hidden_size=24, **more),
    }


@pytest.mark.parametrize("outside", ["mask", "neutral"])
def test_extended_anchor_end_to_end(extended: dict[str, Path], outside: str) -> None:
    model = EnsembleForCausalLM.from_members(rule="eft", alpha=0.8, members=extended, outside=outside)
    assert (model.contract.kind, model.contract.shared, model.config.vocab_size) == ("extended", VOCAB, VOCAB + 8)
    text = f"ab{EXTRA[0]}c d{EXTRA[7]}"
    ids = model.tokenizer(text, return_tensors="pt").input_ids
    assert int(ids.max()) == VOCAB + 7
    known = ids.where(ids < VOCAB, torch.tensor(0))  # <unk> stands for what a member does not hold
    target = member_logits(model.members["target_pt"], ids)
    ft, pt = (member_logits(model.members[role], known) for role in ("source_ft", "source_pt"))
    with torch.no_grad():
        actual = model(ids).logits.double()
    if outside == "mask":
        expected = torch.full_like(target, -math.inf)
        expected[..., :VOCAB] = target[..., :VOCAB] + 0.8 * (ft - pt)
    else:
        expected = target.clone()
        expected[..., :VOCAB] += 0.8 * (ft.log_softmax(-1) - pt.log_softmax(-1))
    assert_close(actual, expected, atol=1e-4, rtol=1e-5)
    model.alpha = 0.0
    with torch.no_grad():
        at_zero = model(ids).logits.double()
    width = VOCAB if outside == "mask" else VOCAB + 8
    assert torch.equal(at_zero[..., :width], target[..., :width])
    for more in ({}, {"num_beams": 2}, {"do_sample": True}):
        output = model.generate(input_ids=ids, max_new_tokens=6, **more)
        assert outside == "neutral" or int(output[:, ids.shape[1] :].max()) < VOCAB


def test_extended_member_beside_a_narrower_anchor(extended: dict[str, Path]) -> None:
    """Base-change: the anchor, source_ft, has the small vocabulary; the result has its width."""
    model = EnsembleForCausalLM.from_members(rule="base-change", alpha=0.8, members=extended)
    ids = random_ids(2, 6)
    z = {role: member_logits(member, ids) for role, member in model.members.items()}
    with torch.no_grad():
        actual = model(ids).logits.double()
    expected = z["source_ft"] + 0.8 * (z["target_pt"][..., :VOCAB] - z["source_pt"])
    assert_close(actual, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("widths", [(VOCAB, VOCAB + 8), (VOCAB + 8, VOCAB), (VOCAB + 8, VOCAB + 3)])
@pytest.mark.parametrize("outside", ["mask", "neutral"])
def test_padded_widths(save_member: SaveMember, widths: tuple[int, int], outside: str) -> None:
    members = {
        role: save_member(role, "llama", seed, vocab_size=width)
        for seed, (role, width) in enumerate(zip(("reference", "aligned"), widths, strict=True))
    }
    model = EnsembleForCausalLM.from_members(rule="realign", alpha=0.5, members=members, outside=outside)
    shared = VOCAB  # the ids that are tokens; what lies beyond, in one width or both, is padding
    assert (model.contract.kind, model.contract.shared) == ("padded", shared)
    ids = random_ids(2, 6)
    z = [member_logits(member, ids) for member in model.members.values()]
    with torch.no_grad():
        actual = model(ids).logits.double()
    assert actual.shape[-1] == widths[0]
    expected = 0.5 * (z[0] + torch.nn.functional.pad(z[1], (0, widths[0]))[..., : widths[0]])
    assert_close(actual[..., :VOCAB].log_softmax(-1), expected[..., :VOCAB].log_softmax(-1), atol=1e-4, rtol=1e-5)
    if widths[0] > shared:
        outer = actual[..., shared:]
        assert_close(outer, z[0][..., shared:] if outside == "neutral" else torch.full_like(outer, -math.inf))


def test_an_end_token_that_would_be_forbidden_is_refused(save_member: SaveMember) -> None:
    """A chat fine-tune whose texts end with a token that its base does not have."""
    tokenizer = make_tokenizer(8)
    members = {
        "reference": save_member("reference", vocab_size=72, tokenizer=tokenizer, eos_token_id=VOCAB + 1),
        "aligned": save_member("aligned", seed=1),
    }
    with pytest.raises(VocabularyError, match=rf"the end token {VOCAB + 1} of reference .*--outside neutral"):
        EnsembleForCausalLM.from_members(rule="realign", members=members)
    model = EnsembleForCausalLM.from_members(rule="realign", members=members, outside="neutral")
    assert model(random_ids(1, 4)).logits[0, -1, VOCAB + 1] > -math.inf


def test_substitute_stands_for_a_token_hidden_by_padding(save_member: SaveMember) -> None:
    """A member without token 64, whose embedding is padded to the same width, must not read an untrained row."""
    members = {
        "reference": save_member("reference", vocab_size=72, tokenizer=make_tokenizer(8)),
        "aligned": save_member("aligned", seed=1, vocab_size=72),
    }
    model = EnsembleForCausalLM.from_members(rule="realign", alpha=0.5, members=members)
    assert (model.contract.kind, model.contract.shared) == ("extended", VOCAB)
    ids = torch.tensor([[5, VOCAB + 2, 9]])
    reference = member_logits(model.members["reference"], ids)
    aligned = member_logits(model.members["aligned"], torch.tensor([[5, 0, 9]]))
    with torch.no_grad():
        actual = model(ids).logits.double()[..., :VOCAB]
    assert_close(actual, (0.5 * (reference + aligned))[..., :VOCAB], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma"])
def test_a_folder_without_tokenizer_is_a_member_without_one(save_member: SaveMember, family: str) -> None:
    """transformers makes up an empty tokenizer for some families: it says nothing about the weights."""
    files = check_member("x", MemberConfig(str(save_member("x", family, tokenizer=None))))
    assert files.vocabulary.tokens is None


def test_members_without_tokenizers_are_combined_by_width(save_member: SaveMember) -> None:
    members = {
        "reference": save_member("reference"),
        "aligned": save_member("aligned", "qwen2", 1, tokenizer=None),
    }
    model = EnsembleForCausalLM.from_members(rule="realign", alpha=0.5, members=members)
    assert (model.contract.kind, model.contract.shared) == ("identical", VOCAB)
    assert any("aligned came without a tokenizer" in note for note in model.contract.notes)
