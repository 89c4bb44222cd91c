"""Adapters of tiny models, and pairs of ensembles: members on one backbone, and the same members as two copies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from helpers.tiny import make_model, make_tokenizer, random_ids
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedModel

from ensembler import EnsembleForCausalLM, MemberConfig

ALPHA = 0.7
IDS = random_ids(2, 7)
PADDED = torch.cat([torch.tensor([[3, 3], [17, 30]]), IDS], 1)
MASK = (PADDED != 3).long()
TOGETHER = [("source_ft", "source_pt"), ("target_pt",)]
NUM_NEW = 9
FAMILIES = ("llama", "mistral", "gemma2", "qwen2", "gpt2", "gpt_neox", "opt", "bloom")
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8},
    "nucleus": {"do_sample": True, "top_p": 0.8, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beams returned": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
    "beam sample": {"num_beams": 3, "do_sample": True},
    "static": {"cache_implementation": "static"},
    "static beams": {"cache_implementation": "static", "num_beams": 3},
    "no cache": {"use_cache": False},
    "no cache, beams": {"use_cache": False, "num_beams": 3},
    "chunks": {"prefill_chunk_size": 4},
    "repetition": {"repetition_penalty": 1.4},
    "guidance": {"guidance_scale": 1.5},
}
LLAMA_TARGETS = ("q_proj", "v_proj", "down_proj")
LORAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 7}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 24}, "rank_pattern": {"v_proj": 1}, "use_rslora": True},
    "lm_head": {"target_modules": ["q_proj", "lm_head"]},
    "all-linear": {"target_modules": "all-linear"},
    "one layer": {"layers_to_transform": [1], "exclude_modules": ["v_proj"]},
    "rank above width": {"r": 40},
}
TARGETS: dict[str, tuple[str, ...]] = {
    "gpt2": ("c_attn", "c_proj"),
    "gpt_neox": ("query_key_value", "dense_4h_to_h"),
    "opt": ("q_proj", "fc1", "fc2"),
    "bloom": ("query_key_value", "dense_h_to_4h"),
}


def targets(family: str) -> list[str]:
    """The layers that a LoRA of a family changes here."""
    return list(TARGETS.get(family, LLAMA_TARGETS))


def save_base(folder: Path, family: str = "llama", seed: int = 2, *, tokenizer: bool = True, **settings: Any) -> Path:
    """Save a tiny model and its tokenizer."""
    make_model(family, seed, **settings).save_pretrained(folder)
    if tokenizer:
        make_tokenizer().save_pretrained(folder)
    return folder


def save_adapter(
    base: Path,
    folder: Path,
    config: PeftConfig | None = None,
    *,
    seed: int = 5,
    change: Callable[[PreTrainedModel], None] | None = None,
    save: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """Save an adapter of the model in `base` whose trained tensors are random.

    `change` acts on the model before the adapter is put on it; `settings` are those of plain LoRA.
    """
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(seed)
    if change is not None:
        change(model)
    if config is None:
        family = model.config.model_type
        settings = {"r": 4, "lora_alpha": 6, "target_modules": targets(family), **settings}
        config = LoraConfig(fan_in_fan_out=family == "gpt2", **settings)
    patched = get_peft_model(model, config)
    for name, parameter in patched.named_parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter += 0.3 * torch.randn_like(parameter)
        assert parameter.requires_grad or "lora_" not in name
    patched.save_pretrained(folder, **(save or {}))
    return folder


def merged(base: Path, adapter: Path) -> PreTrainedModel:
    """The reference: a model of its own with the adapter in its weights."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    return model.merge_and_unload().requires_grad_(True).eval()


def alone(base: Path) -> PreTrainedModel:
    """The base, loaded for itself."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base).eval()
    return model


@dataclass(frozen=True)
class Pair:
    """Base-change where source_ft is source_pt and an adapter: on one backbone, and with copies."""

    shared: EnsembleForCausalLM
    copies: EnsembleForCausalLM
    base: Path
    adapter: Path


GetPair = Callable[..., Pair]
"""Returns the pair of a family and a LoRA: the fixture `get_pair`."""


def make_pair(base: Path, adapter: Path, target: PreTrainedModel, **ensemble: Any) -> Pair:
    """Load both; `ensemble` are arguments of from_members."""
    options = {"rule": "base-change", "alpha": ALPHA, **ensemble}
    backbone = {"source_ft": MemberConfig(str(base), adapter=str(adapter)), "source_pt": str(base)}
    copies = {"source_ft": merged(base, adapter), "source_pt": alone(base)}
    return Pair(
        EnsembleForCausalLM.from_members(members={**backbone, "target_pt": target}, **options),
        EnsembleForCausalLM.from_members(members={**copies, "target_pt": target}, **options),
        base,
        adapter,
    )


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all storages of a module, each counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def roles_of_forwards(model: EnsembleForCausalLM) -> list[tuple[str, ...]]:
    """Return the roles that run together, group by group."""
    return [runner.roles for runner in model.member_set.runners]


@torch.no_grad()
def last_logits(model: PreTrainedModel, ids: Tensor, **inputs: Any) -> Tensor:
    """Logits of a forward without gradients."""
    logits: Tensor = model(input_ids=ids, **inputs).logits
    return logits


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Within 1e-5 of the largest logit.

    Which order a product is summed in depends on the CPU, and sliding windows of padded rows amplify what rounding
    leaves.
    """
    scale = max(1.0, expected.abs().max().item())
    assert_close(actual / scale, expected / scale, atol=1e-5, rtol=0)


def assert_equal(pair: Pair, ids: Tensor = IDS, **inputs: Any) -> None:
    assert_same(last_logits(pair.shared, ids, **inputs), last_logits(pair.copies, ids, **inputs))


def tokens(model: PreTrainedModel, ids: Tensor, seed: int = 11, **options: Any) -> list[list[int]]:
    torch.manual_seed(seed)
    options = {"attention_mask": (ids != 3).long(), "max_new_tokens": NUM_NEW, "eos_token_id": None, **options}
    result: list[list[int]] = model.generate(ids, pad_token_id=3, **options).tolist()
    return result
