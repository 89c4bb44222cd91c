"""Members with different tokenizers: probabilities of text, against enumeration and against the ordinary path."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.text_cases import KINDS, own_log_prob, save_text_members
from helpers.tokenizer_cases import make_byte_tokenizer
from tokenizers import normalizers
from torch import Tensor
from transformers import AutoModelForCausalLM

from ensembler import EnsembleForCausalLM
from ensembler.decoding.decoder import Decoder
from ensembler.decoding.decoding_options import DecodingOptions
from ensembler.decoding.prompts import EncodedPrompt
from ensembler.decoding.texts import complete_prompts
from ensembler.demo import demo_folder
from ensembler.engine.grid import GridPoint
from ensembler.engine.text_cover import Bounds
from ensembler.engine.text_member import Continuation, TextMember
from ensembler.engine.text_member_set import TextMemberSet
from ensembler.engine.text_members import TextMembers
from ensembler.engine.text_plan import TextPlan, TextReader, TextSettings
from ensembler.engine.text_prompts import read_prompt
from ensembler.engine.text_question import Question, Scores, States
from ensembler.errors import MemberError, PromptError
from ensembler.evaluation.backends import score
from ensembler.tokenization.reading import plain_ids, read_writer
from ensembler.tokenization.token_bytes import TokenBytes
from ensembler.tokenization.token_writer import TokenWriter
from ensembler.vocab import make_contract, read_vocabulary

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


@pytest.mark.parametrize("text", ["The", " lazy", "x >", "é"])
def test_bounds_are_those_of_an_enumeration(model: EnsembleForCausalLM, text: str) -> None:
    role = "target_pt"
    member = text_member(model, role)
    assert isinstance(model.member_set, TextMemberSet)
    begin = [model.member_set.text.plan.readers[role].tokenizer.bos_token_id]
    state = member.begin(begin)
    truth = enumerated(model, role, begin, text.encode())
    with torch.inference_mode():
        for _ in range(300):
            bounds = member.bounds(state, Continuation(text.encode()))
            assert bounds.low - 1e-5 * truth <= truth <= bounds.high + 1e-5 * truth
            if not bounds.open:
                break
            member.evaluate([(state, max(bounds.open, key=bounds.open.__getitem__))])
    assert bounds.low == pytest.approx(truth, rel=1e-4)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_scores_add_up_to_that_of_the_text_and_its_end(model: EnsembleForCausalLM, prompt: str) -> None:
    """Step by step through the anchor's tokens, and as one question: R(x + s) / R(x), then the end behind it."""
    assert isinstance(model.member_set, TextMemberSet)
    text, role, continuation = model.member_set.text, "target_pt", " jumps over 13 dogs.\n"
    context = model.tokenizer(prompt)["input_ids"]
    tokens = [*plain_ids(model.tokenizer, continuation), text.plan.anchor.ends[0]]
    member = text.members[role]
    with torch.inference_mode():
        (steps,) = text.score([(context, tokens)])
        state = text.begin(context)[role]
        whole = Continuation(continuation.encode(), ends=True)
        member.read_ahead([(state, whole.text)])
        for _ in range(400):
            bounds, begun = member.bounds(state, whole), member.begun(state)
            paths = {**bounds.open, **begun.open}
            if sum(paths.values()) <= 1e-5 * min(bounds.high, begun.high):
                break
            member.evaluate([(state, max(paths, key=paths.__getitem__))])
    expected = math.log(bounds.middle / begun.middle)
    error = abs(sum(steps[role].log_probs) - expected)
    assert error <= steps[role].bound + bounds.log_error + begun.log_error + 1e-4
    assert error < 0.05


class Words:
    """The embedded family's own writing: words, each with its space before it, are tokens, and have no pieces."""

    def __init__(self, tokenizer: Any) -> None:
        texts = {token: text.replace("▁", " ") for text, token in tokenizer.get_vocab().items()}
        self._texts = {text: token for token, text in texts.items() if token not in tokenizer.all_special_ids}
        self.writer = TokenWriter(
            TokenBytes({token: text.encode() for text, token in self._texts.items()}), {}, self._split, self._symbols
        )

    def _split(self, text: str) -> list[bytes]:
        return [piece.encode() for piece in re.findall(" ?[^ .,;:?]+|[.,;:?]| ", text)]

    def _symbols(self, piece: bytes) -> list[int] | None:
        token = self._texts.get(piece.decode(errors="replace"))
        return None if token is None else [token]


