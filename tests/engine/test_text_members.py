"""Members with different tokenizers: probabilities of text, against enumeration and against the ordinary path."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers.text_cases import KINDS, own_log_prob, save_text_members
from helpers.tokenizer_cases import make_byte_tokenizer
from tokenizers import normalizers
from torch import Tensor
from transformers import AutoModelForCausalLM

from ensembler import EnsembleForCausalLM
from ensembler.decoding.decoder import Decoder
from ensembler.engine.grid import GridPoint
from ensembler.engine.text_member import Continuation, TextMember
from ensembler.engine.text_member_set import TextMemberSet
from ensembler.engine.text_plan import TextReader
from ensembler.engine.text_prompts import read_prompt
from ensembler.errors import MemberError, PromptError
from ensembler.evaluation.backends import score
from ensembler.tokenization.reading import plain_ids, read_writer

PROMPTS = ("The quick brown fox", "def f(x):\n    if x", "It is 1234", "trailing space ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_members(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def model(folder: Path) -> EnsembleForCausalLM:
    return EnsembleForCausalLM.from_pretrained(folder)


def text_member(model: EnsembleForCausalLM, role: str) -> TextMember:
    assert isinstance(model.member_set, TextMemberSet)
    return model.member_set.text.members[role]


def enumerated(model: EnsembleForCausalLM, role: str, trunk: list[int], text: bytes) -> float:
    """The probability that a member goes on with `text` behind its trunk: all ways that its tokenizer may write it."""
    assert isinstance(model.member_set, TextMemberSet)
    writer = model.member_set.text.plan.readers[role].writer

    def behind(path: list[int], rest: bytes) -> float:
        if not rest:
            return 1.0
        with torch.no_grad():
            logits = model.members[role](torch.tensor([trunk + path])).logits[0, -1]
        probabilities = logits.double().softmax(-1)
        total = 0.0
        for token, spelled in writer.tokens.texts.items():
            if spelled.startswith(rest):
                total += float(probabilities[token])
            elif (
                rest.startswith(spelled)
                and writer.can_go_on(token, rest[len(spelled) :])
                and (not path or writer.can_follow(path[-1], token))
            ):
                total += float(probabilities[token]) * behind([*path, token], rest[len(spelled) :])
        return total

    return behind([], text)


@pytest.mark.parametrize("role", ["source_pt", "target_pt"])
@pytest.mark.parametrize("text", ["The", " lazy", "x >", "é"])
def test_bounds_are_those_of_an_enumeration(model: EnsembleForCausalLM, role: str, text: str) -> None:
    member = text_member(model, role)
    assert isinstance(model.member_set, TextMemberSet)
    begin = [model.member_set.text.plan.readers[role].tokenizer.bos_token_id]
    state = member.begin(begin)
    truth = enumerated(model, role, begin, text.encode())
    with torch.inference_mode():
        for _ in range(300):
            bounds = member.bounds(state, Continuation(text.encode()))
            assert bounds.low - 1e-6 * truth <= truth <= bounds.high + 1e-6 * truth
            if not bounds.open:
                break
            member.evaluate([(state, max(bounds.open, key=bounds.open.__getitem__))])
    assert bounds.low == pytest.approx(truth, rel=1e-4)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_scores_add_up_to_that_of_the_text_whatever_the_tokens(model: EnsembleForCausalLM, prompt: str) -> None:
    """Cut into the anchor's tokens and into single bytes, a text has one probability, to the tolerance."""
    assert isinstance(model.member_set, TextMemberSet)
    text = model.member_set.text
    tokenizer = model.tokenizer
    context = tokenizer(prompt)["input_ids"]
    tokens = plain_ids(tokenizer, " jumps over 13 dogs.\n")
    by_bytes = [token for character in " jumps over 13 dogs.\n" for token in plain_ids(tokenizer, character)]
    assert len(by_bytes) > len(tokens)
    with torch.inference_mode():
        whole, pieces = text.score([(context, tokens), (context, by_bytes)])
    for role in ("source_pt", "target_pt"):
        error = abs(sum(whole[role].log_probs) - sum(pieces[role].log_probs))
        assert error <= whole[role].bound + pieces[role].bound + 1e-4
        assert error < 0.05


def test_at_alpha_0_it_is_the_anchor(model: EnsembleForCausalLM, folder: Path) -> None:
    for prompt in PROMPTS:
        ids = model.tokenizer(prompt, return_tensors="pt").input_ids
        expected = model.members["source_ft"].generate(ids, max_new_tokens=12, do_sample=False)
        with model.at(model.rule, 0.0):
            assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), expected)


