"""Members that are asked for text keep nothing from token to token, or from call to call, that changes a result."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.text_cases import save_text_members
from transformers import AutoModelForCausalLM

from ensembler import EnsembleForCausalLM
from ensembler.decoding.decoding_options import DecodingOptions
from ensembler.decoding.prompts import Prompt, encode_prompts
from ensembler.decoding.texts import complete_prompts
from ensembler.engine.prefill import Place
from ensembler.engine.text_member_set import TextMemberSet
from ensembler.engine.text_members import TextMembers
from ensembler.engine.text_states import TextStates
from ensembler.errors import LogitsError
from ensembler.evaluation.backends import score
from ensembler.tokenization.reading import plain_ids

CHAT = "{% for one in messages %}[{{ one['role'] }}]{{ one['content'] }}<|end|>{% endfor %}[assistant]"
TEXTS = ("The quick brown", "def f(x):", "It is 1234 and", "Straße", "lazy dogs jump", "some more words here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_members(tmp_path_factory.mktemp("texts"))


@pytest.fixture
def model(folder: Path) -> EnsembleForCausalLM:
    return EnsembleForCausalLM.from_pretrained(folder)


def text_of(model: EnsembleForCausalLM) -> TextMembers:
    assert isinstance(model.member_set, TextMemberSet)
    return model.member_set.text


def generated(model: EnsembleForCausalLM, text: str = "The quick brown", num: int = 6) -> list[int]:
    ids = model.tokenizer(text, return_tensors="pt").input_ids
    return model.generate(ids, max_new_tokens=num, do_sample=False)[0].tolist()


@pytest.mark.parametrize("chat", [False, True])
def test_prompts_that_join_others_are_decoded_as_alone(
    model: EnsembleForCausalLM, chat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts that run keep their states while new ones join: each prompt is begun once."""
    plan = text_of(model).plan
    for one in (model.tokenizer, plan.anchor.tokenizer, *(reader.tokenizer for reader in plan.readers.values())):
        one.chat_template = CHAT
    prompts = [Prompt(number, text, "") for number, text in enumerate(TEXTS)]
    encoded = encode_prompts(prompts, model.tokenizer, chat=chat, plan=plan)
    options = DecodingOptions(max_new_tokens=8, temperature=1.0, seed=3)

    def texts(num: int) -> dict[int, list[int]]:
        done = complete_prompts(model, model.tokenizer, encoded, options, batch_size=num)
        return {one.number: one.samples[0].ids for one in done}

    alone, begun = texts(1), []
    begin = TextMembers.begin
    monkeypatch.setattr(TextMembers, "begin", lambda self, ids: begun.append(ids) or begin(self, ids))
    assert texts(5) == alone
    assert len(begun) == len(TEXTS)


def test_a_prompt_is_read_as_one_and_states_that_are_gone_are_made_again(model: EnsembleForCausalLM) -> None:
    text = text_of(model)
    ids = model.tokenizer("The quick brown fox")["input_ids"]
    states = TextStates(text)
    with torch.inference_mode():
        for end in range(4, len(ids) + 1):
            (grown,) = states.of([Place(0, 0, ids[:end], 4)])
        (prompt,) = states.of([Place(0, 0, ids, len(ids))])
        (again,) = TextStates(text).of([Place(0, 0, ids, 4)])
    role = "target_pt"
    assert prompt[role].cut is None
    assert grown[role].cut is not None
    assert again[role].cut is grown[role].cut
    assert again[role].trunk + list(again[role].tail) == grown[role].trunk + list(grown[role].tail)
    assert prompt[role].trunk == text.begin(ids)[role].trunk


@torch.no_grad()
def scale(model: Any, by: float) -> None:
    for weights in model.parameters():
        weights.mul_(by)


@pytest.mark.parametrize("num", [2, 8])
def test_weights_that_changed_are_asked_anew(model: EnsembleForCausalLM, folder: Path, num: int) -> None:
    row = {"prompt": "The quick brown", "continuation": " fox jumps"}
    before, scored = generated(model, num=num), score(model, [row])
    scale(model.members["target_pt"], 3.0)
    fresh = EnsembleForCausalLM.from_pretrained(folder)
    scale(fresh.members["target_pt"], 3.0)
    expected = score(fresh, [row])
    assert generated(model, num=num) == generated(fresh, num=num)
    assert score(model, [row])[0]["log_prob"] == pytest.approx(expected[0]["log_prob"], abs=1e-4)
    assert scored != expected
    assert num < 8 or before != generated(fresh, num=num)


def test_members_that_are_replaced_or_moved_are_the_ones_that_run(model: EnsembleForCausalLM, folder: Path) -> None:
    before = generated(model)
    other = AutoModelForCausalLM.from_pretrained(folder.parent / "target_pt")
    scale(other, 3.0)
    model.members["target_pt"] = other
    after = generated(model)
    assert after != before
    model.to(torch.bfloat16)
    assert len(generated(model)) > len(model.tokenizer("The quick brown").input_ids)


