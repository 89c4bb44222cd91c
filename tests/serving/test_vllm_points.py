"""Every request of a batch has a rule and an α of its own: exact beside an ensemble at that point, on both runners.

`make test-vllm` runs this file twice, the second time with vLLM's V2 runner (helpers/triton_on_cpu).
"""

from __future__ import annotations

import inspect
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
from helpers.vllm_cases import engine, prompts_for

from ensembler import EnsembleForCausalLM
from ensembler.demo import demo_folder
from ensembler.engine.grid import GridPoint

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own: make test-vllm")
pytestmark = pytest.mark.vllm

ON_V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
ALPHAS = (0.0, 0.3, 0.8, 1.5, 4.0)
POINTS = [GridPoint(rule, alpha) for rule in ("base-change", "eft") for alpha in ALPHAS]
POINTS += [GridPoint(role, 0.0) for role in ("source_ft", "source_pt", "target_pt")]
NUM_TOKENS = 12
SLOTS = 7
"""Fewer than there are requests, so that slots are reused and moved."""
PIECE = 16
"""Tokens of a step: longer prompts are read in pieces."""


@dataclass(frozen=True)
class Request:
    """A prompt as ids, and the point that it is decoded at."""

    prompt: tuple[int, ...]
    point: GridPoint


@pytest.fixture(scope="module")
def llm() -> Iterator[Any]:
    # A small cache, so that requests are put off and begun again; V1 cannot seed a prompt that is read in pieces.
    with engine(
        demo_folder(),
        load_format="ensembler",
        max_num_seqs=SLOTS,
        max_num_batched_tokens=PIECE,
        block_size=32,
        num_gpu_blocks_override=7,
        disable_log_stats=False,
    ) as started:
        yield started


def make_requests(num: int, seed: int) -> list[Request]:
    """Return random prompts of 3 to 43 tokens at random points."""
    chance = random.Random(seed)
    prompts = prompts_for(134)
    return [
        Request(tuple(prompts[chance.randrange(32)] * chance.randint(1, 4))[:43], chance.choice(POINTS))
        for _ in range(num)
    ]


@lru_cache(maxsize=1)
def ensembles() -> dict[str, EnsembleForCausalLM]:
    own = EnsembleForCausalLM.from_pretrained(demo_folder())
    return {rule: EnsembleForCausalLM.from_config(own.config.replaced(rule=rule)) for rule in ("base-change", "eft")}


@lru_cache(maxsize=4096)
@torch.no_grad()
def logprobs_of(ids: tuple[int, ...], point: GridPoint) -> torch.Tensor:
    """Return the log-probs (tokens, V) behind every token of a text, by transformers."""
    given = torch.tensor([ids])
    if point.rule in ensembles():
        model: Any = ensembles()[point.rule]
        model.alpha = point.alpha
    else:
        model = ensembles()["eft"].members[point.rule]
    return model(input_ids=given).logits[0].float().log_softmax(-1)  # type: ignore[no-any-return]


@lru_cache(maxsize=4096)
def greedy(request: Request, num_tokens: int = NUM_TOKENS) -> list[int]:
    ids = request.prompt
    for _ in range(num_tokens):
        ids = (*ids, int(logprobs_of(ids, request.point)[-1].argmax()))
    return list(ids[len(request.prompt) :])


