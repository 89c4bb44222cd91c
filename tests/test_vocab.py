"""The vocabulary contract: its cases, what it tells, and extended, padded and renamed members end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import SaveMember
from helpers.tiny import EXTRA, VOCAB, TableModel, make_model, make_tokenizer, member_logits, random_ids
from torch.testing import assert_close

from ensembler import EnsembleForCausalLM, MemberConfig
from ensembler.engine.members import check_member
from ensembler.errors import VocabularyError
from ensembler.inspection import summarise
from ensembler.preflight import check_ensemble
from ensembler.vocab import MemberVocabulary, end_ids, make_contract

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


RENAMED = {"a": 0, "b": 1, "C": 2, "d": 3}


def test_added_tokens_of_other_names_count_as_the_same_where_that_is_allowed() -> None:
    for added in (frozenset({2}), frozenset({2, 3})):
        made = [vocabulary("x", TOKENS, 4, added=added), vocabulary("y", RENAMED, 4, added=added)]
        with pytest.raises(VocabularyError, match=r"2 is 'c' and 'C'; .* \(--allow-renamed-special\)"):
            make_contract(made)
        contract = make_contract(made, allow_renamed_special=True)
        assert (contract.kind, contract.shared, dict(contract.held)) == ("renamed", 4, {"x": 4, "y": 4})
        assert contract.notes == ("other tokens at ids of x and y: 2 is 'c' and 'C'",)
    ordinary = [vocabulary("x", TOKENS, 4), vocabulary("y", RENAMED, 4)]
    with pytest.raises(VocabularyError, match=r"or the rule base-change or eft, which compare texts$"):
        make_contract(ordinary, allow_renamed_special=True)


def test_beyond_the_shared_ids_a_member_does_not_hold_what_the_anchor_calls_otherwise() -> None:
    made = [
        vocabulary("x", {**TOKENS, "e": 4, "f": 5}, 8, substitute=5),
        vocabulary("y", {**TOKENS, "e": 4, "g": 5, "h": 6}, 7, substitute=6),
        vocabulary("z", TOKENS, 4),
    ]
    with pytest.raises(VocabularyError, match="differ in 1 of 6 ids: 5 is 'f' and 'g'"):
        make_contract(made)
    contract = make_contract(made, allow_renamed_special=True)
    assert (contract.shared, dict(contract.held)) == (4, {"x": 6, "y": 5, "z": 4})
    ids = torch.arange(7)
    assert contract.known_ids("y", ids).tolist() == [0, 1, 2, 3, 4, 0, 0]  # its substitute lies behind, too
    assert contract.known_ids("x", ids).tolist() == [0, 1, 2, 3, 4, 5, 5]


def test_a_folder_keeps_that_renamed_tokens_are_allowed(save_member: SaveMember, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    vocab = tokenizer.get_vocab()
    text = tokenizer.backend_tokenizer.to_str().replace('"<pad>"', '"<fill>"')
    other = type(tokenizer)(tokenizer_object=type(tokenizer.backend_tokenizer).from_str(text), pad_token="<fill>")
    assert {*vocab.items()} ^ {*other.get_vocab().items()} == {("<pad>", 3), ("<fill>", 3)}
    members = {"reference": save_member("reference"), "aligned": save_member("aligned", seed=1, tokenizer=other)}
    with pytest.raises(VocabularyError, match="3 is '<pad>' and '<fill>'"):
        EnsembleForCausalLM.from_members(rule="realign", alpha=0.5, members=members)
    model = EnsembleForCausalLM.from_members(rule="realign", alpha=0.5, members=members, allow_renamed_special=True)
    ids = torch.tensor([[5, 3, 9]])
    expected = sum(0.5 * member_logits(member, ids) for member in model.members.values())
    assert_close(model(ids).logits.double(), expected, atol=1e-4, rtol=1e-5)
    model.save_pretrained(tmp_path / "ensemble")
    again = EnsembleForCausalLM.from_pretrained(tmp_path / "ensemble")
    assert (again.contract.kind, again.config.allow_renamed_special) == ("renamed", True)
    with pytest.raises(VocabularyError):
        EnsembleForCausalLM.from_pretrained(tmp_path / "ensemble", allow_renamed_special=False)


def with_unembedded_padding() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return tokenizer


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(("padding", "pad_token_id"), [(VOCAB, 3), (VOCAB, None), (3, -1), (3, VOCAB + 9), (2, -1)])
def test_padding_that_no_member_embeds_is_never_seen(
    save_member: SaveMember, padding: int, pad_token_id: int | None, use_cache: bool
) -> None:
    """A [PAD] that was added without an embedding, and ids of configs that are no tokens; in both loops."""
    of_config = pad_token_id if pad_token_id != VOCAB + 9 else 3
    settings = {"tokenizer": with_unembedded_padding(), "eos_token_id": None, "pad_token_id": of_config}
    members = {"reference": save_member("a", "llama", **settings), "aligned": save_member("b", "gpt2", 1, **settings)}
    for folder in members.values():
        path = folder / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token_id": pad_token_id}))
    model = EnsembleForCausalLM.from_members(rule="realign", alpha=0.5, members=members)
    model.generation_config.eos_token_id = None
    ids, mask = random_ids(2, 7), torch.ones(2, 7, dtype=torch.int64)
    ids[1, :4], mask[1, :4] = padding, 0
    for more in ({}, {"num_beams": 2}):
        options = {"max_new_tokens": 5, "do_sample": False, "use_cache": use_cache, **more}
        together = model.generate(ids, attention_mask=mask, **options)[:, 7:]
        alone = [model.generate(row[kept][None], **options)[0, -5:] for row, kept in zip(ids, mask.bool(), strict=True)]
        assert together.tolist() == [one.tolist() for one in alone]


def test_a_padding_id_is_one_that_all_can_read() -> None:
    contract = make_contract([vocabulary("x", {**TOKENS, "e": 4, "f": 5}, 5), vocabulary("y", TOKENS, 8)])
    assert contract.num_ids == 6
    candidates = (None, -1, 6, 5, 1)
    assert contract.padding_id(*candidates) == 5  # no row of x and y, who read their substitutes
    assert contract.padding_id(None, -1, 6) == 0
    for role, width in contract.widths.items():
        assert int(contract.known_ids(role, torch.tensor(5))) < width
    assert "x has 5 embeddings and none for 'f' (5) of its tokenizer: it reads id 0 in their place" in contract.notes


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


def test_ends_that_would_all_be_forbidden_are_refused(save_member: SaveMember, said: list[str]) -> None:
    """A chat fine-tune whose texts end with tokens that its base does not have; the tokenizer's end counts too."""
    tokenizer = make_tokenizer(8)
    tokenizer.eos_token = "A"
    members = {
        "reference": save_member("reference", vocab_size=72, tokenizer=tokenizer, eos_token_id=VOCAB + 1),
        "aligned": save_member("aligned", seed=1),
    }
    with pytest.raises(VocabularyError, match=r"no end token of reference \('B', 'A'\) is held .*--outside neutral"):
        EnsembleForCausalLM.from_members(rule="realign", members=members)
    model = EnsembleForCausalLM.from_members(rule="realign", members=members, outside="neutral")
    assert model(random_ids(1, 4)).logits[0, -1, VOCAB + 1] > -math.inf
    tokenizer.eos_token = "</s>"
    tokenizer.save_pretrained(members["reference"])
    model = EnsembleForCausalLM.from_members(rule="realign", members=members)
    assert end_ids(model.generation_config) == (VOCAB + 1, 2)
    assert "texts cannot end at 'B' of reference" in said[-1]


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


