"""What is asked of the members: tokens as HFLM makes them, and what is refused before any of them is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scoring_cases import save_models
from tiny import make_model, make_tokenizer
from transformers import PreTrainedTokenizerFast

pytest.importorskip("lm_eval")

from lm_eval.models.huggingface import HFLM
from sweep_cases import Ensemble, save_ensemble

from ensembler import EnsembleConfig
from ensembler.decoding.options import DecodingOptions
from ensembler.engine.grid import GridPoint
from ensembler.errors import ConfigError, PromptError
from ensembler.evaluation.documents import Document
from ensembler.evaluation.text_answers import TextAnswerer
from ensembler.preflight import check_ensemble

TEXTS = ["", " ", "a", "<s>", "ab cd", " ab", "a\n", "a  ", "<s>ab", "x</s>y", "The 9", "é", "\n\n", "yes", " no, 7 "]


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Ensemble:
    return save_ensemble(tmp_path_factory.mktemp("trio"))


def with_begin() -> PreTrainedTokenizerFast:
    """A tokenizer that puts a begin token before every text, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def document(kind: str, *arguments: Any) -> Document:
    """Requests of one kind, by their arguments."""
    from lm_eval.api.instance import Instance

    requests = tuple(
        Instance(kind, {}, given if isinstance(given, tuple) else (given,), number, metadata=("t", 3, 1))
        for number, given in enumerate(arguments)
    )
    return Document("t", "test", 3, {}, "", requests)


def answerer_of(tokenizer: PreTrainedTokenizerFast, folder: Path, max_length: int) -> TextAnswerer:
    members = save_models(
        folder,
        source_ft={"family": "llama", "max_position_embeddings": max_length},
        source_pt={"family": "llama"},
        target_pt={"family": "llama"},
    )
    for member in members.values():
        tokenizer.save_pretrained(member.model)
    return TextAnswerer(check_ensemble(EnsembleConfig(members=members)))


@pytest.mark.parametrize("make", [make_tokenizer, with_begin])
def test_tokens_are_those_of_hflm(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answerer = answerer_of(make(), tmp_path, 10)
    hflm = HFLM(pretrained=make_model(), tokenizer=make(), device="cpu", max_length=10)
    seen: list[tuple[list[int], list[int]]] = []

    def record(requests: list[Any], **_: Any) -> list[Any]:
        seen.extend(((context + continuation)[-11:], continuation) for _, context, continuation in requests)
        return [(0.0, False)] * len(requests)

    monkeypatch.setattr(hflm, "_loglikelihood_tokens", record)
    pairs = [(context, text) for context in TEXTS for text in TEXTS if text and not (context == "" and text == "<s>")]
    pairs = [pair for pair in pairs if pair[0].strip() or not pair[0] or make is with_begin]
    rolling = ["abc d" * num for num in range(1, 6)]
    for kind, arguments in (("loglikelihood", pairs), ("loglikelihood_rolling", rolling)):
        asked = document(kind, *arguments)
        getattr(hflm, kind)(list(asked.requests), disable_tqdm=True)
        found = [([*context, *continuation], list(continuation)) for context, continuation in answerer.tokens(asked)]
        assert found == seen
        seen.clear()
    for text in filter(None, TEXTS):
        (prompt,) = answerer.tokens(document("generate_until", (text, {"max_gen_toks": 4})))
        assert [list(prompt[0])] == hflm.tok_batch_encode([text], left_truncate_len=6)[0].tolist()


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("loglikelihood", [("a", " b"), ("a", "")], "the answer '' is no token of its own; give it more text"),
        ("loglikelihood", [("", "")], "an answer is no token of its own"),
        ("loglikelihood", [("", "<s>")], "the answer '<s>' is no token"),
        ("loglikelihood", [("a", "b" * 13)], "the answer has 13 tokens; the context ends at 12: shorten it"),
        ("loglikelihood", [("  ", "b")], "the prompt is no token of its own"),
        ("generate_until", [("abc", {"max_gen_toks": 12})], "12 new tokens are asked for and the context ends at 12"),
        ("generate_until", [("", {"max_gen_toks": 3})], "the prompt is empty"),
    ],
)
def test_what_cannot_be_asked(kind: str, arguments: list[Any], message: str, tmp_path: Path) -> None:
    """It is said before members are loaded, with the document's name."""
    with pytest.raises(PromptError, match=f"^t/test/3: {message}"):
        answerer_of(make_tokenizer(), tmp_path, 12).read(document(kind, *arguments))


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"until": "x"}, {"max_new_tokens": 256, "stop": ("x", "</s>")}),
        ({"temperature": 0.5, "top_p": 0.9}, {"max_new_tokens": 256, "temperature": 0.5, "top_p": 0.9}),
        ({"max_new_tokens": 3, "do_sample": True, "temperature": 1}, {"max_new_tokens": 3, "temperature": 1.0}),
        ({"do_sample": False, "temperature": 0.7, "top_k": 5}, {"max_new_tokens": 256}),
        ({"do_sample": True}, "samples at temperature 0; set one above 0"),
        ({"num_beams": 4}, "num_beams=4, which an ensemble does not know; expected settings are top_k"),
    ],
)
def test_settings_of_a_generation(settings: dict[str, Any], options: Any, trio: Ensemble) -> None:
    class Recorder:
        def complete(self, prompts: Any, points: Any, given: DecodingOptions) -> Any:
            assert given == DecodingOptions(**{"seed": 0, "stop": ("</s>",), **options})
            return []

    answerer = TextAnswerer(trio.checked)
    answerer.model._max_length = 300
    answerer.model.take(Recorder())
    asked = document("generate_until", ("abc", settings))
    if isinstance(options, str):
        with pytest.raises(ConfigError, match=options):
            answerer.read(asked)
    else:
        answerer.read(asked)


def test_requests_of_several_kinds(trio: Ensemble) -> None:
    """As in lm-eval's SQuAD v2."""
    text, pair = document("generate_until", ("ab", {"max_gen_toks": 4})), document("loglikelihood", ("ab", " c"))
    both = Document("t", "test", 3, {}, "", (*pair.requests, *text.requests, *pair.requests))
    points = [GridPoint("base-change", alpha) for alpha in (0.0, 0.7)]
    answerer = TextAnswerer(trio.checked)
    with answerer.open():
        found, texts, scores = (answers for (answers,) in answerer.answer([[both], [text], [pair]], points))
    for by_point, (one,), (other,) in zip(found, texts, scores, strict=True):
        assert by_point[1] == one
        assert by_point[0] == by_point[2] == [pytest.approx(other[0], abs=1e-5), other[1]]
