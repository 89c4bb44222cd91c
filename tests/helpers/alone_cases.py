"""Members of different kinds, and what each gives alone, one text at a time: an ensemble at α = 0 has to give the same.

The prompts are shorter and longer than the length from which `phi3 longrope` and `llama dynamic` scale positions, and
one text grows beyond it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from helpers.family_configs import make_tiny
from helpers.tiny import make_model, random_ids
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from ensembler import EnsembleForCausalLM

SWITCH = 16  # tokens from which positions are scaled
NUM_NEW = 6
PAD = 3
PROMPTS = [random_ids(1, 7, seed=6).repeat(1, 2), random_ids(1, 18, seed=5), random_ids(1, 3, seed=7)]
STANDARD: dict[str, Any] = {"do_sample": False, "eos_token_id": -5, "pad_token_id": PAD, "max_new_tokens": NUM_NEW}

_COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": PAD,
    "initializer_range": 0.5,
}
_ATTENDING = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "max_position_embeddings": 128,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0, 6.0, 8.0, 9.0],
    "original_max_position_embeddings": SWITCH,
}
_LONG = {**_ATTENDING, "original_max_position_embeddings": SWITCH, "rope_parameters": LONGROPE}
_DYNAMIC = {
    **_ATTENDING,
    "max_position_embeddings": SWITCH,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
}
_JAMBA = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
}
_QWEN3_NEXT = {
    "head_dim": 8,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_GRIFFIN = {"lru_width": 16, "attention_window_size": 6, "block_types": ["recurrent", "attention"]}
_WINDOWED = {**_ATTENDING, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("gemma2", _WINDOWED),
    "bloom": ("bloom", {"num_attention_heads": 2}),
    "phi3 longrope": ("phi3", _LONG),
    "llama dynamic": ("llama", _DYNAMIC),
    "mamba": ("mamba", {"state_size": 4}),
    "jamba": ("jamba", {**_ATTENDING, **_JAMBA}),
    "lfm2": ("lfm2", {**_ATTENDING, "layer_types": ["conv", "full_attention"], "block_ff_dim": 32}),
    "qwen3_next": ("qwen3_next", {**_ATTENDING, **_QWEN3_NEXT}),
    "recurrent_gemma": ("recurrent_gemma", {**_ATTENDING, **_GRIFFIN}),
    "rwkv": ("rwkv", {"attention_hidden_size": 16, "context_length": 128}),
}
WITHOUT_CACHE = ("recurrent_gemma", "rwkv")  # alone, their beams with a cache fail, or forget whose state it is


def make_kind(name: str, seed: int = 0) -> PreTrainedModel:
    """Return a random model of a kind, or of a family of tests/helpers/family_configs.py; equal ones are equal."""
    if name not in KINDS:
        return make_tiny(name, seed, initializer_range=0.5)
    family, settings = KINDS[name]
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**_COMMON, **settings}))
    return model.eval()


@dataclass(frozen=True, eq=False)
class Alone:
    """A member that is alone, and an ensemble at α = 0 whose anchor is an equal one."""

    name: str
    model: PreTrainedModel
    ensemble: EnsembleForCausalLM

    @cache  # noqa: B019  there is one of each kind
    def texts(self, **options: Any) -> list[list[int]]:
        """Return the member's new tokens for each of the prompts."""
        found = []
        for prompt in PROMPTS:
            self.forget()
            output = self.model.generate(prompt, attention_mask=torch.ones_like(prompt), **{**STANDARD, **options})
            found.append(output[0, prompt.shape[1] :].tolist())
        return found

    def forget(self) -> None:
        """Let a dynamic NTK forget the longest text that it has seen."""
        with torch.no_grad():
            self.model(input_ids=torch.tensor([[5]]))

    def ensemble_texts(self, *, together: bool, **options: Any) -> list[list[int]]:
        """Return the ensemble's new tokens, of prompts in one batch with padding on the left or one by one."""
        batches = [padded(PROMPTS)] if together else [(prompt, torch.ones_like(prompt)) for prompt in PROMPTS]
        found: list[list[int]] = []
        for ids, mask in batches:
            output = self.ensemble.generate(ids, attention_mask=mask, **{**STANDARD, **options})
            found += output[:, ids.shape[1] :].tolist()
        return found


def padded(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return ids and mask of prompts (1, n) that are padded on the left."""
    longest = max(prompt.shape[1] for prompt in prompts)
    pad = [(longest - prompt.shape[1], 0) for prompt in prompts]
    ids = [torch.nn.functional.pad(one, sides, value=PAD) for one, sides in zip(prompts, pad, strict=True)]
    masks = [torch.nn.functional.pad(torch.ones_like(one), sides) for one, sides in zip(prompts, pad, strict=True)]
    return torch.cat(ids), torch.cat(masks)


@cache
def alone(name: str) -> Alone:
    """Return the case of a kind, made once."""
    members = {"source_ft": make_kind(name), "source_pt": make_model("llama", 1), "target_pt": make_model("llama", 2)}
    ensemble = EnsembleForCausalLM.from_members(rule="base-change", alpha=0.0, members=members)
    ensemble.generation_config = GenerationConfig(bos_token_id=1, pad_token_id=PAD)
    return Alone(name, make_kind(name), ensemble)
