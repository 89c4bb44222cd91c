"""Tiny models of every family that a row cache is for, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ensembler.engine import row_cache
from ensembler.engine.member_set import MemberSet
from ensembler.vocab import VocabularyContract

FAMILIES = tuple(sorted(row_cache.FAMILIES - {"ensembler_test_table"}))  # the last one is that of tiny.py
WINDOW = 6
_VOCAB = 64
_COMMON: dict[str, Any] = {
    "vocab_size": _VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "initializer_range": 0.5,
}
_WHERE_KNOWN = {"sliding_window": WINDOW, "head_dim": 8}  # given only to configs that have them
_MIXTURE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_DEEPSEEK = {
    "num_key_value_heads": 2,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
}
_OF_FAMILY: dict[str, dict[str, Any]] = {
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "gpt2": {"n_positions": 128},
    "gpt_bigcode": {"n_positions": 128},
    **dict.fromkeys(("glm4_moe", "gpt_oss", "granitemoe", "mixtral", "olmoe", "phimoe", "qwen2_moe"), _MIXTURE),
    "qwen3_moe": _MIXTURE,
}
_NO_HEAD_DIM = ("deepseek_v2", "deepseek_v3", "falcon")
_WINDOWS_IN_TOP_LAYERS = {"use_sliding_window": True, "max_window_layers": 1}
# What a family can be beside what it is by default: name to family and settings.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon, new blocks": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt2, scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt_bigcode, many heads": ("gpt_bigcode", {"multi_query": False}),
    "gpt_neox, one after another": ("gpt_neox", {"use_parallel_residual": False}),
    "llama, scaled": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "llama, yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "opt, norm behind": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 8}),
    "qwen2, windows": ("qwen2", _WINDOWS_IN_TOP_LAYERS),
    "qwen2_moe, windows": ("qwen2_moe", _WINDOWS_IN_TOP_LAYERS),
    "qwen3, windows": ("qwen3", _WINDOWS_IN_TOP_LAYERS),
    "qwen3_moe, windows": ("qwen3_moe", _WINDOWS_IN_TOP_LAYERS),
    "smollm3, windows": ("smollm3", _WINDOWS_IN_TOP_LAYERS),
    **{
        f"{family}, long windows": (family, {"sliding_window": 100})
        for family in ("cohere2", "gemma2", "gemma3_text", "gpt_oss", "ministral", "mistral", "phi3")
    },
}


def make_tiny(name: str, seed: int = 0, **more: Any) -> PreTrainedModel:
    """Return a random model of a family, or of a variant of one; equal arguments give equal weights.

    Raises what `transformers` raises where the installed one does not know it.
    """
    family, settings = VARIANTS.get(name, (name, {}))
    default = AutoConfig.for_model(family).get_text_config(decoder=True)
    known = {key: value for key, value in _WHERE_KNOWN.items() if hasattr(default, key)}
    if family in _NO_HEAD_DIM:
        known.pop("head_dim", None)
    config = AutoConfig.for_model(family, **{**_COMMON, **known, **_OF_FAMILY.get(family, {}), **settings, **more})
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return model


def alone(model: PreTrainedModel) -> MemberSet:
    """The model as the only member, in the role "one"."""
    contract = VocabularyContract("identical", _VOCAB, {"one": _VOCAB}, {"one": _VOCAB}, {"one": 0})
    return MemberSet({"one": model}, (), contract)