@pytest.mark.parametrize(
    ("own", "end", "found"),
    [
        (2, "</s>", [2]),
        (2, "b", [2, 5]),
        ([6, 2], "b", [6, 2, 5]),
        (None, "b", [5]),
        ([5, 2], "b", [5, 2]),
        (-1, "b", [5]),
    ],
)
def test_texts_end_at_the_ends_of_generation_config_and_tokenizer(
    save_member: SaveMember, own: Any, end: str, found: list[int], tmp_path: Path
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = end
    members = {
        "reference": save_member("reference", tokenizer=tokenizer, eos_token_id=own),
        "aligned": save_member("aligned", seed=1),
    }
    path = members["reference"] / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": own}))
    model = EnsembleForCausalLM.from_members(rule="realign", members=members)
    assert end_ids(model.generation_config) == tuple(found)
    checked = check_ensemble(model.config.replaced())
    assert [one.id for one in summarise(checked).ends] == found
    assert [one.token for one in summarise(checked).ends] == tokenizer.convert_ids_to_tokens(found)
    table = torch.zeros(VOCAB, VOCAB)
    table[:, found[-1]] = 9.0
    scripted = {"reference": TableModel(table), "aligned": TableModel(table)}
    fake = EnsembleForCausalLM.from_members(rule="realign", members=scripted)
    fake.generation_config = model.generation_config
    assert fake.generate(random_ids(1, 3), max_new_tokens=6, do_sample=False)[0, 3:].tolist() == [found[-1]]
    model.save_pretrained(tmp_path / "ensemble")
    again = EnsembleForCausalLM.from_pretrained(tmp_path / "ensemble")
    assert end_ids(again.generation_config) == tuple(found)


def test_ends_behind_the_shared_ids_are_said(save_member: SaveMember, said: list[str]) -> None:
    members = {
        "reference": save_member("a", vocab_size=72, tokenizer=make_tokenizer(8), eos_token_id=[2, VOCAB + 1]),
        "aligned": save_member("b", seed=1),
    }
    model = EnsembleForCausalLM.from_members(rule="realign", members=members)
    (line,) = [one for one in said if "cannot end" in one]
    assert line == (
        "texts cannot end at 'B' of reference, which not every member holds; choose outside='neutral' (--outside "
        "neutral) where they should"
    )
    assert [one.id for one in summarise(check_ensemble(model.config.replaced())).ends] == [2]
    said.clear()
    neutral = EnsembleForCausalLM.from_members(rule="realign", members=members, outside="neutral")
    assert [one.id for one in summarise(check_ensemble(neutral.config.replaced())).ends] == [2, VOCAB + 1]
    assert not [one for one in said if "cannot end" in one]
    loaded = {"reference": make_model(vocab_size=72, eos_token_id=[2, 70]), "aligned": make_model(seed=1)}
    EnsembleForCausalLM.from_members(rule="realign", members=loaded)
    assert "texts cannot end at 70 of reference" in said[-1]
