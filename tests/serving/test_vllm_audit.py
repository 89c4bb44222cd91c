"""Tokens are counted by rule and α where it was asked for: exact on both runners, and nothing without it.

`make test-vllm` runs this file twice, the second time with vLLM's V2 runner (helpers/triton_on_cpu).
"""

from __future__ import annotations

import inspect
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.vllm_cases import engine, prompts_for

from ensembler import EnsembleForCausalLM
from ensembler.demo import demo_folder
from ensembler.errors import ConfigError

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own: make test-vllm")
pytestmark = pytest.mark.vllm

ON_V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
READER = "ensembler.serving.vllm_audit.AuditReader"
NUM_TOKENS = 12
POINTS = [
    ("base-change", 0.0),
    ("base-change", 0.8),
    ("base-change", 4.0),
    ("eft", 1.5),
    ("eft", 0.0),
    ("target_pt", 0),
]
SMALL: dict[str, Any] = {
    "load_format": "ensembler",
    "max_num_seqs": 7,
    "max_num_batched_tokens": 16,  # of a step: longer prompts are read in pieces
    "block_size": 32,
    "num_gpu_blocks_override": 7,  # so that requests are put off and begun again
    "disable_log_stats": False,
}
Counted = dict[tuple[str, str], tuple[int, int]]


@pytest.fixture(scope="module")
def functions_in_workers() -> Iterator[None]:
    """Let `apply_model` send a function to vLLM's processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        yield


@pytest.fixture(scope="module")
def llm(functions_in_workers: None) -> Iterator[Any]:
    with engine(demo_folder(), worker_extension_cls=READER, **SMALL) as started:
        yield started


def read(llm: Any) -> Counted:
    (rows,) = llm.collective_rpc("read_audit")
    return {(rule, alpha): (tokens, changed) for rule, alpha, tokens, changed in rows}


def newly(llm: Any, before: Counted) -> Counted:
    """Return what was counted since `before`, without points of which nothing was."""
    now = {
        point: (n - before.get(point, (0, 0))[0], c - before.get(point, (0, 0))[1])
        for point, (n, c) in read(llm).items()
    }
    return {point: pair for point, pair in now.items() if pair != (0, 0)}


def ask(llm: Any, points: Sequence[tuple[str, float]], **sampling: Any) -> list[tuple[tuple[str, float], Any]]:
    """Return each point with the output of its request; prompts have 3 to 43 tokens, many more than a step."""
    from vllm import SamplingParams

    prompts = prompts_for(134)
    given = {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True, **sampling}
    params = [SamplingParams(**given, extra_args={"rule": rule, "alpha": alpha}) for rule, alpha in points]
    texts = [{"prompt_token_ids": (prompts[n % 32] * (1 + n % 4))[:43]} for n in range(len(points))]
    return list(zip(points, llm.generate(texts, params, use_tqdm=False), strict=True))


@torch.no_grad()
def by_hand(asked: list[tuple[tuple[str, float], Any]]) -> Counted:
    """Count the texts' tokens, and those where the largest log-prob of the point is another's than at α = 0."""
    own = EnsembleForCausalLM.from_pretrained(demo_folder())
    models: Any = {
        rule: EnsembleForCausalLM.from_config(own.config.replaced(rule=rule)) for rule in ("base-change", "eft")
    }
    counts: defaultdict[tuple[str, str], tuple[int, int]] = defaultdict(lambda: (0, 0))
    for (rule, alpha), output in asked:
        for one in output.outputs:
            ids = torch.tensor([[*output.prompt_token_ids, *one.token_ids]])
            best = []
            for number in (alpha, 0.0):
                if rule in models:
                    models[rule].alpha = number
                    best.append(models[rule](input_ids=ids).logits[0].argmax(-1))
            first, last = len(output.prompt_token_ids) - 1, ids.shape[1] - 1
            changed = int((best[0] != best[1])[first:last].sum()) if best else 0
            before = counts[rule, f"{alpha:g}"]
            counts[rule, f"{alpha:g}"] = (before[0] + len(one.token_ids), before[1] + changed)
    return dict(counts)


def test_exact_counts_of_mixed_points_prompts_in_pieces_and_preemption(llm: Any) -> None:
    assert read(llm) == {("base-change", "0.8"): (0, 0), ("base-change", "0"): (0, 0)}
    asked = ask(llm, POINTS * 10)
    found = newly(llm, {})
    assert found == by_hand(asked)
    assert all(tokens == 10 * NUM_TOKENS for tokens, _ in found.values())
    assert found["base-change", "4"][1] > found["base-change", "0.8"][1] > 0
    assert found["base-change", "0"][1] == found["eft", "0"][1] == found["target_pt", "0"][1] == 0
    if not ON_V2:
        counted = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
        assert counted["vllm:num_preemptions"] > 0


def test_log_probs_of_prompts_do_not_count(llm: Any) -> None:
    before = read(llm)
    asked = ask(llm, POINTS * 2, prompt_logprobs=0, max_tokens=3)
    assert newly(llm, before) == by_hand(asked)


def test_what_is_sampled_changes_no_tokens(llm: Any) -> None:
    """Tokens count as changed by the mixture's most probable one, whichever is taken."""
    before = read(llm)
    asked = ask(llm, POINTS, presence_penalty=1.5, logit_bias={9: 5.0})
    assert newly(llm, before) == by_hand(asked)


