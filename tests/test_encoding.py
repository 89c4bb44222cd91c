"""Requests as tokens are HFLM's: its pairs, windows and prompts, cut where it cuts, and the same log-probs."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from tiny import make_model, make_tokenizer
from transformers import PreTrainedTokenizerFast

pytest.importorskip("lm_eval")

from task_cases import figures, recorded, run_lm_eval, write_tasks

from ensembler import EnsembleForCausalLM
from ensembler.demo import demo_folder
from ensembler.engine.grid import make_grid
from ensembler.errors import PromptError
from ensembler.evaluation.batches import make_batches
from ensembler.evaluation.encoding import cut, encode_examples, encode_generation, encode_pair, stop_strings
from ensembler.evaluation.examples import Continuation, Example, Generation, Rolling
from ensembler.evaluation.scoring import score_together
from ensembler.evaluation.task_loading import load_tasks

TEXTS = ["", " ", "a", "<s>", "ab cd", " ab", "a\n", "a  ", "<s>ab", "x</s>y", "The 9", "é", "\n\n", "yes", " no, 7 "]


def hflm(tokenizer: PreTrainedTokenizerFast, max_length: int = 32) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=make_model(vocab_size=max(64, len(tokenizer))),
        tokenizer=tokenizer,
        batch_size=1,
        device="cpu",
        max_length=max_length,
    )


def with_begin() -> PreTrainedTokenizerFast:
    """A tokenizer that puts a begin token before every text, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def of_demo() -> PreTrainedTokenizerFast:
    loaded: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(demo_folder())
    return loaded


@pytest.mark.parametrize("make", [make_tokenizer, with_begin, of_demo])
def test_pairs_are_those_of_hflm(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.api.instance import Instance

    tokenizer = make()
    model, seen = hflm(tokenizer), []
    monkeypatch.setattr(model, "_loglikelihood_tokens", lambda requests, **_: seen.extend(requests) or [])
    pairs = [(context, text) for context in TEXTS for text in TEXTS if text and not (context == "" and text == "<s>")]
    model.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs], disable_tqdm=True)
    assert len(seen) == len(pairs)
    for pair, (_, context, continuation) in zip(pairs, seen, strict=True):
        assert encode_pair(*pair, tokenizer) == (tuple(context), tuple(continuation)), pair


@pytest.mark.parametrize("make", [make_tokenizer, with_begin, of_demo])
def test_windows_are_those_of_hflm(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.api.instance import Instance

    tokenizer, draw = make(), random.Random(0)
    model = hflm(tokenizer, max_length=7)
    for length in [0, 1, 6, 7, 8, 13, 14, 15, 40]:
        text = "".join(draw.choices("abc d", k=length))
        seen: list[Any] = []

        def record(requests: list[Any], seen: list[Any] = seen, **_: Any) -> list[Any]:
            seen.extend(requests)
            return [(-1.5 * len(request[2]), False) for request in requests]

        monkeypatch.setattr(model, "_loglikelihood_tokens", record)
        (expected,) = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], True)
        (encoded,) = encode_examples([Example("t/test/0", {}, (Rolling(text),))], tokenizer, 7)
        found = [
            (context, continuation)
            for request in encoded.requests
            for context, continuations in request.windows()
            for continuation in continuations
        ]
        assert sorted(found) == sorted((tuple(context), tuple(ids)) for _, context, ids in seen)
        scores = [[(-1.5 * len(ids), False) for ids in r.continuations] for r in encoded.requests]
        assert encoded.answers(scores) == [expected]
        assert encoded.num_truncated == 0


@pytest.mark.parametrize("make", [make_tokenizer, with_begin, of_demo])
def test_prompts_are_those_of_hflm(make: Any) -> None:
    tokenizer = make()
    model = hflm(tokenizer)
    for text in filter(None, TEXTS):
        for room in (1, 2, 31):
            ids, num_cut = encode_generation(Generation(text, 32 - room, ()), tokenizer, 32, "x")
            expected, _ = model.tok_batch_encode([text], left_truncate_len=room)
            whole, _ = model.tok_batch_encode([text])
            assert ids == expected[0].tolist(), text
            assert num_cut == whole.shape[1] - len(ids)


