"""The rows of a batch that splits: their tokens, masks, positions and the members' cache, selected together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicIndexedLayer, DynamicLayer, DynamicSlidingWindowLayer

from ensembler.cache import EnsembleCache
from ensembler.errors import InputError
from ensembler.modeling import EnsembleForCausalLM
from ensembler.runners import Step

_SPLITTING = (DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer)  # not what is derived from them


class Rows:
    """`ids` (rows, positions) int64 are the texts so far, padding and prompts included.

    `inputs`: what `generate` hands to forward: `attention_mask` and `position_ids`, of which `first` picks the prompts'
    own rows, and `past_key_values`. Raises InputError for a cache that cannot split.
    """

    def __init__(self, ids: Tensor, inputs: Mapping[str, Any], first: slice) -> None:
        mask, positions, cache = (inputs.get(name) for name in ("attention_mask", "position_ids", "past_key_values"))
        _check(cache)
        self.ids = ids
        self._mask: Tensor | None = None if mask is None else mask[first]
        self._positions: Tensor | None = None if positions is None else positions[first]
        self._cache: EnsembleCache | None = cache
        self._num_read = 0

    def run(self, model: EnsembleForCausalLM) -> Mapping[str, Tensor]:
        """Read what is new and return the members' logits (rows, V_member) after it by role, on the model's device."""
        new = slice(self._num_read, None)
        positions = None if self._positions is None else self._positions[:, new]
        logits = model.member_logits(Step(self.ids[:, new], self._mask, positions, logits_to_keep=1), self._cache)
        if self._cache is not None:
            self._num_read = self.ids.shape[1]
        return {role: values[:, -1].to(model.device) for role, values in logits.items()}

    def extended(self, parents: Tensor, tokens: Tensor) -> Tensor:
        """Return what the texts become: those of `parents` (n,) with a token (n,) each, (n, positions + 1)."""
        device = self.ids.device
        return torch.cat([self.ids[parents.to(device)], tokens.to(device)[:, None]], dim=1)

    def replace(self, ids: Tensor, parents: Tensor) -> None:
        """Go on with the texts `ids` (n, positions + 1) in place of those that are there, each from one of `parents`.

        `parents` (n,) is on the CPU, where it can index the caches of members on any device.
        """
        is_same = parents.shape[0] == self.ids.shape[0] and bool((parents == torch.arange(parents.shape[0])).all())
        if not is_same and self._cache is not None and parents.shape[0]:
            self._cache.batch_select_indices(parents)
        self.ids = ids
        self._mask = _grown(self._mask, parents, is_same, 0)
        self._positions = _grown(self._positions, parents, is_same, 1)


def _grown(values: Tensor | None, parents: Tensor, is_same: bool, step: int) -> Tensor | None:
    """Rows `parents` of `values` (rows, positions), each with its last value + `step` behind it."""
    if values is None:
        return None
    kept = values if is_same else values[parents.to(values.device)]
    return torch.cat([kept, kept[:, -1:] + step], dim=1)


def _check(cache: Any) -> None:
    """Raise InputError for a cache whose rows cannot be picked, or that holds something already."""
    if cache is None:
        return
    layer = next((layer for layer in cache.layers if type(layer) not in _SPLITTING), None)
    if layer is not None:
        raise InputError(
            f"a grid cannot split the rows of a cache of {type(layer).__name__}; leave out cache_implementation, or "
            "set use_cache=False"
        )
    if cache.get_seq_length():
        raise InputError("past_key_values holds tokens already; a grid begins with an empty cache, or with none given")