@pytest.mark.parametrize("rule", ["base-change", "eft"])
def test_the_same_tokenizer_through_text_decodes_as_by_ids(rule: str) -> None:
    """In the embedded family, whose numbers begin with others: ` 1` is the beginning of ` 19`."""
    members = {role: str(demo_folder() / role) for role in ("source_ft", "source_pt", "target_pt")}
    model = EnsembleForCausalLM.from_members(rule=rule, alpha=1.0, members=members)
    lines = (demo_folder() / "data" / "examples.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines[:8]]
    inputs = [dict(model.tokenizer(prompt, return_tensors="pt")) for prompt in prompts]

    def texts() -> list[list[int]]:
        return [model.generate(**one, max_new_tokens=12, do_sample=False)[0].tolist() for one in inputs]

    by_ids = texts()
    writer = Words(model.tokenizer).writer
    reader = TextReader(model.tokenizer, writer, (model.tokenizer.eos_token_id,), has_prefix=True)
    anchor, *others = model.rule.roles
    vocabularies = [read_vocabulary(role, model.tokenizer, model.members[role].config) for role in model.rule.roles]
    raised = frozenset(role for role, slope in model.rule.slope.items() if slope > 0)
    settings = TextSettings(len(model.tokenizer), 0.001, anchor_chats=False)
    plan = TextPlan(
        tuple(model.rule.roles),
        anchor,
        reader,
        dict.fromkeys(others, reader),
        make_contract(vocabularies[:1]),
        raised,
        settings,
    )
    model.member_set = TextMemberSet(plan, model.members, ())
    assert texts() == by_ids
    assert model.member_set.text.describe()["certain"] == 1


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


def test_texts_that_join_later_leave_the_states_of_others(
    model: EnsembleForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More prompts than rows: each prompt is read once, and no text is read again as if it were one."""
    begun: list[int] = []
    begin = TextMembers.begin

    def counted(self: TextMembers, ids: Sequence[int]) -> States:
        begun.append(len(ids))
        return begin(self, ids)

    monkeypatch.setattr(TextMembers, "begin", counted)
    texts = [f"{prompt} {number}" for number in range(3) for prompt in PROMPTS]
    prompts = [EncodedPrompt(number, model.tokenizer(text)["input_ids"]) for number, text in enumerate(texts)]
    options = DecodingOptions(max_new_tokens=16, stop=("e", "a", " "))  # so that rows end one by one
    together = {
        one.number: one.samples[0].text
        for one in complete_prompts(model, model.tokenizer, prompts, options, batch_size=5)
    }
    assert sorted(begun) == sorted(len(prompt.ids) for prompt in prompts)
    for prompt in prompts[:3]:
        (alone,) = complete_prompts(model, model.tokenizer, [prompt], options)
        assert together[prompt.number] == alone.samples[0].text


def test_a_grid_is_its_points_one_by_one_and_drafts_change_nothing(model: EnsembleForCausalLM) -> None:
    inputs = dict(model.tokenizer(PROMPTS[0], return_tensors="pt"))
    points = [GridPoint("base-change", alpha) for alpha in (0.0, 0.5, 1.5)]
    found = model.generate(**inputs, max_new_tokens=10, do_sample=False, custom_generate=Decoder(points=points))
    for point, ids in zip(points, found.sequences, strict=True):
        for draft in ("none", "ngram", "source_pt", "source_ft"):
            with model.at(model.rule, point.alpha):
                alone = model.generate(
                    **inputs, max_new_tokens=10, do_sample=False, custom_generate=Decoder(draft, is_fixed=True)
                )
            assert torch.equal(ids[:, : alone.shape[1]], alone)


def test_the_model_called_by_itself_keeps_no_cache(model: EnsembleForCausalLM) -> None:
    ids = model.tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    with torch.no_grad():
        found = model(ids)
    assert found.past_key_values is None
    text = model.generate(ids, max_new_tokens=1, do_sample=False, custom_generate=Decoder("none"))
    assert int(found.logits[0, -1].argmax()) == int(text[0, -1])


@pytest.mark.parametrize("do_sample", [False, True])
def test_at_alpha_0_nobody_is_asked(model: EnsembleForCausalLM, do_sample: bool) -> None:
    ids = model.tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    member = text_member(model, "target_pt")
    before = member.num_evaluated
    options = {"max_new_tokens": 6, "do_sample": do_sample, "custom_generate": Decoder("none", seed=3)}
    with model.at(model.rule, 0.0):
        found = model.generate(ids, **options)
    assert member.num_evaluated == before
    alone = model.members["source_ft"].generate(ids, max_new_tokens=6, do_sample=False)
    assert do_sample or torch.equal(found, alone)


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
    source = own_log_prob(model, "source_pt", context, row["continuation"])
    ratio = sum(by_role["target_pt"].log_probs) - source
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


def test_a_choice_is_certain_where_each_point_has_one() -> None:
    """Points of a grid may be sure of different tokens; and only an open one says what is evaluated."""
    known, unknown = Bounds(0.5), Bounds(0.1, {(): 0.5})
    states: dict[str, Any] = {}
    base = np.array([[0.0, -5.0], [-5.0, 0.0]])
    question = Question(
        states, [Continuation(b"a")] * 2, Scores(base, np.full(2, -9.0), {"b": np.ones(2)}, [["b"]]), is_greedy=True
    )
    question.begun = {"b": known}
    question.bounds = {"b": [known, known]}
    assert question.is_certain
    question.bounds = {"b": [known, unknown]}
    question.scores = Scores(np.array([[0.0, -5.0], [0.0, 0.0]]), np.full(2, -9.0), {"b": np.ones(2)}, [["b"]])
    assert not question.is_certain
    assert question.weights().tolist() == [0.0, 1.0]


def test_tokenizers_of_one_vocabulary_may_write_otherwise(tmp_path: Path) -> None:
    """A pair shares what it knows of a tokenizer only where both read alike; padding changes nothing."""
    folder = save_text_members(tmp_path, "byte-level", "spaces", "eft")

    def writers(change: Callable[[dict[str, Any]], None]) -> int:
        path = folder.parent / "source_pt" / "tokenizer.json"
        data = json.loads(path.read_text(encoding="utf-8"))
        change(data)
        path.write_text(json.dumps(data), encoding="utf-8")
        members = EnsembleForCausalLM.from_pretrained(folder).member_set
        assert isinstance(members, TextMemberSet)
        return len({id(members.text.plan.readers[role].writer) for role in ("source_ft", "source_pt")})

    assert writers(lambda data: data.update(truncation=None)) == 1
    assert writers(lambda data: data.update(model=data["model"] | {"merges": data["model"]["merges"][:-1]})) == 2
