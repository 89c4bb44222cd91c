"""Members are asked for tokens as HFLM makes them, and bad requests are refused before any member is loaded."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapter_cases import save_adapter, save_base
from helpers.scoring_cases import save_models
from helpers.tiny import make_model, make_tokenizer, tables
from transformers import PreTrainedTokenizerFast

pytest.importorskip("lm_eval")

from helpers.sweep_cases import Ensemble, save_ensemble
from lm_eval.models.huggingface import HFLM

from ensembler import EnsembleConfig, EnsembleForCausalLM, MemberConfig
from ensembler.decoding.decoding_options import DecodingOptions
from ensembler.engine.grid import GridPoint
from ensembler.errors import ConfigError, PromptError, RunError
from ensembler.evaluation.backends import TransformersBackend
from ensembler.evaluation.documents import Document
from ensembler.evaluation.provenance import describe_ensemble
from ensembler.evaluation.text_answers import TextAnswerer
from ensembler.patch.extract import extract_patch
from ensembler.preflight import check_ensemble
from ensembler.safetensors_files import stored_tensors

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


def begun_once(whole: list[int], scored: list[int]) -> tuple[list[int], list[int]]:
    """A text to which HFLM and its tokenizer each give a begin token: ours scores none behind the first."""
    is_twice = len(whole) == len(scored) + 1 and whole[:2] == [1, 1]
    return (whole[1:], scored[1:]) if is_twice else (whole, scored)


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
        tokens = [one.tokens for one in answerer.encode_requests(asked)]
        found = [([*context, *continuation], list(continuation)) for context, continuation in tokens]
        is_text = kind == "loglikelihood_rolling"
        assert found == ([begun_once(*one) for one in seen] if is_text else seen)
        seen.clear()
    for text in filter(None, TEXTS):
        (prompt,) = answerer.encode_requests(document("generate_until", (text, {"max_gen_toks": 4})))
        assert list(map(list, prompt.tokens)) == hflm.tok_batch_encode([text], left_truncate_len=6)[0].tolist()


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
        answerer_of(make_tokenizer(), tmp_path, 12).encode(document(kind, *arguments))


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
    seen: list[DecodingOptions] = []

    class Recorder:
        def complete(self, prompts: Any, points: Any, given: DecodingOptions) -> Any:
            seen.append(given)
            return []

    model = TextAnswerer(trio.checked).model
    model._max_length = 300
    model.take(Recorder())
    requests = list(document("generate_until", ("abc", settings)).requests)
    if isinstance(options, str):
        with pytest.raises(ConfigError, match=options):
            model.generate_until(requests, disable_tqdm=True)
    else:
        model.generate_until(requests, disable_tqdm=True)
        assert seen == [DecodingOptions(**{"seed": 0, "stop": ("</s>",), **options})]


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


def test_a_reading_counts_what_the_members_take(trio: Ensemble) -> None:
    answerer = TextAnswerer(trio.checked)
    answerer.model._max_length = 8
    choice = answerer.encode(document("loglikelihood", ("abc", " d"), ("abc", " defg")))
    assert (choice.length, choice.num_scored, choice.num_cut) == (7, 7, 0)
    text = answerer.encode(document("generate_until", ("abcdefg", {"max_gen_toks": 4})))
    assert (text.length, text.num_scored, text.num_cut) == (7, 4, 1)  # the last token is read by nobody


def test_errors_name_the_document_or_the_text() -> None:
    anchor, other = tables(2)
    with torch.no_grad():
        anchor.table[make_tokenizer()("c").input_ids[-1]] = -math.inf
    model = EnsembleForCausalLM.from_members(rule="contrastive", members={"expert": anchor, "amateur": other})
    members = TransformersBackend(model)
    checked = replace(check_ensemble(model.config, dict(model.members.items())), tokenizer=make_tokenizer())
    answerer = TextAnswerer(checked)
    answerer.model.take(members)
    for kind, asked, name in (
        ("loglikelihood", ("abc", "d"), "document 3 of t"),
        ("loglikelihood_rolling", "abcd", "the text that begins with '<s>abcd'"),
    ):
        with pytest.raises(RunError, match=f"^no log-prob could be computed in the batch of {name}: "):
            list(answerer.answer([[document(kind, asked)]], [GridPoint("contrastive", 0.5)]))


@pytest.mark.parametrize(
    ("kind", "asked", "length", "num_rows"),
    [("loglikelihood", " de", 3 + 3 - 1, 1), ("generate_until", {"max_gen_toks": 4}, 3 + 4 - 1, 3 * 2)],
)
def test_the_largest_batch_fits_with_all_rows_of_its_texts(
    kind: str, asked: Any, length: int, num_rows: int, trio: Ensemble, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake memory holds 100 tokens; each text is generated at 3 points, twice."""
    answerer = TextAnswerer(trio.checked)
    sizes = []

    def call(tokens: torch.Tensor) -> torch.Tensor:
        sizes.append(tuple(tokens.shape))
        if tokens.numel() > 100:
            raise RuntimeError("CUDA out of memory.")
        return torch.zeros(1, 1)

    monkeypatch.setattr(answerer.model, "_model_call", call)
    one = document(kind, ("abc", asked))
    one.requests[0].repeats = 2
    points = [GridPoint("base-change", alpha) for alpha in (0.0, 0.5, 1.0)]
    found = answerer.largest_batch(one, points)
    assert sizes[0] == (64, length)
    assert sizes[-1][0] * length <= 100
    assert found == sizes[-1][0] // num_rows > 1


