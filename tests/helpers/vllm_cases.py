"""Shared parts of the tests of the vLLM backend: its settings on a CPU, engines, saved members, comparisons."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from helpers.tiny import make_model, make_tokenizer, random_ids
from safetensors.torch import load_file, save_file

from ensembler import EnsembleForCausalLM
from ensembler.config import MemberConfig
from ensembler.demo import demo_folder

os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

NUM_PROMPTS, NUM_TOKENS = 32, 16
WIDE: dict[str, Any] = {"hidden_size": 64}  # heads of 32: smaller ones have no paged attention on a CPU
Decoded = list[tuple[list[int], list[float]]]
"""For each prompt the greedy tokens and their log-probs."""


@contextmanager
def engine(folder: Path, *, own_process: bool = False, **options: Any) -> Iterator[Any]:
    """vLLM's engine on a folder, ended behind the block.

    On one rank it runs in this process, where it starts faster, unless `own_process`: vLLM changes classes of
    `transformers` that it has no model for, and its worker where that is extended.
    """
    from vllm import LLM

    given = {"dtype": "float32", "max_model_len": 96, "enforce_eager": True, "seed": 0, **options}
    is_apart = own_process or given.get("tensor_parallel_size", 1) > 1
    with patch.dict(os.environ, VLLM_ENABLE_V1_MULTIPROCESSING=str(int(is_apart))):
        llm = LLM(str(folder), **given)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def prompts_for(vocab_size: int) -> list[list[int]]:
    """Random prompts of different lengths."""
    lengths = [3 + number % 11 for number in range(NUM_PROMPTS)]
    return [random_ids(1, length, seed=seed, vocab_size=vocab_size)[0].tolist() for seed, length in enumerate(lengths)]


def served(llm: Any, prompts: list[list[int]], **arguments: Any) -> Decoded:
    """By vLLM, at the rule and alpha of `arguments`."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=1, extra_args=arguments or None
    )
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    found = []
    for output in outputs:
        ids = list(output.outputs[0].token_ids)
        found.append((ids, [step[token].logprob for step, token in zip(output.outputs[0].logprobs, ids, strict=True)]))
    return found


@torch.no_grad()
def expected(model: Any, prompts: list[list[int]]) -> Decoded:
    """By a forward of the whole text for every token."""
    found = []
    for prompt in prompts:
        ids, logprobs = torch.tensor([prompt]), []
        for _ in range(NUM_TOKENS):
            last = model(input_ids=ids).logits[0, -1].float().log_softmax(-1)
            ids = torch.cat([ids, last.argmax().view(1, 1)], dim=1)
            logprobs.append(float(last.max()))
        found.append((ids[0, len(prompt) :].tolist(), logprobs))
    return found


def assert_same(ours: Decoded, theirs: Decoded, tolerance: float = 1e-3) -> None:
    assert len(ours) == len(theirs) == NUM_PROMPTS
    for (tokens, logprobs), (other_tokens, other_logprobs) in zip(ours, theirs, strict=True):
        assert tokens == other_tokens
        assert logprobs == pytest.approx(other_logprobs, abs=tolerance)


def save(folder: Path, family: str, seed: int, *, num_extra: int = 0, **settings: Any) -> Path:
    make_model(family, seed, **settings).save_pretrained(folder)
    make_tokenizer(num_extra).save_pretrained(folder)
    return folder


def save_members(folder: Path, rule: str, members: dict[str, Path], **settings: Any) -> EnsembleForCausalLM:
    """An ensemble of saved members, saved as `folder`."""
    named = {role: str(path) for role, path in members.items()}
    model: EnsembleForCausalLM = EnsembleForCausalLM.from_members(rule=rule, members=named, **settings)
    model.save_pretrained(folder)
    return model


def spoil(to: Path, role: str, token: int) -> Path:
    """The folder of the embedded family, with a member whose embedding of `token` is NaN, and its head is not."""
    broken = to.with_name(f"{to.name}-{role}")
    shutil.copytree(demo_folder() / role, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.embed_tokens.weight"][token] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": False}))
    config = EnsembleForCausalLM.from_pretrained(demo_folder()).config
    members = {**config.members, role: MemberConfig(str(broken))}
    EnsembleForCausalLM.from_config(config.replaced(members=members)).save_pretrained(to)
    return to


def changed(folder: Path, to: Path, **changes: Any) -> Path:
    """The folder of an ensemble with other numbers in its configuration, members where they were."""
    model = EnsembleForCausalLM.from_pretrained(folder)
    config = model.config.replaced(**changes)
    EnsembleForCausalLM.from_config(config).save_pretrained(to)
    return to