def ask(llm: Any, requests: Sequence[Request], **sampling: Any) -> list[Any]:
    """Return vLLM's outputs of requests that are in one batch, as far as there is room."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            **{"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True, **sampling},
            extra_args={"rule": one.point.rule, "alpha": one.point.alpha},
        )
        for one in requests
    ]
    prompts = [{"prompt_token_ids": list(one.prompt)} for one in requests]
    return list(llm.generate(prompts, params, use_tqdm=False))


def tokens_of(output: Any) -> list[int]:
    return list(output.outputs[0].token_ids)


def test_mixed_points_slots_that_move_prompts_in_pieces_and_preemption(llm: Any) -> None:
    requests = make_requests(60, seed=0)
    assert len({one.point for one in requests}) == len(POINTS)
    outputs = ask(llm, requests, logprobs=0)
    for request, output in zip(requests, outputs, strict=True):
        found = tokens_of(output)
        assert found == greedy(request), request.point
        exact = logprobs_of((*request.prompt, *found), request.point)
        for place, (token, step) in enumerate(zip(found, output.outputs[0].logprobs, strict=True)):
            assert step[token].logprob == pytest.approx(float(exact[len(request.prompt) + place - 1, token]), abs=1e-3)
    if not ON_V2:
        counted = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
        assert counted["vllm:num_preemptions"] > 0


def test_prompt_logprobs_are_those_of_the_point(llm: Any) -> None:
    requests = make_requests(12, seed=1)
    for request, output in zip(requests, ask(llm, requests, prompt_logprobs=0, max_tokens=2), strict=True):
        exact = logprobs_of(request.prompt, request.point)
        for place, entries in enumerate(output.prompt_logprobs[1:]):
            token = request.prompt[place + 1]
            assert entries[token].logprob == pytest.approx(float(exact[place, token]), abs=1e-3)
        assert tokens_of(output) == greedy(request, 2)


def test_requests_that_come_and_leave_while_others_run(llm: Any) -> None:
    from vllm import SamplingParams

    requests = make_requests(24, seed=2)
    running, texts, engine = {}, {}, llm.llm_engine
    chance = random.Random(3)
    waiting = list(enumerate(requests))
    while waiting or running:
        for number, one in [waiting.pop() for _ in range(min(len(waiting), chance.randint(0, 3)))]:
            params = SamplingParams(
                temperature=0,
                max_tokens=NUM_TOKENS,
                ignore_eos=True,
                extra_args={"rule": one.point.rule, "alpha": one.point.alpha},
            )
            engine.add_request(f"come-{number}", {"prompt_token_ids": list(one.prompt)}, params)
            running[f"come-{number}"] = number
        if running and chance.random() < 0.1:
            leaving = chance.choice(sorted(running))
            del running[leaving]
            engine.abort_request([leaving])
        if not running:
            continue
        for output in engine.step():
            if output.finished and output.request_id in running:
                texts[running.pop(output.request_id)] = tokens_of(output)
    assert 8 <= len(texts) < len(requests)
    for number, found in texts.items():
        assert found == greedy(requests[number])


def test_penalties_see_the_mixture(llm: Any) -> None:
    """The largest logit of the mixture less the penalty, by hand."""
    requests = make_requests(10, seed=4)
    for request, output in zip(requests, ask(llm, requests, presence_penalty=1.5), strict=True):
        ids: list[int] = []
        for _ in range(NUM_TOKENS):
            scores = logprobs_of((*request.prompt, *ids), request.point)[-1].clone()
            scores[sorted(set(ids))] -= 1.5
            ids.append(int(scores.argmax()))
        assert tokens_of(output) == ids


@pytest.mark.skipif(not ON_V2, reason="V1 cannot seed a prompt in pieces on a CPU; test_vllm_texts has whole ones")
def test_seeds_and_samples(llm: Any) -> None:
    short = [Request(one.prompt[:6], one.point) for one in make_requests(5, seed=5)]
    first, again = (ask(llm, short, temperature=1.0, n=3, seed=11) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert [list(each.token_ids) for each in one.outputs] == [list(each.token_ids) for each in other.outputs]
    alone = ask(llm, short[:1], temperature=1.0, n=3, seed=11)
    assert [list(one.token_ids) for one in alone[0].outputs] == [list(one.token_ids) for one in first[0].outputs]
    assert any(len({tuple(each.token_ids) for each in one.outputs}) > 1 for one in first)


def test_requests_without_arguments_are_at_the_folders_point(llm: Any) -> None:
    from vllm import SamplingParams

    request = Request(tuple(prompts_for(134)[9]), GridPoint("base-change", 0.8))
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    (output,) = llm.generate([{"prompt_token_ids": list(request.prompt)}], params, use_tqdm=False)
    assert tokens_of(output) == greedy(request)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -1}, "alpha is -1"),
        ({"alpha": "0.5"}, "alpha is '0.5'; expected a finite number"),
        ({"alpha": 1e39}, "expected a number within float32"),
        ({"rule": "contrastive"}, "rule is 'contrastive', which cannot be served"),
        ({"alhpa": 1}, "did you mean alpha?"),
    ],
)
def test_bad_values_are_refused_and_the_engine_goes_on(arguments: dict[str, Any], message: str, llm: Any) -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError) as found:
        llm.generate([{"prompt_token_ids": [5, 6]}], SamplingParams(extra_args=arguments), use_tqdm=False)
    assert message in str(found.value)
    request = make_requests(1, seed=6)[0]
    assert tokens_of(ask(llm, [request])[0]) == greedy(request)


def test_the_private_parts_of_vllm_that_this_uses() -> None:
    """Name the parts that vllm_weights, vllm_model and vllm_serve build on beside vLLM's public API."""
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.sample.logits_processor.interface import BatchUpdate, LogitsProcessor
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.model_states import resolve_model_state_cls
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as ProcessorV2

    def names(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)

    (ours,) = entry_points(group="vllm.logits_processors", name="ensembler")
    processor = ours.load()
    assert issubclass(processor, LogitsProcessor)
    assert issubclass(processor, ProcessorV2)
    assert not processor.__abstractmethods__
    assert {"added", "moved", "removed"} <= BatchUpdate.__dataclass_fields__.keys()
    assert names(LogitsProcessor.__init__) == ["self", "vllm_config", "device", "is_pin_memory"]
    assert names(ProcessorV2.__init__) == ["self", "vllm_config", "req_states"]
    assert "attn_metadata" in ForwardContext.__dataclass_fields__
    assert names(DefaultModelState.add_request) == ["self", "req_index", "new_req_data"]
    assert names(DefaultModelState.prepare_inputs) == ["self", "input_batch", "req_states"]
    assert names(DefaultModelState.prepare_dummy_inputs) == ["self", "num_reqs", "num_tokens"]
    assert names(DefaultModelState.apply_staged_writes) == ["self"]
    batch = {"num_reqs", "num_tokens_after_padding", "query_start_loc", "idx_mapping"}
    assert batch <= InputBatch.__dataclass_fields__.keys()
    assert "get_model_state_cls" in inspect.getsource(resolve_model_state_cls)
    assert {"speculative_config", "scheduler_config", "device_config"} <= VllmConfig.__dataclass_fields__.keys()
    assert names(AsyncLLM.generate)[:4] == ["self", "prompt", "sampling_params", "request_id"]
