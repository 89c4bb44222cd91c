"""A member that computes NaN ends the requests that meet it, by name, and no others; on both runners."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.vllm_cases import prompts_for, spoil

from ensembler import EnsembleForCausalLM
from ensembler.decoding.decoding_options import DecodingOptions
from ensembler.decoding.prompts import EncodedPrompt
from ensembler.decoding.texts import complete_grid
from ensembler.demo import demo_folder
from ensembler.engine.grid import GridPoint
from ensembler.errors import LogitsError
from ensembler.evaluation.backends import VllmBackend
from ensembler.evaluation.request_batches import make_batches
from ensembler.evaluation.requests import ScoringRequest
from ensembler.folder import read
from ensembler.preflight import check_ensemble
from ensembler.serving.request_points import ServedRules
from ensembler.serving.vllm_engine import Engine, complete_in_engine

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own: make test-vllm")
pytestmark = pytest.mark.vllm

ON_V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
BROKEN = 77
"""The id whose embedding is NaN in source PT."""
POINT, ALONE = GridPoint("base-change", 0.8), GridPoint("source_ft", 0.0)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = spoil(tmp_path_factory.mktemp("spoilt") / "family", "source_pt", BROKEN)
    # Few blocks, so that others get those of requests that failed.
    arguments = {"enforce_eager": True, "max_model_len": 96, "block_size": 32, "num_gpu_blocks_override": 12}
    with Engine(check_ensemble(read(folder)), arguments) as started:
        yield started


def whole_and_broken() -> tuple[list[EncodedPrompt], list[EncodedPrompt]]:
    prompts = [[token for token in ids if token != BROKEN] for ids in prompts_for(134)]
    whole = [EncodedPrompt(number, ids) for number, ids in enumerate(prompts)]
    broken = [EncodedPrompt(100 + number, [*ids[:2], BROKEN, *ids[2:]]) for number, ids in enumerate(prompts[:8])]
    return whole, broken


def ask(engine: Engine, prompts: list[EncodedPrompt], points: list[GridPoint], **options: Any) -> dict[int, Any]:
    tokenizer = check_ensemble(read(demo_folder())).require_tokenizer()
    found = complete_in_engine(engine, tokenizer, prompts, points, DecodingOptions(8, **options))
    return {one.number: one.samples for one in found}


def test_the_member_is_named_and_others_go_on(engine: Engine) -> None:
    whole, broken = whole_and_broken()
    model = EnsembleForCausalLM.from_pretrained(demo_folder())
    tokenizer = model.tokenizer
    exact = {one.number: one.samples for one in complete_grid(model, tokenizer, whole, [POINT], DecodingOptions(8))}
    top = {} if ON_V2 else {"top_k": 5}  # its kernel is none for Triton's interpreter
    for options in ({}, {"temperature": 0.7, "seed": 3, "repetition_penalty": 1.3, **top}):
        with pytest.raises(LogitsError, match="source_pt computed NaN logits, which ended this request"):
            ask(engine, broken[:1], [POINT], **options)
    for _ in range(2):
        with pytest.raises(LogitsError, match="source_pt computed NaN"):
            ask(engine, [*broken, *whole], [POINT])
        assert ask(engine, whole, [POINT]) == exact


def test_a_member_that_a_request_does_not_use_does_not_end_it(engine: Engine) -> None:
    _, broken = whole_and_broken()
    found = ask(engine, broken, [ALONE])
    model = EnsembleForCausalLM.from_pretrained(demo_folder()).members["source_ft"]
    for prompt in broken:
        ids = list(prompt.ids)
        for token in found[prompt.number][ALONE][0].ids:
            with torch.no_grad():
                assert int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)


def test_outputs_of_one_batch(engine: Engine) -> None:
    """The broken requests stop at once, at the member's id, and the others run on."""
    from vllm import SamplingParams

    whole, broken = whole_and_broken()
    asked = [*broken[:4], *whole[:12]]
    params = [
        SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, stop_token_ids=[134, 135, 136]) for _ in asked
    ]
    outputs = engine._llm.generate([{"prompt_token_ids": one.ids} for one in asked], params, use_tqdm=False)
    for prompt, output in zip(asked, outputs, strict=True):
        (one,) = output.outputs
        # Of the folder's rule the members are source FT, target PT, source PT.
        assert (one.stop_reason, len(one.token_ids)) == ((136, 1) if BROKEN in prompt.ids else (None, 6))


def test_texts_that_are_scored(engine: Engine) -> None:
    whole, broken = whole_and_broken()
    backend = VllmBackend(engine, None)

    def score(prompts: list[EncodedPrompt]) -> list[Any]:
        requests = [ScoringRequest(n, tuple(one.ids), ((5, 6),), "") for n, one in enumerate(prompts)]
        batches = make_batches(requests, 8, share_contexts=False)
        return [one for batch in backend.score(batches, [POINT]) for one in batch]

    with pytest.raises(LogitsError, match="source_pt computed NaN"):
        score(broken[:1])
    assert all(-50 < score.log_probs[0] < 0 for one in score(whole[:2]) for score in one.scores)


def outputs_of(stops: list[list[Any]], rules: ServedRules) -> tuple[list[Any], bool, Any]:
    """Return what comes through of outputs with these stop reasons, whether the engine's was closed, its params."""
    closed: list[bool] = []
    params = SimpleNamespace(stop_token_ids=[5])
    params.clone = lambda: SimpleNamespace(stop_token_ids=params.stop_token_ids)

    async def generate(prompt: Any, sampling_params: Any, request_id: str) -> AsyncGenerator[Any, None]:
        assert sampling_params.stop_token_ids == [5, 134, 135, 136]
        try:
            for reasons in stops:
                yield SimpleNamespace(outputs=[SimpleNamespace(stop_reason=one) for one in reasons])
        finally:
            closed.append(True)

    async def run() -> list[Any]:
        from ensembler.serving.vllm_failures import end_with_error

        return [one async for one in end_with_error(generate, rules)("x", params, request_id="1")]

    return asyncio.run(run()), closed == [True], params


def test_the_server_is_given_an_error_for_a_text_that_ended_so() -> None:
    from vllm.exceptions import VLLMServerError

    rules = ServedRules(check_ensemble(read(demo_folder())))
    found, closed, params = outputs_of([[None, None], ["stop", 5]], rules)
    assert (len(found), closed, params.stop_token_ids) == (2, True, [5])
    with pytest.raises(VLLMServerError, match="source_pt computed NaN"):
        outputs_of([[None, None], [None, 136]], rules)
