"""The load format `ensembler`: each member's weights from its own folder, with its adapter or patch added."""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from ensembler.errors import MemberError
from ensembler.serving.tensors import member_tensors
from ensembler.serving.vllm_model import EnsembleForCausalLM


class EnsembleLoader(BaseModelLoader):  # type: ignore[misc,unused-ignore]
    """Loads the members of an ensemble one after another."""

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing to do: members were found when the configuration was read."""

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Fill every member; raises MemberError where a member's class does not take one of its tensors."""
        assert isinstance(model, EnsembleForCausalLM)
        for role, plan in model.plans.items():
            member: Any = model.members[role]
            try:
                loaded = member.load_weights(member_tensors(plan))
            except (KeyError, ValueError, AttributeError, AssertionError) as error:
                raise MemberError(
                    f"{role}: vLLM's {type(member).__name__} does not take the weights of {plan.model}: {error}"
                ) from error
            _check_all_loaded(role, member, loaded)


def _check_all_loaded(role: str, member: nn.Module, loaded: set[str] | None) -> None:
    if loaded is None:
        return
    missing = sorted(name for name, _ in member.named_parameters() if name not in loaded)
    if missing:
        raise MemberError(f"{role}: its weights files lack {len(missing)} tensors, {missing[0]} among them")
