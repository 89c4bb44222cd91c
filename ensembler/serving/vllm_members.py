"""One member as vLLM's own model: built from its own configuration, inside an ensemble that has another."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.transformers_utils.config import get_hf_text_config


def build_member(vllm_config: VllmConfig, role: str, model_config: Any, prefix: str) -> nn.Module:
    """Return vLLM's model of a member's configuration, without weights; `prefix` names its layers.

    The tag keeps what is compiled of one member apart from the others.
    """
    with set_model_tag(role):
        member: nn.Module = initialize_model(vllm_config=_config_of(vllm_config, model_config), prefix=prefix)
        return member


def _config_of(vllm_config: VllmConfig, model_config: Any) -> VllmConfig:
    """vLLM's configuration with all that it takes from a model's taken from the member's.

    `with_hf_config` leaves sizes, and the sliding window that attention layers without one of their own take from the
    cache's configuration, as they are for the whole ensemble.
    """
    own = vllm_config.with_hf_config(model_config)
    text = get_hf_text_config(own.model_config.hf_config)
    own.model_config.hf_text_config = text
    own.model_config.model_arch_config = own.model_config.get_model_arch_config()
    own.cache_config = copy.copy(vllm_config.cache_config)
    own.cache_config.sliding_window = own.model_config.get_sliding_window() if _all_slide(text) else None
    return own


def _all_slide(text_config: Any) -> bool:
    """As vLLM decides it: a window is the cache's only where every layer has it; else layers say their own."""
    kinds = getattr(text_config, "layer_types", None)
    return kinds is None or all(kind == "sliding_attention" for kind in kinds)