def test_of_many_points_the_last_are_counted_together(llm: Any) -> None:
    before = read(llm)
    asked = ask(llm, [("eft", number / 64) for number in range(1, 301)], max_tokens=1)
    found = newly(llm, before)
    exact = by_hand(asked)
    assert len(read(llm)) == 256
    alone = {point: pair for point, pair in found.items() if point != ("other", "other")}
    assert alone == {point: exact[point] for point in alone}
    assert sum(tokens for tokens, _ in found.values()) == 300
    assert sum(changed for _, changed in found.values()) == sum(changed for _, changed in exact.values())


def test_without_it_nothing_travels_with_the_weights(functions_in_workers: None) -> None:
    with engine(demo_folder(), own_process=True, **SMALL) as llm:
        ask(llm, POINTS)
        width, of_table = llm.apply_model(_widths)[0]
        with pytest.raises(Exception, match="read_audit"):
            llm.collective_rpc("read_audit")
    assert of_table == 2 * 3 + 2
    assert width == of_table


def test_with_it_one_more_number_travels(llm: Any) -> None:
    assert llm.apply_model(_widths)[0] == (9, 10)


def _widths(model: Any) -> tuple[int, int]:
    """Return how many fp32 numbers travel with each token's hidden states, and how many are kept for a request."""
    return model._columns * model._dtype.itemsize // 4, model._slots.table.shape[1]


def test_arguments_of_the_server() -> None:
    from ensembler.serving.vllm_serve import AUDIT, serve_command, set_arguments

    command = serve_command(demo_folder(), name="family", flags=[], audit=True)
    assert AUDIT in json.loads(command[3])["middleware"]
    assert AUDIT not in json.loads(serve_command(demo_folder(), name="family", flags=[])[3])["middleware"]
    args: Any = SimpleNamespace(
        load_format="auto",
        hf_overrides=None,
        quantization=None,
        speculative_config=None,
        enable_dbo=False,
        enable_prompt_embeds=False,
        model_tag=str(demo_folder()),
        tensor_parallel_size=1,
        dtype="auto",
        middleware=[AUDIT],
        worker_extension_cls="",
    )
    set_arguments(args, None)
    assert args.worker_extension_cls == READER
    args.worker_extension_cls = "mine.Worker"
    with pytest.raises(ConfigError, match=r"--worker-extension-cls mine\.Worker was given"):
        set_arguments(args, None)
    args.middleware = []
    set_arguments(args, None)
    assert args.worker_extension_cls == "mine.Worker"


def test_the_private_parts_of_vllm_that_this_uses() -> None:
    """Name the parts that audit, vllm_audit and vllm_weights build on beside vLLM's public API."""
    from vllm.config import ParallelConfig
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.engine.core_client import AsyncMPClient
    from vllm.v1.worker.gpu import model_runner, warmup
    from vllm.v1.worker.gpu_input_batch import InputBatch

    assert "worker_extension_cls" in ParallelConfig.__dataclass_fields__
    assert {"req_id", "prefill_token_ids"} <= NewRequestData.__dataclass_fields__.keys()
    assert list(inspect.signature(AsyncMPClient.call_utility_all_async).parameters) == ["self", "method", "args"]
    for prefix in ('f"_warmup_{i}_"', 'req_id_prefix: str = "_v2_mixed_warmup"', 'f"{req_id_prefix}_decode_"'):
        assert prefix in inspect.getsource(warmup)
    step = inspect.getsource(model_runner.GPUModelRunner.sample_tokens)
    assert step.index("self.sample(") < step.index("compute_prompt_logprobs(")  # the first logits are those to sample
    added = inspect.getsource(InputBatch._register_add_request)
    assert added.index("request.prompt_token_ids") < added.index("request.output_token_ids")