def described(base: Path, *, verify_weights: bool = False, **settings: Any) -> dict[str, Any]:
    """The description in rows of an ensemble with one member that has these settings."""
    members = {"source_ft": MemberConfig(str(base), **settings), "source_pt": MemberConfig(str(base))}
    checked = check_ensemble(EnsembleConfig(members={**members, "target_pt": members["source_pt"]}))
    return dict(describe_ensemble(checked, verify_weights=verify_weights)["members"]["source_ft"])


def test_weights_that_were_replaced_are_noticed_wherever_they_differ(tmp_path: Path) -> None:
    """Behind the 4 KiB of the fingerprint by the times of files, or by their bytes; a copy keeps the times."""
    base = save_base(tmp_path / "base", intermediate_size=128)
    copied = Path(shutil.copytree(base, tmp_path / "elsewhere" / "base"))
    by_times, by_bytes = described(base), described(base, verify_weights=True)
    assert described(copied) == by_times
    assert described(copied, verify_weights=True) == by_bytes
    file = base / "model.safetensors"
    content = bytearray(file.read_bytes())
    large = next(one for one in stored_tensors(file).values() if one.num_bytes > 4096)
    content[large.start + large.num_bytes - 1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(1, 1))
    assert described(base)["fingerprint"] == by_times["fingerprint"]
    assert described(base) != by_times
    assert described(base, verify_weights=True) != by_bytes
    shutil.copyfile(copied / "model.safetensors", file)
    os.utime(file, ns=(2, 2))
    assert described(base) != by_times  # the same bytes, written anew
    assert described(base, verify_weights=True) == by_bytes


def test_a_file_that_stays_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, hashed = save_base(tmp_path / "base"), []
    monkeypatch.setattr("ensembler.evaluation.provenance.file_digest", lambda path: hashed.append(path) or "0")
    for _ in range(3):
        described(base, verify_weights=True)
    assert hashed == [base / "model.safetensors"]
    os.utime(base / "model.safetensors", ns=(1, 1))
    described(base, verify_weights=True)
    assert len(hashed) == 2


def test_an_adapter_goes_by_its_files_wherever_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, cache = save_base(tmp_path / "base"), tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    commits = {"1" * 40: 5, "2" * 40: 6}
    found = []
    for commit, seed in commits.items():
        save_adapter(base, cache / "models--me--lora" / "snapshots" / commit, seed=seed)
        (cache / "models--me--lora" / "refs").mkdir(exist_ok=True)
        (cache / "models--me--lora" / "refs" / "main").write_text(commit)
        found.append(described(base, adapter="me/lora"))
        local = described(base, adapter=str(cache / "models--me--lora" / "snapshots" / commit))
        assert found[-1]["adapter_sha256"] == local["adapter_sha256"]
        assert (found[-1]["adapter"], local["adapter"]) == ("me/lora", commit)
    assert found[0]["adapter_sha256"] != found[1]["adapter_sha256"]


def test_deltas_without_a_lora_go_by_their_file(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    hashes = []
    for seed in (3, 4):
        extract_patch(base, save_base(tmp_path / f"tuned{seed}", seed=seed), tmp_path / f"patch{seed}", full=True)
        hashes.append(described(base, adapter=str(tmp_path / f"patch{seed}"))["adapter_sha256"])
    assert hashes[0] != hashes[1]


def test_devices_are_part_of_what_answers_depend_on(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    spread = described(base, device_map="auto", max_memory={"cpu": "10GiB"})
    assert spread == {**described(base), "device_map": "auto"}
