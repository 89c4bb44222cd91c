"""An ensemble as one model of vLLM: members are vLLM's own models, combined where logits are computed.

Attention, paged caches, batching and parallel layers are the members' own. This class hands every member the same
tokens and positions, keeps their hidden states side by side, and combines the logits of the positions that vLLM
asks for, by the rule and with the operations of `ensembler_kernels`.
"""

from __future__ import annotations

from typing import Any

import torch
from ensembler_kernels import combine
from torch import Tensor, nn
from torch.nn.functional import pad
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix

from ensembler.decoding.points import GridPoint, points_by_rule
from ensembler.errors import InputError
from ensembler.patch.plan import Plan
from ensembler.runners import make_reader
from ensembler.serving.tensors import plan_member


class EnsembleForCausalLM(nn.Module):
    """Members by role, the anchor first; rule and α are those of the configuration until `set_point`, for all requests.

    Raises MemberError where an adapter is no sum with its base's weights.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: Any = vllm_config.model_config.hf_config
        checked = config.checked
        self.rule = config.get_rule()
        self._contract, self._outside = checked.contract, config.outside
        self._vocab_size: int = config.vocab_size
        self.set_point(GridPoint(self.rule.name, float(config.alpha)))
        self.readers = {role: make_reader(role, checked.contract) for role in self.rule.roles}
        self.plans: dict[str, Plan] = {role: plan_member(role, files.config) for role, files in checked.files.items()}
        self.members = nn.ModuleDict(
            {
                role: init_vllm_registered_model(
                    vllm_config=vllm_config,
                    hf_config=checked.model_configs[role],
                    prefix=maybe_prefix(prefix, role),
                )
                for role in self.rule.roles
            }
        )
        sizes = [checked.model_configs[role].get_text_config(decoder=True).hidden_size for role in self.rule.roles]
        self._sizes: list[int] = sizes

    def set_point(self, point: GridPoint) -> None:
        """Combine by another rule or α from the next step on. Raises ConfigError for one that does not fit the members.

        What is cached stays right: the members' keys and values depend on neither.
        """
        (self._point,) = points_by_rule([point], self.rule, self._contract, self._outside)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Refused: each member embeds tokens by itself. vLLM takes no class without this method for a model."""
        raise InputError("an ensemble has no embeddings of its own; give it token ids")

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Return the members' hidden states (tokens, Σ hidden sizes) side by side for `input_ids` (tokens,)."""
        if input_ids is None or inputs_embeds is not None or intermediate_tensors is not None:
            raise InputError(
                "an ensemble takes token ids, on one pipeline stage; its members are not one stack of layers"
            )
        hidden = [
            member(input_ids=self.readers[role].read(input_ids), positions=positions)
            for role, member in self.members.items()
        ]
        return torch.cat(hidden, dim=-1)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return combined logits (n, V) fp32 of hidden states (n, Σ hidden sizes); None on ranks that gather none."""
        parts = torch.split(hidden_states, self._sizes, dim=-1)
        members: dict[str, Any] = dict(self.members.items())
        logits = {
            role: member.compute_logits(part.contiguous())
            for (role, member), part in zip(members.items(), parts, strict=True)
        }
        if any(one is None for one in logits.values()):
            return None
        point = self._point
        combined = combine([logits[role] for role in point.roles], point.how, point.alphas[0])
        # Another rule's anchor may be narrower; vLLM looks up tokens by the vocabulary of the configuration.
        return pad(combined, (0, max(0, self._vocab_size - combined.shape[-1])), value=-torch.inf)