def test_texts_are_cut_as_by_hflm(tokenizer: PreTrainedTokenizerFast) -> None:
    from lm_eval.models.utils import handle_stop_sequences, postprocess_generated_text

    for until in ((), ("e",), ("\n", "Q:"), ("</s>",), ("", "a")):
        stop = stop_strings(Generation("x", 3, until), tokenizer)
        assert stop == handle_stop_sequences(list(until), "</s>")
        for text in ("", "abc", "one two", "x\nQ: e", "e", "a</s>b"):
            assert cut(text, stop) == postprocess_generated_text(text, stop, None)


def scored(model: EnsembleForCausalLM, encoded: list[Any]) -> dict[int, list[Any]]:
    requests = [request for one in encoded for request in one.requests]
    found: dict[int, list[tuple[float, bool]]] = {}
    for batch in score_together(model, make_batches(requests, 3), make_grid([model.rule.name], [model.config.alpha])):
        for one in batch:
            found[one.request.number] = [(score.log_probs[0], score.is_greedy[0]) for score in one.scores]
    return {
        index: one.answers([found[request.number] for request in one.requests]) for index, one in enumerate(encoded)
    }


@pytest.mark.parametrize("max_length", [96, 12])
@pytest.mark.parametrize("name", ["choice", "pairs", "last_word", "text"])
def test_an_ensemble_scores_as_under_hflm(
    name: str,
    max_length: int,
    tmp_path: Path,
    base_change: EnsembleForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (task,) = load_tasks([str(write_tasks(tmp_path / "tasks") / f"{name}.yaml")])
    examples = task.examples()
    encoded = encode_examples(examples, tokenizer, max_length)
    results = run_lm_eval(task, base_change, tokenizer, max_length=max_length)
    answers = scored(base_change, encoded)
    for index, expected in recorded(results, task).items():
        for one, other in zip(answers[index], expected, strict=True):
            if name == "text":
                assert one == pytest.approx(other, abs=1e-3)
            else:
                assert one[0] == pytest.approx(other[0], abs=1e-3)
                assert one[1] == other[1]
    found = figures(task, examples, answers)
    for key, value in found.items():
        exact = key.startswith("acc")
        assert value == pytest.approx(results["results"][task.name][f"{key},none"], rel=0 if exact else 1e-3, abs=0)
    if max_length == 12 and name in ("choice", "pairs"):
        assert sum(one.num_truncated for one in encoded) > 0


def test_choices_of_one_context_are_one_request(tokenizer: PreTrainedTokenizerFast) -> None:
    same = Example("t/test/0", {}, tuple(Continuation("the cat", text) for text in (" sat", " r", " 42")))
    two = Example("t/test/1", {}, (Continuation("a x", " b"), Continuation("a y", " b")))
    encoded = encode_examples([same, two], tokenizer, 96)
    assert [[len(request.continuations) for request in one.requests] for one in encoded] == [[3], [1, 1]]
    assert [request.number for one in encoded for request in one.requests] == [0, 1, 2]
    assert [one.owners for one in encoded] == [((0, 1, 2),), ((0,), (1,))]
    assert encoded[1].answers([[(-1.0, True)], [(-2.0, False)]]) == [(-1.0, True), (-2.0, False)]
    # Choices of unequal length in a context too long for both lose unequal numbers of tokens.
    (short,) = encode_examples([same], tokenizer, 8)
    assert [request.num_positions for request in short.requests] == [8, 8, 8]
    assert short.num_truncated == 2
    assert sorted(owner for owners in short.owners for owner in owners) == [0, 1, 2]


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ((Continuation("a", " b"), Continuation("a", "")), r"^t/test/3: choice 1 \(''\) is no token of its own"),
        ((Continuation("", ""),), r"^t/test/3: the answer \(''\) is no token"),
        ((Continuation("", "<s>"),), r"^t/test/3: the answer \('<s>'\) is no token"),
        ((Continuation("a", "b" * 13),), "^t/test/3: the answer has 13 tokens; the context ends at 12"),
        ((Continuation("  ", "b"),), "^t/test/3 has no token before its continuation"),
    ],
)
def test_what_cannot_be_scored(requests: Any, message: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(PromptError, match=message):
        encode_examples([Example("t/test/3", {}, requests)], tokenizer, 12)


def test_a_prompt_without_room_for_its_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(PromptError, match=r"^x asks for 12 new tokens; the context ends at 12: lower"):
        encode_generation(Generation("abc", 12, ()), tokenizer, 12, "x")
    assert encode_generation(Generation("abc", 11, ()), tokenizer, 12, "x")[1] == 2
    with pytest.raises(PromptError, match=r"^x has an empty prompt"):
        encode_generation(Generation("", 3, ()), tokenizer, 12, "x")
