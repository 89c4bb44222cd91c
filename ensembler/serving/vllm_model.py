"""An ensemble as one model of vLLM: members are vLLM's own models, combined where logits are computed.

Attention, paged caches, batching and parallel layers are the members' own. This class hands every member the same
tokens and positions, keeps their hidden states side by side, and combines the logits of the positions that vLLM
asks for, by the operations of `ensembler_kernels`. The weights of a token's request travel with its hidden states:
whichever rows vLLM gathers, in whatever order, each has its own.
"""

from __future__ import annotations

from typing import Any

import torch
from ensembler_kernels import Weights, combine
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import maybe_prefix

from ensembler.errors import ConfigError, InputError
from ensembler.serving.choice import plan_member
from ensembler.serving.token_counts import at_anchor, number_tokens
from ensembler.serving.vllm_failures import clear_begun_blocks, end_failed, used_members
from ensembler.serving.vllm_members import build_member
from ensembler.serving.vllm_shards import combine_shards, common_padding, padded_heads, shard_members
from ensembler.serving.vllm_weights import slots_of, state_class
from ensembler.serving.vocab_shards import has_nan


class EnsembleForCausalLM(nn.Module):
    """Members by role, the anchor of the folder's rule first. Rule and α are those of each request.

    Raises MemberError where an adapter is no sum with its base's weights, ConfigError with speculative decoding.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        if vllm_config.speculative_config is not None:
            raise ConfigError("speculative decoding was asked for; vLLM then leaves out what a request asks: leave it")
        if vllm_config.parallel_config.enable_dbo or vllm_config.model_config.enable_prompt_embeds:
            raise ConfigError(
                "an ensemble takes no micro-batches and no embeddings; leave out --enable-dbo and "
                "--enable-prompt-embeds"
            )
        self._slots = slots_of(vllm_config)
        self._rules = self._slots.rules
        checked = self._rules.checked
        self._contract = checked.contract
        self.plans = {role: plan_member(role, files.config) for role, files in checked.files.items()}
        self._pattern: Weights = self._rules.weights
        widths = {role: self._contract.widths[role] for role in self._rules.roles}
        padding = common_padding(self._pattern, widths)
        self.members = nn.ModuleDict()
        for role, width in widths.items():
            with padded_heads(width, padding):
                config = checked.model_configs[role]
                self.members[role] = build_member(vllm_config, role, config, maybe_prefix(prefix, role))
        self._shards = shard_members(dict(self.members.items()), self._pattern, widths)
        for role in self._rules.roles:
            ids = torch.zeros(len(self._slots.of_tokens), dtype=torch.int32)
            self.register_buffer(f"{role}_ids", ids, persistent=False)
        texts = [checked.model_configs[role].get_text_config(decoder=True) for role in self._rules.roles]
        # Of the hidden states that a member hands to its head: OPT's smallest projects them first.
        self._widths = [int(getattr(text, "word_embed_proj_dim", text.hidden_size)) for text in texts]
        self._dtype = vllm_config.model_config.dtype
        num_numbers = self._pattern.table.shape[1] + (self._slots.counts is not None)
        self._columns = num_numbers * 4 // self._dtype.itemsize

    def get_model_state_cls(self) -> type:
        """Return the class of states of the V2 runner."""
        return state_class(self._slots)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Raise InputError: members embed tokens themselves. vLLM takes no class without this method for a model."""
        raise InputError("an ensemble has no embeddings of its own; give it token ids")

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any | None = None,
        inputs_embeds: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Return (tokens, Σ hidden sizes + columns): the members' hidden states and each token's weights, as bits.

        `input_ids` (tokens,); `weights` (tokens, 2 · members + 2 or more) fp32 from the V2 runner.
        """
        if input_ids is None or inputs_embeds is not None:
            raise InputError("an ensemble takes token ids, no embeddings")
        if input_ids.device.type == "cpu":
            clear_begun_blocks()
        num, widths = len(input_ids), [*self._widths, self._columns]
        hidden = torch.empty(num, sum(widths), dtype=self._dtype, device=input_ids.device)
        *parts, last = torch.split(hidden, widths, 1)
        for role, columns in zip(self.members, parts, strict=True):
            # Copied at once: the memory of a CUDA graph's last output is the next member's to use.
            columns.copy_(self.members[role](input_ids=self._read(role, input_ids), positions=positions))
        weights = self._slots.of_step(num) if weights is None else weights
        if self._slots.counts is not None:
            weights = number_tokens(weights, positions)
        last.copy_(weights.view(self._dtype))
        return hidden

    def _read(self, role: str, input_ids: Tensor) -> Tensor:
        """Return ids as the member knows them, where a CUDA graph found them when it was captured.

        Beside tokens that only other members hold, these are ids behind the vocabulary: a text may end with one.
        """
        held = self._contract.held[role]
        ids: Tensor = getattr(self, f"{role}_ids")[: len(input_ids)]
        return ids.copy_(input_ids.where(input_ids < held, self._contract.substitutes[role]))

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return combined logits (n, V + members) fp32 of what `forward` returned, (n, ...).

        A row where a member with a weight computed NaN permits that member's id behind the vocabulary, and no other.
        None on ranks that gather no logits.
        """
        *states, last = torch.split(hidden_states, [*self._widths, self._columns], 1)
        own = zip(self.members.items(), states, strict=True)
        logits = {role: member.compute_logits(part.contiguous()) for (role, member), part in own}  # type: ignore[operator,unused-ignore]
        if any(one is None for one in logits.values()):
            return None
        ordered = [logits[role] for role in self._rules.roles]
        self._pattern = self._pattern.to(hidden_states.device)
        table, numbers = last.contiguous().view(torch.float32).tensor_split([self._pattern.table.shape[1]], 1)
        weights = self._pattern.replace_table(table)
        found = self._combine(ordered, weights)
        counts = self._slots.counts
        plain = self._combine(ordered, at_anchor(weights)) if counts is not None and counts.is_due else None
        if found is None:
            return None
        combined, has_failed = found[0], found[1] & used_members(weights)
        if counts is not None and plain is not None:
            counts.add(numbers.squeeze(1), combined, plain[0], has_failed.any(1))
        ended = end_failed(combined, has_failed)
        self._slots.failures = ended[:, combined.shape[1] :].clone()  # vLLM masks the logits themselves
        return ended

    def _combine(self, ordered: list[Tensor], weights: Weights) -> tuple[Tensor, Tensor] | None:
        """Return the combined logits (n, V) and which members computed NaN (n, members) bool."""
        if self._shards is not None:
            return combine_shards(self._shards, ordered, weights.table)
        return combine(ordered, weights), torch.stack([has_nan(one) for one in ordered], 1)
