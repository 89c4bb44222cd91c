"""Scores against a plain reference, together and one member at a time, on any batch, after any interruption."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.scoring_cases import (
    CASES,
    REQUESTS,
    Case,
    alone,
    offline,
    reference,
    together,
)
from helpers.tiny import make_tokenizer
from transformers import PreTrainedTokenizerFast

from ensembler import EnsembleForCausalLM
from ensembler.engine.grid import make_grid
from ensembler.engine.model_runner import ModelRunner
from ensembler.errors import PromptError
from ensembler.evaluation.backends import TransformersBackend
from ensembler.evaluation.offline import LogitsFolder
from ensembler.evaluation.request_batches import make_batches
from ensembler.evaluation.requests import ScoringRequest, encode_request, group_by_context, read_requests
from ensembler.preflight import check_ensemble


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_reference_in_any_batch(case: Case, tmp_path: Path) -> None:
    model = EnsembleForCausalLM.from_config(case.config(tmp_path))
    members = dict(model.members.items())
    low = any(member.dtype != torch.float32 for member in members.values())
    # In bf16, forwards of other shapes round differently: there, sequences that both sides run alone.
    compared = [request for request in REQUESTS if not low or len(request.continuations) == 1]
    expected = {request.number: reference(case, members, request) for request in compared}
    for batch_size in (1,) if low else (1, 3, 8):
        found = together(model, batch_size)
        assert len(found) == len(REQUESTS)
        for number, wanted in expected.items():
            for score, by_alpha in zip(found[number], wanted, strict=True):
                log_probs, is_greedy = zip(*by_alpha, strict=True)
                assert score.log_probs == pytest.approx(log_probs, rel=1e-5, abs=1e-5), (number, batch_size)
                assert score.is_greedy == is_greedy, (number, batch_size)


@pytest.mark.parametrize(("batch_size", "share_contexts"), [(1, False), (4, False), (4, True)])
def test_one_at_a_time_is_exactly_together(
    case: Case, tmp_path: Path, batch_size: int, share_contexts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ensembler.evaluation.request_batches._FORWARD", 0)
    config = case.config(tmp_path)
    folder = LogitsFolder(tmp_path / "out.members", {"seed": 1})
    found = offline(check_ensemble(config.replaced()), folder, batch_size, share_contexts=share_contexts)
    model = EnsembleForCausalLM.from_config(config)
    assert found == together(model, batch_size, share_contexts=share_contexts)
    assert not folder.path.exists()


def test_contexts_that_are_shared_change_no_score(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "ensembler.evaluation.request_batches._FORWARD", -(10**6)
    )  # wherever there is more than one tail
    model = EnsembleForCausalLM.from_config(case.config(tmp_path))
    low = any(member.dtype != torch.float32 for member in model.members.values())
    for batch_size in (1, 3, 8):
        batches = make_batches(REQUESTS, batch_size, share_contexts=True)
        assert any(one.is_forked for batch in batches for one in batch.passes)
        whole = together(model, batch_size)
        shared = together(model, batch_size, share_contexts=True)
        for number, scores in shared.items():
            for score, expected in zip(scores, whole[number], strict=True):
                tolerance = 0.3 if low else 1e-4
                assert score.log_probs == pytest.approx(expected.log_probs, abs=tolerance), (number, batch_size)
                assert low or score.is_greedy == expected.is_greedy


def test_a_grid_is_one_alpha_at_a_time(base_change: EnsembleForCausalLM) -> None:
    grid = [k / 10 for k in range(16)]
    found = together(base_change, 4, grid)
    for k, alpha in enumerate(grid):
        alone = together(base_change, 4, [alpha])
        for number, scores in alone.items():
            for one, score in zip(scores, found[number], strict=True):
                assert score.log_probs[k] == pytest.approx(one.log_probs[0], rel=1e-5, abs=1e-5)
                assert score.is_greedy[k] == one.is_greedy[0]


def test_at_alpha_0_the_score_is_the_anchors(base_change: EnsembleForCausalLM) -> None:
    request = ScoringRequest(0, (5, 9, 11), ((7, 8),), "it")
    found = alone(base_change, request, [0.0])
    with torch.no_grad():
        logprobs = base_change.anchor(torch.tensor([[5, 9, 11, 7]])).logits[0].log_softmax(-1)
    assert found.scores[0].log_probs[0] == pytest.approx(float(logprobs[2, 7] + logprobs[3, 8]), abs=1e-5)


def test_greedy_is_what_generate_says(base_change: EnsembleForCausalLM) -> None:
    ids = torch.tensor([[5, 9, 11]])
    new = base_change.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)[0, 3:].tolist()
    other = [*new[:-1], 4 if new[-1] != 4 else 5]
    request = ScoringRequest(0, (5, 9, 11), (tuple(new), tuple(other)), "it")
    found = alone(base_change, request, [0.7])
    assert [score.is_greedy for score in found.scores] == [(True,), (False,)]


def test_a_forbidden_token_has_log_prob_minus_infinity(tmp_path: Path) -> None:
    model = EnsembleForCausalLM.from_config(CASES["extended"].config(tmp_path))
    request = ScoringRequest(0, (5, 66, 11), ((7,), (66,)), "it", has_choices=True)
    found = alone(model, request, [0.0, 1.0])
    assert found.scores[1].log_probs == (-math.inf, -math.inf)
    assert all(log_prob > -math.inf for log_prob in found.scores[0].log_probs)
    assert found.to_row(make_grid([model.rule.name], [0.0, 1.0]))["choices"][1]["log_prob"] == [None, None]


# -- batches ----------------------------------------------------------------------------------------------------------


def test_choices_of_one_token_are_one_sequence_and_one_position() -> None:
    request = ScoringRequest(0, (5, 9, 11), ((7,), (8,), (9,), (7,)), "it")
    (batch,) = make_batches([request], 1)
    (only,) = batch.passes
    assert only.step.input_ids.tolist() == [[5, 9, 11]]
    assert only.step.logits_to_keep.tolist() == [2]
    assert (only.taken.tolist(), only.tokens.tolist()) == ([0], [7, 8, 9, 7])


def test_choices_that_begin_alike_share_positions_and_passes_keep_their_size() -> None:
    request = ScoringRequest(0, (5,), ((1, 2, 3), (1, 2, 4), (1, 6, 3), (1,), (9, 9)), "it")
    (batch,) = make_batches([request], 2, share_contexts=True)
    # behind the context: 1 2, 1 6, 9; positions: after 5, 5 1, 5 1 2, 5 1 6, 5 9
    assert [one.step.input_ids.tolist() for one in batch.passes] == [[[5, 1, 2], [5, 1, 6]], [[5, 9]]]
    assert [len(one.taken) for one in batch.passes] == [4, 1]
    assert sum(len(one.tokens) for one in batch.passes) == sum(map(len, request.continuations))


def test_only_needed_positions_go_through_the_heads(
    base_change: EnsembleForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []
    run = ModelRunner.run
    monkeypatch.setattr(ModelRunner, "run", lambda self, step, *more: kept.append(step) or run(self, step, *more))
    request = ScoringRequest(0, tuple(range(4, 40)), ((7, 8),), "it")
    alone(base_change, request, [1.0])
    assert [step.logits_to_keep.tolist() for step in kept] == 3 * [[35, 36]]


def test_the_longest_run_first(base_change: EnsembleForCausalLM) -> None:
    batches = make_batches(REQUESTS, 4)
    lengths = [request.num_positions for batch in batches for request in batch.requests]
    assert lengths == sorted(lengths, reverse=True)
    counted: list[int] = []
    together(base_change, 4, advance=counted.append)
    assert counted == [4, 4, 4, 1]


# -- texts ------------------------------------------------------------------------------------------------------------

PAIRS = [("abc", " de"), ("the cat ", "sat"), ("", "xyz"), ("one\n\n", " 3"), ("q", "q"), ("  ", "ab"), ("<s>ab", "c")]


def ids_of(tokenizer: Any, prompt: str, *texts: str) -> ScoringRequest:
    return encode_request(tokenizer, prompt, texts, "it")


def test_white_space_at_the_end_of_a_prompt_belongs_to_the_continuation(tokenizer: PreTrainedTokenizerFast) -> None:
    request = ids_of(tokenizer, "ab ", "c", "de")
    assert tokenizer.decode(request.context) == "ab"
    assert [tokenizer.decode(ids) for ids in request.continuations] == [" c", " de"]
    assert ids_of(tokenizer, "", "<s>c").continuations == ids_of(tokenizer, "", "c").continuations


def test_encodings_and_scores_are_those_of_lm_eval(base_change: EnsembleForCausalLM) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = make_tokenizer()
    lm = HFLM(pretrained=base_change, tokenizer=tokenizer, batch_size=3, device="cpu")
    pairs = [pair for pair in PAIRS if pair[0].strip() or not pair[0]]  # lm-eval stumbles over white space alone
    theirs = lm.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)])
    requests = [encode_request(tokenizer, prompt, [text], "it", number) for number, (prompt, text) in enumerate(pairs)]
    batches = make_batches(requests, 3)
    grid = make_grid([base_change.rule.name], [0.7])
    mine = {s.request.number: s.scores[0] for b in TransformersBackend(base_change).score(batches, grid) for s in b}
    for number, (log_prob, is_greedy) in enumerate(theirs):
        assert mine[number].log_probs[0] == pytest.approx(log_prob, rel=1e-5, abs=1e-5), pairs[number]
        assert mine[number].is_greedy[0] == is_greedy


@pytest.mark.parametrize(
    ("prompt", "texts", "message"),
    [
        ("abc", [""], "it: the continuation is empty"),
        ("abc", ["half \ud83d"], "not UTF-8 text"),
        ("half \ud83d", ["abc"], "not UTF-8 text"),
        ("a" * 38, ["abc"], "it has 40 tokens to read; the context of target_pt ends at 39"),
    ],
)
def test_what_cannot_be_scored_is_one_line(
    tokenizer: PreTrainedTokenizerFast, prompt: str, texts: list[str], message: str
) -> None:
    with pytest.raises(PromptError, match=message) as found:
        encode_request(tokenizer, prompt, texts, "it", context=("target_pt", 39))
    assert "\n" not in str(found.value)


def test_lines_that_cannot_be_scored_are_refused_or_skipped(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Bad JSON and what cannot be encoded alike; numbers are those of the lines."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": ""}\n{"prompt": "a", "continuation": "bc"}\noops\n{"text": "abcd"}\n')
    with pytest.raises(PromptError, match=r"data\.jsonl:1: the text is empty; .*; mend the line or add --skip-bad$"):
        read_requests(data, tokenizer)
    skipped: list[str] = []
    found = read_requests(data, tokenizer, context=("target_pt", 3), skip=skipped.append)
    assert [(one.number, one.has_choices, one.window) for one in found] == [(1, False, None), (3, False, 3)]
    assert [line.removeprefix(f"{data}:")[:10] for line in skipped] == ["1: the tex", "3 is no JS"]


def test_continuations_are_grouped_by_their_context(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("abc").input_ids
    pairs = [(ids[:2], ids[2:]), ((7,), (8, 9)), (ids[:2], (5,)), (ids[:2], ids[2:])]
    one, other = group_by_context(pairs, tokenizer, {(7,): "document 3 of sst2"})
    assert (one.number, one.context, one.continuations) == (0, tuple(ids[:2]), (tuple(ids[2:]), (5,)))
    assert (other.number, other.context, other.continuations) == (1, (7,), ((8, 9),))
    assert (one.source, other.source) == ("the text that begins with 'abc'", "document 3 of sst2")


def test_the_last_token_of_a_continuation_needs_no_room(
    base_change: EnsembleForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    context = base_change.shortest_context
    assert context is not None
    request = encode_request(tokenizer, "a" * (context[1] - 1), ["bc"], "it", context=context)
    assert alone(base_change, request, [0.7]).scores[0].num_tokens == 2
