"""Members in vLLM: each its own model, built from its own configuration, with the weights of its own folder."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.transformers_utils.config import get_hf_text_config

from ensembler.errors import MemberError
from ensembler.patch.loading import load_patched
from ensembler.patch.patch_plan import PatchPlan
from ensembler.serving.vllm_shared import LOAD_ERRORS, find_backbones, mark_compiled


def build_member(vllm_config: VllmConfig, role: str, model_config: Any, prefix: str) -> nn.Module:
    """Return vLLM's model of a member's configuration, without weights; `prefix` names its layers.

    vLLM's configuration is given with all that it takes from a model's taken from the member's: `with_hf_config` leaves
    sizes, and the sliding window that attention layers without one of their own take from the cache's configuration,
    as they are for the whole ensemble. The tag keeps what is compiled of one member apart from the others.
    """
    own = vllm_config.with_hf_config(model_config)
    text = get_hf_text_config(own.model_config.hf_config)
    own.model_config.hf_text_config = text
    own.model_config.model_arch_config = own.model_config.get_model_arch_config()
    own.cache_config = copy.copy(vllm_config.cache_config)
    # As vLLM decides it: a window is the cache's only where every layer has it; else layers have their own.
    kinds = getattr(text, "layer_types", None)
    all_slide = kinds is None or all(kind == "sliding_attention" for kind in kinds)
    own.cache_config.sliding_window = own.model_config.get_sliding_window() if all_slide else None
    with set_model_tag(role):
        member: nn.Module = initialize_model(vllm_config=own, prefix=prefix)
        return member


class EnsembleLoader(BaseModelLoader):  # type: ignore[misc,unused-ignore]
    """The load format `ensembler`: members one after another, those of one folder on one copy of its weights.

    A LoRA on linear layers runs beside weights that members share; any other patch is added to a copy of its own.
    """

    def download_model(self, model_config: ModelConfig) -> None:
        """Do nothing: members were found when the configuration was read."""

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Fill every member; raise MemberError where its class does not take a tensor, or its files lack one."""
        ensemble: Any = model
        members, plans = dict(ensemble.members.items()), ensemble.plans
        backbones = find_backbones(members, plans)
        bases = {role: backbone.holder for backbone in backbones for role in backbone.members}
        for role, member in members.items():
            if bases.get(role, role) == role:
                _load(role, member, replace(plans[role], patches=()) if role in bases else plans[role])
        for backbone in backbones:
            backbone.join()
        mark_compiled(members, backbones)


def _load(role: str, member: Any, plan: PatchPlan) -> None:
    try:
        loaded: set[str] | None = member.load_weights(load_patched(plan))
    except LOAD_ERRORS as error:
        raise MemberError(
            f"{role}: vLLM's {type(member).__name__} does not take the weights of {plan.model.folder}: {error}"
        ) from error
    missing = sorted(name for name, _ in member.named_parameters() if loaded is not None and name not in loaded)
    if missing:
        raise MemberError(f"{role}: its weights files lack {len(missing)} tensors, {missing[0]} among them")
