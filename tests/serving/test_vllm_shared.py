"""vLLM's members of one folder on one copy of its weights: exact, counted in bytes, and the others left alone."""

from __future__ import annotations

from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import make_model
from helpers.vllm_cases import WIDE, assert_same, engine, expected, prompts_for, save, served
from peft import LoraConfig, get_peft_model

from ensembler import EnsembleForCausalLM

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own: make test-vllm")
pytestmark = pytest.mark.vllm

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True)
def functions_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the engine's process count its own weights."""
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")


def save_lora(folder: Path, family: str, targets: list[str], *, rank: int = 2, seed: int = 5, **more: Any) -> Path:
    """A LoRA that changes much, of a model whose weights are those of seed 2."""
    torch.manual_seed(seed)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, init_lora_weights=False, **more)
    get_peft_model(make_model(family, 2, **WIDE), lora).save_pretrained(folder)
    return folder


def save_pair(folder: Path, family: str, *adapters: Path | None, rule: str = "realign") -> EnsembleForCausalLM:
    """An ensemble of two members on one folder, each with or without an adapter, and a target where the rule has it."""
    base = save(folder / "base", family, 2, **WIDE)
    roles = ("reference", "aligned") if rule == "realign" else ("source_pt", "source_ft")
    members: dict[str, Any] = {
        role: {"model": str(base)} if adapter is None else {"model": str(base), "adapter": str(adapter)}
        for role, adapter in zip(roles, adapters, strict=True)
    }
    if rule == "eft":
        members["target_pt"] = str(save(folder / "target", "llama", 3, num_layers=3, **WIDE))
    model = EnsembleForCausalLM.from_members(rule=rule, alpha=0.7, members=members)
    model.save_pretrained(folder / "ensemble")
    return model


def num_bytes(roles: tuple[str, ...], model: Any) -> int:
    """Bytes of the weights of these members, each storage once, and those that a CPU keeps in its own order."""
    modules = {module for role in roles for module in model.members[role].modules()}
    tensors = {weight for module in modules for weight in module._parameters.values() if weight is not None}
    storages = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in tensors}
    packed = [m for m in modules if hasattr(m, "cpu_linear") and not m._parameters["weight"].numel()]
    return sum(storages.values()) + sum(4 * m.input_size * sum(m.output_partition_sizes) for m in packed)


def sizes(llm: Any, *roles: str) -> list[int]:
    """Bytes of the members together, then of each alone."""
    return [llm.apply_model(partial(num_bytes, own))[0] for own in (roles, *((role,) for role in roles))]


