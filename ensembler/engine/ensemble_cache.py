"""The caches of all members as one `transformers.Cache`: for its own loops, and for contexts of several choices."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig

from ensembler.engine.model_runner import ModelRunner
from ensembler.errors import InputError, RunError

Roles = tuple[str, ...]


class EnsembleCache(Cache):  # type: ignore[misc,unused-ignore]
    """One cache for each model, by the roles that it serves; `layers` are the layers of all of them.

    Everything that `transformers` does to a cache (reorder for beam search, crop for speculation, repeat, select,
    reset) it does to `layers`, and so to all members at once. The cache of members on a shared backbone holds a block
    of rows for each: what picks rows picks them in every block.
    """

    def __init__(self, caches: Mapping[Roles, Cache]) -> None:
        self.caches = dict(caches)
        self._broken = False
        super().__init__(layers=[])

    @property
    def layers(self) -> list[Any]:
        """The layers of all members, those that a member made since the last look included."""
        return [layer for cache in self.caches.values() for layer in cache.layers]

    @layers.setter
    def layers(self, value: list[Any]) -> None:
        """Nothing to set: Cache.__init__ assigns here, and the layers belong to the members."""

    @property
    def is_compileable(self) -> bool:
        """False: members make their own masks, and are compiled (if at all) one by one."""
        return False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the rows of every block in the order of `beam_idx` (rows,)."""
        for roles, cache in self.caches.items():
            cache.reorder_cache(_in_every_block(beam_idx, len(roles), cache))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (which, or a mask) of every block."""
        for roles, cache in self.caches.items():
            cache.batch_select_indices(_in_every_block(indices, len(roles), cache))

    def selected(self, indices: Tensor) -> EnsembleCache:
        """Return a cache of the rows `indices`, any of them any number of times; this one stays as it is."""
        chosen = EnsembleCache({roles: copy.copy(cache) for roles, cache in self.caches.items()})
        for cache in chosen.caches.values():
            cache.layers = [copy.copy(layer) for layer in cache.layers]
        chosen.batch_select_indices(indices)
        return chosen

    def lengths(self) -> dict[Roles, int | Tensor]:
        """Return the number of tokens in each cache; that of a static one as a copy on its device.

        To read it would make the host wait for the device at every token. Raises RunError for a broken cache.
        """
        if self._broken:
            raise RunError("this cache was left uneven by a failed step and cannot be used; start from a new one")
        lengths = {roles: cache.get_seq_length() for roles, cache in self.caches.items()}
        return {roles: length.clone() if isinstance(length, Tensor) else length for roles, length in lengths.items()}

    def restore(self, lengths: Mapping[Roles, int | Tensor]) -> None:
        """Undo a step that failed half-way: crop the layers beyond `lengths`, so that all members agree again.

        Layers that keep no past (a full sliding window, a recurrent state) cannot go back; the cache is then marked as
        broken and refuses to be used.
        """
        for roles, cache in self.caches.items():
            for layer in cache.layers:
                self._broken = not _cropped(layer, int(lengths[roles])) or self._broken
        self._broken = self._broken or any(self.is_linear)

    def reset(self) -> None:
        """Empty all layers; a broken cache is whole again."""
        super().reset()
        self._broken = False


def prepare_caches(
    runners: Sequence[ModelRunner],
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> None:
    """Let every member prepare the cache it would prepare alone (dynamic, static, quantised), and join them.

    They are put into `model_kwargs` as `past_key_values`. Raises InputError for a member that keeps none.
    """
    caches: dict[Roles, Cache] = {}
    for runner in runners:
        model: Any = runner.model
        own = {**model_kwargs, "past_key_values": None}
        model._prepare_cache_for_generation(
            generation_config, own, generation_mode, batch_size * len(runner.roles), max_cache_length
        )
        if own["past_key_values"] is None:
            kind = type(model).__name__
            roles = " and ".join(runner.roles)
            raise InputError(f"{roles} ({kind}) keeps no key-value cache; call generate with use_cache=False")
        caches[runner.roles] = own["past_key_values"]
    model_kwargs["past_key_values"] = EnsembleCache(caches)


def _in_every_block(indices: Tensor, num_blocks: int, cache: Cache) -> Tensor:
    """Rows of one member as rows of all blocks of its cache."""
    num_rows = next((layer.keys.shape[0] for layer in cache.layers if layer.is_initialized), 0) // num_blocks
    if num_blocks == 1 or not num_rows:
        return indices
    rows = torch.arange(num_rows, device=indices.device)[indices]
    return torch.cat([rows + block * num_rows for block in range(num_blocks)])


def _cropped(layer: Any, length: int) -> bool:
    """Crop `layer` to at most `length` tokens; False where it cannot go back."""
    try:
        ahead = _length(layer) - length
        if ahead > 0:
            layer.crop(-ahead)
    except Exception:  # each kind of layer refuses in its own way; the step's own error is what the user must see
        return False
    return _length(layer) <= length


def _length(layer: Any) -> int:
    get = getattr(layer, "get_seq_length", None)
    return int(get()) if get is not None else 0  # recurrent states have no length
