"""Tiny mixtures of experts of many families, and LoRAs of their experts in the forms that PEFT has written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers.patch_cases import save_lora_of
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ensembler.patch.apply import apply_patches
from ensembler.patch.formats import read_patch

EXPERTS, HIDDEN, WIDTH = 4, 16, 24
_SIZE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "intermediate_size": WIDTH,
    "moe_intermediate_size": WIDTH,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
_DEEPSEEK = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_NOT_KNOWN: dict[str, tuple[str, ...]] = {  # keys that are properties, or mean something else
    "deepseek_v2": ("head_dim", "num_experts", "num_local_experts"),
    "deepseek_v3": ("head_dim", "num_experts", "num_local_experts"),
}
_MORE: dict[str, dict[str, Any]] = {
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "glm4_moe": {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "llama4_text": {"intermediate_size_mlp": WIDTH, "interleave_moe_layer_step": 1, "attention_chunk_size": 8},
    "qwen2_moe": {"shared_expert_intermediate_size": WIDTH},
}
FAMILIES = (
    *("deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss", "granitemoe", "llama4_text", "mixtral", "olmoe", "phimoe"),
    *("qwen2_moe", "qwen3_moe"),
)
# How older classes, and the files of today, call the layers of one expert: gate, up, down.
OLD_NAMES = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "olmoe": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "deepseek_v3": ("mlp", "gate_proj", "up_proj", "down_proj"),
}


def make_experts(kind: str, seed: int, **more: Any) -> PreTrainedModel:
    """Return a tiny random mixture of experts."""
    settings = {
        key: value for key, value in {**_SIZE, **_MORE.get(kind, {})}.items() if key not in _NOT_KNOWN.get(kind, ())
    }
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**settings, **more})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def stacks_of(model: PreTrainedModel) -> list[str]:
    """Return the names of the stacks of matrices of a model's experts."""
    return [name for name, weight in model.named_parameters() if weight.dim() == 3 and "conv" not in name]


def save_experts(model: PreTrainedModel, folder: Path, *, as_loaded: bool = False) -> Path:
    """Save a model; `as_loaded`: its stacks as they are in memory, and not as its maker's files have them."""
    model.save_pretrained(folder)
    if as_loaded:
        tied = "lm_head.weight" if model.config.tie_word_embeddings else ""
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != tied}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def save_stack_lora(model: PreTrainedModel, folder: Path, **config: Any) -> Path:
    """Save a LoRA of attention and of all stacks of experts (`target_parameters`), made by PEFT."""
    endings = sorted({".".join(name.split(".")[-3:]) for name in stacks_of(model)})
    settings = {"target_modules": ["o_proj"], "target_parameters": endings, "r": 2, "lora_alpha": 3, **config}
    return save_lora_of(model, folder, **settings)


def save_old_lora(
    kind: str,
    folder: Path,
    *,
    layers: tuple[int, ...] = (0, 1),
    experts: int = EXPERTS,
    others: tuple[str, ...] = (),
    size: tuple[int, int] = (HIDDEN, WIDTH),
    **config: Any,
) -> Path:
    """Save a LoRA of the layers of each expert, as it was trained on an older class that has them as such.

    `others`: parents of more layers with the names and sizes of an expert's; `size`: its inputs and inner width.
    """
    block, gate, up, down = OLD_NAMES[kind]
    settings = {"r": 2, "lora_alpha": 3, "target_modules": [gate, up, down], "task_type": "CAUSAL_LM", **config}
    LoraConfig(**settings).save_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    parents = [f"model.layers.{layer}.{block}.experts.{expert}" for layer in layers for expert in range(experts)]
    tensors = {}
    for parent in (*parents, *others):
        for module in (gate, up, down):
            rows, columns = size if module == down else size[::-1]
            name = f"base_model.model.{parent}.{module}"
            tensors[f"{name}.lora_A.weight"] = 0.3 * torch.randn(settings["r"], columns, generator=generator)
            tensors[f"{name}.lora_B.weight"] = 0.3 * torch.randn(rows, settings["r"], generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def loaded_weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights of a model as transformers loads it."""
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict())


def merged_by_peft(model: Path, lora: Path) -> dict[str, Tensor]:
    """Return the weights after PEFT's merge into the loaded model, in fp64."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    return dict(PeftModel.from_pretrained(base, lora).double().merge_and_unload().state_dict())


def assert_applied_as_by_peft(lora: Path, model: Path, out: Path, changed: int) -> None:
    """`patch apply` writes a model that loads as PEFT's merge, generates, and has so many other weights than before."""
    apply_patches([read_patch(lora)], model, out)
    assert_is(out, merged_by_peft(model, lora), model, changed)


def assert_is(out: Path, expected: dict[str, Tensor], model: Path, changed: int) -> None:
    """A model loads with these weights, generates, and has `changed` other ones than `model`."""
    found, before = loaded_weights(out), loaded_weights(model)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert_close(
            tensor.double(),
            expected[name].double(),
            atol=1e-6,
            rtol=1e-6,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    assert sum(not torch.equal(found[name], before[name]) for name in found) == changed
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    made = loaded.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
    assert 4 <= made.shape[1] <= 6