def padded_inputs(model: EnsembleForCausalLM) -> dict[str, Tensor]:
    return dict(model.tokenizer(list(PROMPTS), return_tensors="pt", padding=True, padding_side="left"))


@pytest.mark.parametrize("sampled", [False, True])
def test_a_batch_is_its_prompts_one_by_one(model: EnsembleForCausalLM, sampled: bool) -> None:
    def texts(inputs: dict[str, Tensor], numbers: list[int]) -> list[list[int]]:
        decoder = Decoder("none", seed=7, numbers=numbers)
        out = model.generate(**inputs, max_new_tokens=10, do_sample=sampled, custom_generate=decoder)
        return out[:, inputs["input_ids"].shape[1] :].tolist()

    together = texts(padded_inputs(model), list(range(len(PROMPTS))))
    for number, prompt in enumerate(PROMPTS):
        (alone,) = texts(dict(model.tokenizer(prompt, return_tensors="pt")), [number])
        assert together[number][: len(alone)] == alone


def test_a_grid_is_its_points_one_by_one_and_drafts_change_nothing(model: EnsembleForCausalLM) -> None:
    inputs = dict(model.tokenizer(PROMPTS[0], return_tensors="pt"))
    points = [GridPoint("base-change", alpha) for alpha in (0.0, 0.5, 1.5)]
    found = model.generate(**inputs, max_new_tokens=10, do_sample=False, custom_generate=Decoder(points=points))
    for point, ids in zip(points, found.sequences, strict=True):
        for draft in ("none", "ngram"):
            with model.at(model.rule, point.alpha):
                alone = model.generate(
                    **inputs, max_new_tokens=10, do_sample=False, custom_generate=Decoder(draft, is_fixed=True)
                )
            assert torch.equal(ids[:, : alone.shape[1]], alone)


def test_the_score_is_the_anchors_and_the_ratio_of_the_texts(model: EnsembleForCausalLM) -> None:
    row = {"prompt": "The quick brown", "continuation": " fox jumps over"}
    scored = score(model, [row], alpha=[0.0, 1.0, 2.0])[0]["log_prob"]
    context = row["prompt"]
    anchor = own_log_prob(model, "source_ft", context, row["continuation"])
    assert scored[0] == pytest.approx(anchor, abs=1e-4)
    assert scored[2] - scored[1] == pytest.approx(scored[1] - scored[0], abs=1e-4)
    assert isinstance(model.member_set, TextMemberSet)
    ids = model.tokenizer(context)["input_ids"]
    with torch.inference_mode():
        (by_role,) = model.member_set.text.score([(ids, plain_ids(model.tokenizer, row["continuation"]))])
    ratio = sum(by_role["target_pt"].log_probs) - sum(by_role["source_pt"].log_probs)
    assert scored[1] - scored[0] == pytest.approx(ratio, abs=1e-4)
    assert math.isfinite(ratio)
    assert abs(ratio) > 1e-3


def test_a_prompt_with_a_special_token_inside_is_refused_by_its_name(model: EnsembleForCausalLM) -> None:
    ids = model.tokenizer("a <|end|> b", return_tensors="pt").input_ids
    with pytest.raises(PromptError, match=r"special token '<\|end\|>'.*--chat"):
        model.generate(ids, max_new_tokens=2)


def test_text_that_a_tokenizer_changes_is_refused_with_its_first_character() -> None:
    tokenizer = make_byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    reader = TextReader(tokenizer, read_writer("target_pt", tokenizer), ())
    assert read_prompt("target_pt", reader, "é e".encode())[1] == b""
    with pytest.raises(PromptError, match="target_pt cannot read 'e' at byte 3 of the prompt"):
        read_prompt("target_pt", reader, "é e\N{COMBINING ACUTE ACCENT}".encode())


def test_a_model_without_its_folder_has_no_tokenizer(folder: Path) -> None:
    members = {role: str(folder.parent / role) for role in ("source_ft", "target_pt")}
    source_pt = AutoModelForCausalLM.from_pretrained(folder.parent / "source_pt")
    with pytest.raises(MemberError, match="source_pt was given as a model, without a tokenizer"):
        EnsembleForCausalLM.from_members(members={**members, "source_pt": source_pt})


@pytest.mark.parametrize("kinds", KINDS)
def test_kinds_of_tokenizers_beside_each_other(kinds: tuple[str, str, str], tmp_path: Path) -> None:
    """The target of base-change, and the pair of EFT, in other tokenizers than the anchor's."""
    model = EnsembleForCausalLM.from_pretrained(save_text_members(tmp_path, *kinds))
    ids = model.tokenizer("Straße über 12 ", return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert out.shape[1] > ids.shape[1]