def test_a_forward_without_a_cache_gives_any_positions(model: EnsembleForCausalLM) -> None:
    ids = model.tokenizer("The quick brown fox", return_tensors="pt").input_ids
    (last,) = model(ids, use_cache=False, logits_to_keep=1).logits.detach()[:, 0].argmax(-1).tolist()
    assert generated(model, "The quick brown fox", 1)[-1] == last
    with torch.no_grad():
        three = model(ids, use_cache=False, logits_to_keep=3).logits
        some = model(ids, use_cache=False, logits_to_keep=torch.tensor([-1, -3])).logits
    torch.testing.assert_close(some, three[:, [2, 0]])


def test_a_likely_token_that_is_forbidden_decides_nothing(model: EnsembleForCausalLM) -> None:
    """It is no candidate, and must not count as one of the others that are better than all candidates."""
    text = text_of(model)
    special = model.tokenizer.convert_tokens_to_ids("<|end|>")
    assert special not in text.plan.anchor.ends
    ids = model.tokenizer("The quick", return_tensors="pt").input_ids
    weights = model.rule.weights(1.0)
    with torch.inference_mode():
        logits = {role: model.members[role](ids).logits[:, -1] for role in ("source_ft", "source_pt")}
        logits["source_ft"][0, special] = 50.0
        (states,) = text.along(ids[0].tolist(), ids.shape[1])[-1:]
        found = text.log_probs([states], logits, [weights], is_greedy=True)["target_pt"][0]
        assert found[special] == -math.inf
        assert text.stats.num_certain == 1
        assert text.members["target_pt"].num_evaluated > 0
        (states,) = text.along(ids[0].tolist(), ids.shape[1])[-1:]
        exact = text.log_probs([states], logits, [weights])["target_pt"][0]
    scores = [values + logits["source_ft"][0] for values in (found, exact)]
    own = text.own_log_probs(logits["source_pt"])[0]
    chosen = [
        torch.where(values == values.new_tensor(0), -math.inf, scores[at] - own).argmax()
        for at, values in enumerate((found, exact))
    ]
    assert chosen[0] == chosen[1]


def test_a_first_token_that_is_taken_as_certain_is_no_part_of_what_follows(tmp_path: Path) -> None:
    """A member without a begin token: where the text goes on as a longer token has it, most of it is stable yet."""
    text = text_of(EnsembleForCausalLM.from_pretrained(save_text_members(tmp_path, "spaces", "byte-level")))
    member, tokens = text.members["target_pt"], text.plan.readers["target_pt"].writer.tokens
    longer, first = next(
        (spelled, spelled[:num])
        for spelled in sorted(tokens.spelled, key=len, reverse=True)
        for num in range(len(spelled) - 1, 0, -1)
        if spelled.isascii() and spelled[:num] in tokens.places and spelled[num:] in tokens.places
    )
    with torch.inference_mode():
        state = member.begin([tokens.id_of(first)])
        assert state.trunk == [tokens.id_of(first)]
        for piece in (longer[len(first) :], *(b" word" for _ in range(20))):
            member.read_ahead([(state, piece)])
            state = member.advance(state, piece)
    assert len(state.recent) < 20
    assert len(state.trunk) > 20


def test_a_tokenizer_with_more_tokens_than_its_model(tmp_path: Path) -> None:
    """The last token is ordinary text, which the model cannot give: its probability is 0."""
    folder = save_text_members(tmp_path)
    target = AutoModelForCausalLM.from_pretrained(tmp_path / "target_pt")
    target.resize_token_embeddings(target.config.vocab_size - 1)
    target.save_pretrained(tmp_path / "target_pt")
    assert len(generated(EnsembleForCausalLM.from_pretrained(folder))) > 3


def test_nan_of_a_member_by_ids_is_no_score(model: EnsembleForCausalLM) -> None:
    scale(model.members["source_pt"], math.nan)
    with pytest.raises(LogitsError, match="source_pt computed NaN"):
        score(model, [{"prompt": "The quick", "continuation": " brown"}])


def test_texts_that_the_anchor_would_cut_otherwise_add_up(model: EnsembleForCausalLM) -> None:
    """Written byte by byte, as the anchor never does, a text has the probability that it has."""
    text, role = text_of(model), "target_pt"
    context, continuation = model.tokenizer("The quick")["input_ids"], " brown fox"
    usual = plain_ids(model.tokenizer, continuation)
    single = [text.plan.anchor.writer.tokens.id_of(bytes([byte])) for byte in continuation.encode()]
    assert len(single) > len(usual)
    with torch.inference_mode():
        by_bytes, by_tokens = (one[role] for one in text.score([(context, single), (context, usual)]))
    assert sum(by_bytes.log_probs) == pytest.approx(
        sum(by_tokens.log_probs), abs=by_bytes.bound + by_tokens.bound + 0.3
    )
