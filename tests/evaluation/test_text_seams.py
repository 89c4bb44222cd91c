"""Beginnings, ends and seams of texts: requests and lm-eval's tasks with tokenizers of several kinds."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from helpers.tiny import make_model, tables
from helpers.tokenizer_cases import make_byte_tokenizer, make_spaced_tokenizer
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ensembler import EnsembleConfig, EnsembleForCausalLM, score
from ensembler.errors import PromptError
from ensembler.evaluation.backends import TransformersBackend
from ensembler.evaluation.grid_lm import GridLM
from ensembler.evaluation.requests import encode_request
from ensembler.preflight import CheckedEnsemble, check_ensemble

KINDS = {"spaced": make_spaced_tokenizer, "bytes": make_byte_tokenizer}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def ensemble_of(tokenizer: Any) -> EnsembleForCausalLM:
    one, other = tables(2, vocab_size=len(tokenizer))
    model = EnsembleForCausalLM.from_members(rule="realign", alpha=0.5, members={"reference": one, "aligned": other})
    model.tokenizer = tokenizer
    return model


@pytest.fixture
def save_spaced(tmp_path: Path) -> Any:
    def save(tokenizer: Any) -> CheckedEnsemble:
        members = {}
        for seed, role in enumerate(("reference", "aligned")):
            model = make_model("llama", seed, vocab_size=len(tokenizer), max_position_embeddings=40)
            model.save_pretrained(tmp_path / role)
            tokenizer.save_pretrained(tmp_path / role)
            members[role] = str(tmp_path / role)
        return check_ensemble(EnsembleConfig(rule="realign", alpha=0.5, members=members))

    return save


def random_pairs(num: int = 60) -> list[tuple[str, str]]:
    chance = random.Random(3)
    texts = ["".join(chance.choices("ab ab  \n7.é東", k=chance.randint(3, 12))) for _ in range(2 * num)]
    return [(f"x{one}", f"{two}y") for one, two in zip(texts[:num], texts[num:], strict=True)]


@pytest.mark.parametrize("begin", [True, False])
def test_pairs_are_parted_as_by_lm_eval_and_merged_ones_are_marked(kind: str, begin: bool) -> None:
    tokenizer = KINDS[kind](begin=begin)
    lm = HFLM(pretrained=ensemble_of(tokenizer), tokenizer=KINDS[kind](begin=begin), device="cpu")
    num_merged = 0
    for prompt, text in [*random_pairs(), ("xa", "b7")]:
        context, continuation = lm._encode_pair(prompt, text)
        request = encode_request(tokenizer, prompt, [text], "it")
        assert (list(request.context), [list(one) for one in request.continuations]) == (context, [continuation])
        whole = tokenizer(prompt + text)["input_ids"]
        assert request.is_merged == (whole != [*context, *continuation])
        num_merged += request.is_merged
    assert (num_merged > 0) == (kind == "spaced")


def test_an_end_token_that_the_tokenizer_adds_is_neither_read_nor_scored(kind: str) -> None:
    plain, ending = KINDS[kind](begin=True), KINDS[kind](begin=True, end=True)
    for prompt, text in [*random_pairs(20), ("", "ab 7")]:
        one, other = (encode_request(tokenizer, prompt, [text], "it") for tokenizer in (plain, ending))
        assert one == other
        assert 2 not in (*one.context, *one.continuations[0])
    assert encode_request(ending, "a", ["b</s>"], "it").continuations[0][-1] == 2  # the text's own


def test_a_row_says_that_a_token_spans_the_end_of_its_prompt() -> None:
    model = ensemble_of(make_spaced_tokenizer())
    rows = [
        {"prompt": "7 a", "continuation": "b7"},
        {"prompt": "7", "continuation": " ab7"},
        {"prompt": "7 a", "choices": ["7", "b.7"]},
    ]
    assert [row.get("merged") for row in score(model, rows, alpha=0.5)] == [True, None, True]
    with pytest.raises(PromptError, match=r"rows\[0\]: the continuation is no token of its own; end the prompt where"):
        score(model, [{"prompt": "7 a", "continuation": "b"}])


def test_perplexity_tasks_score_no_second_begin_token(kind: str, save_spaced: Any) -> None:
    """As `score` does of a text, and unlike lm-eval, whose windows they have: one, or several."""
    texts = ["ab 7", "7" * 39, "ab 7. é東\n" * 12]
    checked = save_spaced(KINDS[kind](begin=True))
    model = EnsembleForCausalLM.from_checked(checked)
    grid_lm = GridLM(checked)
    grid_lm.take(TransformersBackend(model))
    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    found = grid_lm.loglikelihood_rolling(requests, disable_tqdm=True)
    expected = [row["log_prob"][0] for row in score(model, [{"text": text} for text in texts[:2]])]
    assert found[:2] == pytest.approx(expected, abs=1e-3)
    windows = [make_disjoint_window(one) for one in get_rolling_token_windows(grid_lm.tok_encode(texts[2]), 1, 40, 1)]
    assert len(windows) > 2
    assert windows[0][1][0] == 1
    windows[0][1].pop(0)
    total = 0.0
    for context, continuation in windows:
        ids = torch.tensor([[*context, *continuation]])
        with torch.no_grad():
            logprobs = model(ids[:, :-1]).logits[0, -len(continuation) :].log_softmax(-1)
        total += float(logprobs.gather(-1, ids[0, -len(continuation) :, None]).sum())
    assert found[2] == pytest.approx(total, abs=1e-3)


def test_texts_of_tasks_are_those_of_lm_eval(kind: str, save_spaced: Any) -> None:
    """Decoded by themselves: figures are to be those of lm-eval."""
    checked = save_spaced(KINDS[kind](begin=True))
    model = EnsembleForCausalLM.from_checked(checked)
    grid_lm = GridLM(checked)
    grid_lm.take(TransformersBackend(model, checked.require_tokenizer()))
    settings = {"until": ["zz"], "max_gen_toks": 12}
    requests = [Instance("generate_until", {}, (one, settings), i) for i, (one, _) in enumerate(random_pairs(12))]
    theirs = HFLM(pretrained=model, tokenizer=KINDS[kind](begin=True), device="cpu")
    assert grid_lm.generate_until(requests, disable_tqdm=True) == theirs.generate_until(requests, disable_tqdm=True)
