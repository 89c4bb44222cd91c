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
from vllm.model_executor.models.utils import maybe_prefix

from ensembler.engine.grid import Grid, GridPoint
from ensembler.errors import InputError
from ensembler.serving.choice import plan_member
from ensembler.serving.vllm_members import build_member


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
        self.plans = {role: plan_member(role, files.config) for role, files in checked.files.items()}
        self.members = nn.ModuleDict(
            {
                role: build_member(vllm_config, role, checked.model_configs[role], maybe_prefix(prefix, role))
                for role in self.rule.roles
            }
        )
        most = vllm_config.scheduler_config.max_num_batched_tokens
        for role in self.rule.roles:
            if checked.contract.lacks_ids(role):
                self.register_buffer(f"{role}_ids", torch.zeros(most, dtype=torch.int32), persistent=False)
        texts = [checked.model_configs[role].get_text_config(decoder=True) for role in self.rule.roles]
        # Of the hidden states that a member hands to its head: OPT's smallest projects them first.
        self._widths = [int(getattr(text, "word_embed_proj_dim", text.hidden_size)) for text in texts]
        self._dtype = vllm_config.model_config.dtype

    def set_point(self, point: GridPoint) -> None:
        """Combine by another rule or α from the next step on. Raises ConfigError for one that does not fit the members.

        What is cached stays right: the members' keys and values depend on neither.
        """
        self._grid = Grid.of([point], self.rule, self._contract, self._outside)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Raise InputError: members embed tokens themselves. vLLM takes no class without this method for a model."""
        raise InputError("an ensemble has no embeddings of its own; give it token ids")

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Return the members' hidden states (tokens, Σ hidden sizes) side by side for `input_ids` (tokens,)."""
        if input_ids is None or inputs_embeds is not None:
            raise InputError("an ensemble takes token ids, no embeddings")
        hidden = torch.empty(len(input_ids), sum(self._widths), dtype=self._dtype, device=input_ids.device)
        for role, columns in zip(self.members, torch.split(hidden, self._widths, 1), strict=True):
            # Copied at once: the memory of a CUDA graph's last output is the next member's to use.
            columns.copy_(self.members[role](input_ids=self._read(role, input_ids), positions=positions))
        return hidden

    def _read(self, role: str, input_ids: Tensor) -> Tensor:
        """Return ids as the member knows them, where a CUDA graph found them when it was captured."""
        if not self._contract.lacks_ids(role):
            return input_ids
        ids: Tensor = getattr(self, f"{role}_ids")[: input_ids.shape[0]]
        return ids.copy_(self._contract.known_ids(role, input_ids))

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return combined logits (n, V) fp32 of hidden states (n, Σ hidden sizes); None on ranks that gather none."""
        members: dict[str, Any] = dict(self.members.items())
        own_states = zip(members.items(), torch.split(hidden_states, self._widths, 1), strict=True)
        logits = {role: member.compute_logits(states.contiguous()) for (role, member), states in own_states}
        if any(one is None for one in logits.values()):
            return None
        self._grid = self._grid.to(hidden_states.device)
        combined = combine(self._grid.ordered(logits), self._grid.weights)
        # Another rule's anchor may be narrower; vLLM looks up tokens by the vocabulary of the configuration.
        missing = self._vocab_size - combined.shape[-1]
        return pad(combined, (0, missing), value=-torch.inf) if missing > 0 else combined


class PointSetter:
    """Mixed into each worker's class by vLLM (`worker_extension_cls`)."""

    def set_point(self: Any, rule: str, alpha: float) -> None:
        """Combine by this rule and α from the next step on; raises ConfigError."""
        self.get_model().set_point(GridPoint(rule, alpha))