@pytest.mark.parametrize(
    ("family", "targets", "more"),
    [
        ("llama", LLAMA, {}),
        ("gpt2", ["c_attn", "c_fc", "c_proj"], {"fan_in_fan_out": True}),
        ("gpt_neox", ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"], {}),
        ("mixtral", ["q_proj", "v_proj", "o_proj"], {}),
    ],
)
def test_a_lora_beside_its_base(family: str, targets: list[str], more: dict[str, Any], tmp_path: Path) -> None:
    model = save_pair(tmp_path, family, None, save_lora(tmp_path / "lora", family, targets, **more))
    prompts = prompts_for(64)
    is_foreign = family == "gpt_neox"  # it runs as transformers' model
    with engine(tmp_path / "ensemble", own_process=is_foreign, load_format="ensembler") as llm:
        both, base, adapted = sizes(llm, "reference", "aligned")
        assert_same(served(llm, prompts), expected(model, prompts))
    assert base < adapted == both < 1.1 * base


def num_caches(model: Any) -> int:
    """Attention layers of all members: each has a KV cache of its own."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    return sum(isinstance(module, AttentionLayerBase) for module in model.modules())


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_two_loras_on_one_base_and_a_target_left_alone(num_ranks: int, tmp_path: Path) -> None:
    one = save_lora(tmp_path / "one", "llama", ["q_proj", "o_proj", "up_proj"], rank=1)
    other = save_lora(tmp_path / "other", "llama", ["v_proj", "down_proj"], rank=2, seed=6)
    model = save_pair(tmp_path, "llama", one, other, rule="eft")
    prompts = prompts_for(64)
    with engine(tmp_path / "ensemble", load_format="ensembler", tensor_parallel_size=num_ranks) as llm:
        both, first, second = sizes(llm, "source_pt", "source_ft")
        assert both < 1.1 * min(first, second)
        assert llm.apply_model(num_caches)[0] == 2 + 2 + 3
        assert_same(served(llm, prompts), expected(model, prompts))


def test_the_target_is_what_it_is_without_a_pair(tmp_path: Path) -> None:
    """To the bit: at α = 0 eft is its anchor, the target."""
    model = save_pair(tmp_path, "llama", None, save_lora(tmp_path / "lora", "llama", LLAMA), rule="eft")
    EnsembleForCausalLM.from_config(model.config.replaced(alpha=0.0)).save_pretrained(tmp_path / "off")
    prompts = prompts_for(64)
    with engine(tmp_path / "off", load_format="ensembler") as llm:
        ensemble = served(llm, prompts)
    with engine(tmp_path / "target") as llm:
        assert_same(ensemble, served(llm, prompts), tolerance=0)


def test_compiled_members_and_an_adapter_trained_again(tmp_path: Path) -> None:
    """A compiled member must not be taken from vLLM's cache where the adapter has another rank and other layers."""
    model = save_pair(tmp_path, "llama", None, save_lora(tmp_path / "lora", "llama", LLAMA))
    prompts = prompts_for(64)
    for targets, rank in ((LLAMA, 2), (["q_proj", "down_proj"], 3)):
        save_lora(tmp_path / "lora", "llama", targets, rank=rank)
        model = EnsembleForCausalLM.from_pretrained(tmp_path / "ensemble")
        with engine(tmp_path / "ensemble", load_format="ensembler", enforce_eager=False) as llm:
            assert_same(served(llm, prompts), expected(model, prompts))


@pytest.mark.parametrize("more", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_other_patches_take_a_copy_of_their_own(more: dict[str, Any], tmp_path: Path) -> None:
    given = {"target_modules": ["q_proj"], **more}
    lora = save_lora(tmp_path / "lora", "llama", given.pop("target_modules"), **given)
    model = save_pair(tmp_path, "llama", None, lora)
    prompts = prompts_for(64)
    with engine(tmp_path / "ensemble", load_format="ensembler") as llm:
        both, base, adapted = sizes(llm, "reference", "aligned")
        assert_same(served(llm, prompts), expected(model, prompts))
    assert both == 2 * base == 2 * adapted


def test_the_private_parts_of_vllm_are_as_they_are_used() -> None:
    """Names outside vLLM's public interface that vllm_shared.py uses."""
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.linear import (
        ColumnParallelLinear,
        LinearBase,
        LinearMethodBase,
        ReplicatedLinear,
        RowParallelLinear,
    )
    from vllm.model_executor.parameter import ModelWeightParameter

    assert list(signature(LinearMethodBase.apply).parameters) == ["self", "layer", "x", "bias"]
    assert {"tp_rank", "tp_size", "quant_method"} <= set(LinearBase.__init__.__code__.co_names)
    assert "input_size_per_partition" in RowParallelLinear.__init__.__code__.co_names
    for kind in (RowParallelLinear, ColumnParallelLinear, ReplicatedLinear):
        assert {"quant_method", "apply"} <= set(kind.forward.__code__.co_names)
        assert "weight" not in kind.forward.__code__.co_names  # an adapted layer has it through its base alone
    assert {"output_dim", "input_dim"} <= vars(ModelWeightParameter.__mro__[1]).keys() | vars(
        ModelWeightParameter.__mro__[2]
    ).keys()
    plain, marked = VllmConfig(), VllmConfig(additional_config={"ensembler_adapted_layers": "1"})
    assert plain.compute_hash() != marked.compute_hash()
