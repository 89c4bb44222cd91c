"""vLLM's engine on an ensemble's folder gives what `transformers` gives: tokens, log-probs, the anchor at α = 0."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import make_model, make_tokenizer, random_ids

from ensembler import EnsembleForCausalLM
from ensembler.demo import demo_folder

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own: make test-vllm")
pytestmark = pytest.mark.vllm

NUM_PROMPTS, NUM_TOKENS = 32, 16
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

WIDE = {"hidden_size": 64}  # heads of 32: smaller ones have no paged attention on a CPU
RULES = {
    "base-change": {"rule": "base-change", "alpha": 0.7},
    "eft": {"rule": "eft", "alpha": 1.1},
    "linear": {
        "rule": "linear",
        "alpha": 0.6,
        "constant": {"source_ft": 0.5, "target_pt": 0.5},
        "slope": {"target_pt": 0.4, "source_pt": -0.7},
        "anchor": "source_ft",
    },
}


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[Any]:
    """vLLM's engine on a folder, ended behind the block."""
    from vllm import LLM

    given = {"dtype": "float32", "max_model_len": 96, "enforce_eager": True, "seed": 0, **options}
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


def served(llm: Any, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """Greedy tokens and their log-probs."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=1)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    found = []
    for output in outputs:
        ids = list(output.outputs[0].token_ids)
        found.append((ids, [step[token].logprob for step, token in zip(output.outputs[0].logprobs, ids, strict=True)]))
    return found


@torch.no_grad()
def expected(model: Any, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """The same by a forward of the whole text for every token."""
    found = []
    for prompt in prompts:
        ids, logprobs = torch.tensor([prompt]), []
        for _ in range(NUM_TOKENS):
            last = model(input_ids=ids).logits[0, -1].float().log_softmax(-1)
            ids = torch.cat([ids, last.argmax().view(1, 1)], dim=1)
            logprobs.append(float(last.max()))
        found.append((ids[0, len(prompt) :].tolist(), logprobs))
    return found


def assert_same(
    ours: list[tuple[list[int], list[float]]], theirs: list[tuple[list[int], list[float]]], tolerance: float = 1e-3
) -> None:
    assert len(ours) == len(theirs) == NUM_PROMPTS
    for (tokens, logprobs), (other_tokens, other_logprobs) in zip(ours, theirs, strict=True):
        assert tokens == other_tokens
        assert logprobs == pytest.approx(other_logprobs, abs=tolerance)


def save(folder: Path, family: str, seed: int, *, num_extra: int = 0, **settings: Any) -> Path:
    make_model(family, seed, **settings).save_pretrained(folder)
    make_tokenizer(num_extra).save_pretrained(folder)
    return folder


def changed(folder: Path, to: Path, **changes: Any) -> Path:
    """The folder of an ensemble with other numbers in its configuration, members where they were."""
    model = EnsembleForCausalLM.from_pretrained(folder)
    config = model.config.replaced(**{key: value for key, value in changes.items() if key != "anchor"})
    EnsembleForCausalLM.from_config(config).save_pretrained(to)
    return to


@pytest.mark.parametrize("rule", RULES)
def test_the_embedded_family_by_each_rule(rule: str, tmp_path: Path) -> None:
    folder = changed(demo_folder(), tmp_path / "ensemble", **RULES[rule])
    model = EnsembleForCausalLM.from_pretrained(folder)
    prompts = prompts_for(model.config.vocab_size)
    with engine(folder, load_format="ensembler") as llm:
        assert_same(served(llm, prompts), expected(model, prompts))


@pytest.mark.parametrize("rule", RULES)
def test_members_of_different_families_widths_and_depths(rule: str, tmp_path: Path) -> None:
    members = {
        "source_ft": str(save(tmp_path / "ft", "llama", 1, **WIDE)),
        "source_pt": str(save(tmp_path / "pt", "qwen2", 2, hidden_size=128, num_layers=1)),
        "target_pt": str(save(tmp_path / "target", "gpt2", 3, hidden_size=64, num_layers=3)),
    }
    numbers = {key: value for key, value in RULES[rule].items() if key != "anchor"}
    model = EnsembleForCausalLM.from_members(members=members, **numbers)
    model.save_pretrained(tmp_path / "ensemble")
    prompts = prompts_for(64)
    with engine(tmp_path / "ensemble", load_format="ensembler") as llm:
        assert_same(served(llm, prompts), expected(model, prompts))


def save_members(folder: Path, rule: str, members: dict[str, Path], **settings: Any) -> EnsembleForCausalLM:
    """An ensemble of saved members, saved as `folder`."""
    named = {role: str(path) for role, path in members.items()}
    model: EnsembleForCausalLM = EnsembleForCausalLM.from_members(rule=rule, members=named, **settings)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("rule", "roles", "alpha"),
    [
        ("realign", ("reference", "aligned"), 0.6),
        ("contrastive", ("expert", "amateur"), 0.8),
        ("reward", ("target_pt", "reward"), 0.9),
    ],
)
def test_the_other_rules(rule: str, roles: tuple[str, str], alpha: float, tmp_path: Path) -> None:
    one, other = save(tmp_path / "one", "llama", 1, **WIDE), save(tmp_path / "other", "qwen2", 2, **WIDE)
    model = save_members(tmp_path / "ensemble", rule, dict(zip(roles, (one, other), strict=True)), alpha=alpha)
    prompts = prompts_for(64)
    with engine(tmp_path / "ensemble", load_format="ensembler") as llm:
        assert_same(served(llm, prompts), expected(model, prompts))


def trio(folder: Path, **settings: Any) -> EnsembleForCausalLM:
    """Members of one tokenizer, those of source FT and target padded to widths of their own."""
    members = {
        "source_ft": save(folder / "ft", "llama", 1, vocab_size=80, **WIDE),
        "source_pt": save(folder / "pt", "qwen2", 2, **WIDE),
        "target_pt": save(folder / "target", "llama", 3, vocab_size=96, num_layers=3, hidden_size=128),
    }
    return save_members(folder / "ensemble", "base-change", members, alpha=0.7, **settings)


def test_padded_vocabularies_on_two_ranks_and_with_compiled_members(tmp_path: Path) -> None:
    model = trio(tmp_path)
    prompts = prompts_for(64)
    wanted = expected(model, prompts)
    for options in ({"tensor_parallel_size": 2}, {"enforce_eager": False}):
        with engine(tmp_path / "ensemble", load_format="ensembler", **options) as llm:
            assert_same(served(llm, prompts), wanted)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.03), ("float16", 0.004)])
def test_half_precision_is_near(dtype: str, tolerance: float, tmp_path: Path) -> None:
    """Of the same texts: what is greedy may differ where two tokens are nearly as probable."""
    model = trio(tmp_path)
    with engine(tmp_path / "ensemble", load_format="ensembler", dtype=dtype) as llm:
        found = served(llm, prompts_for(64))
    errors = []
    for prompt, (tokens, logprobs) in zip(prompts_for(64), found, strict=True):
        logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        exact = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        errors.append((exact - torch.tensor(logprobs)).abs())
    worst = float(torch.cat(errors).max())
    assert 1e-5 < worst < tolerance  # the engine did run in half precision


def test_an_adapter_a_patch_and_an_extended_vocabulary(tmp_path: Path) -> None:
    base = save(tmp_path / "pt", "llama", 2, **WIDE)
    torch.manual_seed(5)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(make_model("llama", 2, **WIDE), lora).save_pretrained(tmp_path / "lora")
    target = save(tmp_path / "target", "llama", 3, num_extra=6, vocab_size=70, **WIDE)
    members: dict[str, Any] = {
        "source_ft": {"model": str(base), "adapter": str(tmp_path / "lora")},
        "source_pt": str(base),
        "target_pt": str(target),
    }
    model = EnsembleForCausalLM.from_members(rule="eft", alpha=0.8, members=members, outside="neutral")
    model.save_pretrained(tmp_path / "ensemble")
    prompts = prompts_for(70)
    with engine(tmp_path / "ensemble", load_format="ensembler") as llm:
        assert_same(served(llm, prompts), expected(model, prompts))


def test_at_alpha_0_it_is_the_anchor_that_vllm_serves_alone(tmp_path: Path) -> None:
    folder = changed(demo_folder(), tmp_path / "ensemble", alpha=0.0)
    prompts = prompts_for(json.loads((folder / "config.json").read_text())["vocab_size"])
    with engine(folder, load_format="ensembler") as llm:
        ensemble = served(llm, prompts)
    with engine(demo_folder() / "source_ft") as llm:
        assert_same(ensemble, served(llm, prompts), tolerance=1e-5)


def test_what_cannot_be_served_is_said_before_the_engine_starts(tmp_path: Path) -> None:
    folder = changed(demo_folder(), tmp_path / "ensemble")
    content = json.loads((folder / "config.json").read_text())
    content["members"]["target_pt"]["quantization"] = {"method": "bnb-8bit"}
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(Exception, match="target_pt is quantised when loaded"), engine(folder, load_format="ensembler"):
        pass
