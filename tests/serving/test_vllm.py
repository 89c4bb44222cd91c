"""vLLM's engine on an ensemble's folder gives what `transformers` gives: tokens, log-probs, the anchor at α = 0."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import make_model
from helpers.vllm_cases import WIDE, assert_same, changed, engine, expected, prompts_for, save, save_members, served
from peft import LoraConfig, get_peft_model

from ensembler import EnsembleForCausalLM
from ensembler.demo import demo_folder

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own: make test-vllm")
pytestmark = pytest.mark.vllm

RULES: dict[str, dict[str, Any]] = {
    "base-change": {"rule": "base-change", "alpha": 0.7},
    "eft": {"rule": "eft", "alpha": 1.1},
    "linear": {
        "rule": "linear",
        "alpha": 0.6,
        "constant": {"source_ft": 0.5, "target_pt": 0.5},
        "slope": {"target_pt": 0.4, "source_pt": -0.7},
    },
}


def assert_every_rule(folder: Path, vocab_size: int) -> None:
    """The folder's own rule is linear; requests ask for the others."""
    own = EnsembleForCausalLM.from_pretrained(folder)
    assert own.rule.name == "linear"
    prompts = prompts_for(vocab_size)
    with engine(folder, load_format="ensembler") as llm:
        assert_same(served(llm, prompts), expected(own, prompts))
        for rule in ("base-change", "eft"):
            config = own.config.replaced(**RULES[rule], constant=None, slope=None)
            there = expected(EnsembleForCausalLM.from_config(config), prompts)
            assert_same(served(llm, prompts, **RULES[rule]), there)


def test_the_embedded_family_by_each_rule(tmp_path: Path) -> None:
    assert_every_rule(changed(demo_folder(), tmp_path / "ensemble", **RULES["linear"]), 134)


def test_members_of_different_families_widths_and_depths_by_each_rule(tmp_path: Path) -> None:
    members = {
        "source_ft": save(tmp_path / "ft", "llama", 1, **WIDE),
        "source_pt": save(tmp_path / "pt", "qwen2", 2, hidden_size=128, num_layers=1),
        "target_pt": save(tmp_path / "target", "gpt2", 3, hidden_size=64, num_layers=3),
    }
    save_members(tmp_path / "ensemble", members=members, **RULES["linear"])
    assert_every_rule(tmp_path / "ensemble", 64)


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


@pytest.mark.parametrize(
    "families",
    [
        ("mistral", "gpt_neox", "gemma2"),  # windows of 6 tokens in some layers or all
        ("mixtral", "opt", "mistral"),  # experts beside none; hidden states that are projected before the head
    ],
)
def test_windows_experts_and_what_else_a_family_has_of_its_own(families: tuple[str, str, str], tmp_path: Path) -> None:
    more: dict[str, dict[str, Any]] = {"gemma2": {"head_dim": 32, "initializer_range": 0.1}}
    roles = ("source_ft", "source_pt", "target_pt")
    members = {
        role: save(tmp_path / role, family, seed, **WIDE, **more.get(family, {}))
        for seed, (role, family) in enumerate(zip(roles, families, strict=True))
    }
    model = save_members(tmp_path / "ensemble", "base-change", members, alpha=0.7)
    prompts = prompts_for(64)
    # vLLM's own kernels round gemma2 more than the others.
    tolerance = 5e-3 if "gemma2" in families else 1e-3
    is_foreign = "gpt_neox" in families  # it runs as transformers' model
    with engine(tmp_path / "ensemble", own_process=is_foreign, load_format="ensembler") as llm:
        assert_same(served(llm, prompts), expected(model, prompts), tolerance)


def test_compiled_members_of_one_configuration(tmp_path: Path) -> None:
    """Source FT and source PT are alike but for their weights; what is compiled of one must not serve the other."""
    folder = changed(demo_folder(), tmp_path / "ensemble", rule="eft", alpha=0.9)
    model = EnsembleForCausalLM.from_pretrained(folder)
    prompts = prompts_for(134)
    with engine(folder, load_format="ensembler", enforce_eager=False) as llm:
        assert_same(served(llm, prompts), expected(model, prompts))


def trio(folder: Path, **settings: Any) -> EnsembleForCausalLM:
    """Members of one tokenizer, those of source FT and target padded to widths of their own."""
    members = {
        "source_ft": save(folder / "ft", "llama", 1, vocab_size=80, **WIDE),
        "source_pt": save(folder / "pt", "qwen2", 2, **WIDE),
        "target_pt": save(folder / "target", "llama", 3, vocab_size=96, num_layers=3, hidden_size=128),
    }
    return save_members(folder / "ensemble", "base-change", members, alpha=0.7, **settings)


def test_padded_vocabularies_on_two_ranks(tmp_path: Path) -> None:
    model = trio(tmp_path)
    prompts = prompts_for(64)
    with engine(tmp_path / "ensemble", load_format="ensembler", tensor_parallel_size=2) as llm:
        assert_same(served(llm, prompts), expected(model, prompts))


def test_float16_is_near(tmp_path: Path) -> None:
    """Of the same texts: what is greedy may differ where two tokens are nearly as probable."""
    folder = changed(demo_folder(), tmp_path / "ensemble", rule="base-change", alpha=0.8)
    model = EnsembleForCausalLM.from_pretrained(folder)
    prompts = prompts_for(134)
    with engine(folder, load_format="ensembler", dtype="float16") as llm:
        found = served(llm, prompts)
    errors = []
    for prompt, (tokens, logprobs) in zip(prompts, found, strict=True):
        logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        exact = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        errors.append((exact - torch.tensor(logprobs)).abs())
    assert 1e-4 < float(torch.cat(errors).max()) < 0.02  # the engine did run in half precision


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_an_adapter_and_an_extended_vocabulary(num_ranks: int, tmp_path: Path) -> None:
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
    with engine(tmp_path / "ensemble", load_format="ensembler", tensor_parallel_size=num_ranks) as llm:
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


def test_a_tokenizer_that_asks_for_the_configuration_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those without a class of their own do; the members are checked once all the same."""
    from vllm.transformers_utils.config import get_config

    from ensembler.serving import vllm_plugin

    vllm_plugin.register()
    from ensembler.serving import vllm_config

    folder = changed(demo_folder(), tmp_path / "ensemble")
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in content.items() if key != "tokenizer_class"}))
    calls = []
    check = vllm_config.check_ensemble
    monkeypatch.setattr(vllm_config, "check_ensemble", lambda config: calls.append(config) or check(config))
    config = get_config(str(folder), trust_remote_code=False)
    assert config.checked is config.checked
    assert len(calls) == 1
    assert config.dtype == "float32"
