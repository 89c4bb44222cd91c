"""The caches of all members as one `transformers.Cache`: for its own loops, and for contexts of several choices."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig
from transformers.cache_utils import CacheLayerMixin
from transformers.utils import logging

from ensembler.engine.model_runner import ModelRunner, plain_model
from ensembler.errors import RunError

_logger = logging.get_logger(__name__)
Roles = tuple[str, ...]
_OWN_STATES = ("recurrent_gemma",)  # families whose modules keep the state of the last text
# Families with states that pieces of a prompt go on from (tests/decoding/test_like_the_member_alone.py).
_GOING_ON = ("qwen3_next",)


@dataclass(frozen=True)
class Rereading:
    """The models, by `roles`, that read a text anew in the next step; the others read its last `num_new` tokens."""

    roles: frozenset[Roles]
    num_new: int


class EnsembleCache(Cache):  # type: ignore[misc,unused-ignore]
    """One cache for each model, by the roles that it serves; `layers` are the layers of all of them.

    Everything that `transformers` does to a cache (reorder for beam search, crop for speculation, repeat, select,
    reset) it does to `layers`, and so to all members at once. The cache of members on a shared backbone holds a block
    of rows for each: what picks rows picks them in every block. `num_tokens`: that it holds, for members that keep a
    state and count none; `rereading`: the members that read them again in the next step.
    """

    def __init__(self, caches: Mapping[Roles, Cache]) -> None:
        self.caches = dict(caches)
        self.num_tokens = 0
        self.rereading: Rereading | None = None
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

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Return the tokens that it holds."""
        if any(map(_counts_tokens, self.caches.values())):
            return super().get_seq_length(layer_idx)
        return self.num_tokens

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

    def read_anew(self, roles: Iterable[Roles], num_new: int) -> None:
        """Empty the caches of `roles`; the next step has to be given all tokens, `num_new` of them new."""
        self.rereading = Rereading(frozenset(roles), num_new)
        for each in self.rereading.roles:
            self.caches[each].reset()

    def lengths(self) -> dict[Roles, int | Tensor]:
        """Return the number of tokens in each cache; that of a static one as a copy on its device.

        To read it would make the host wait for the device at every token. Raises RunError for a broken cache.
        """
        if self._broken:
            raise RunError("this cache was left uneven by a failed step and cannot be used; start from a new one")
        counting = {roles: cache for roles, cache in self.caches.items() if _counts_tokens(cache)}
        lengths = {roles: cache.get_seq_length() for roles, cache in counting.items()}
        return {roles: length.clone() if isinstance(length, Tensor) else length for roles, length in lengths.items()}

    def restore(self, lengths: Mapping[Roles, int | Tensor]) -> None:
        """Undo a step that failed half-way: crop the layers beyond `lengths`, so that all members agree again.

        Layers that keep no past (a full sliding window, a recurrent state) cannot go back; the cache is then marked as
        broken and refuses to be used.
        """
        for roles, cache in self.caches.items():
            for layer in cache.layers:
                self._broken = not _cropped(layer, int(lengths.get(roles, 0))) or self._broken
        self._broken = self._broken or any(self.is_linear)

    def reset(self) -> None:
        """Empty all layers; a broken cache is whole again."""
        super().reset()
        self.num_tokens, self.rereading, self._broken = 0, None, False


def has_cache(runner: ModelRunner) -> bool:
    """Return whether a model takes a cache of `transformers`, and keeps nothing of a text elsewhere."""
    model: Any = plain_model(runner.model)
    is_taken = runner.cache_name in runner.accepts and model._supports_default_dynamic_cache()
    return bool(is_taken) and model.config.model_type not in _OWN_STATES


def why_not_in_pieces(runners: Sequence[ModelRunner]) -> str | None:
    """Return which member would give other logits for a prompt that is read in pieces, and why; None without any.

    It is of these caches: on a RowCache none would.
    """
    for runner in runners:
        roles, model = " and ".join(runner.roles), plain_model(runner.model)
        if not has_cache(runner):
            return f"{roles} takes no cache"
        if runner.scale is not None:
            return f"{roles} scales positions by the length of what is read"
        if model._is_stateful and model.config.model_type not in _GOING_ON:
            return f"{roles} keeps a state, and does not go on from it with several tokens"
    return None


def roles_to_reread(
    cache: object, runners: Sequence[ModelRunner], mask: Tensor | None, num_new: int | None
) -> list[Roles]:
    """Return the models that read a text anew where it has grown to this length, as alone they do.

    `mask` (rows, past + new), or None where all is seen, is that of the step that follows, of `num_new` tokens.
    """
    rereading = {one.roles: one.scale.reread_at for one in runners if one.scale and one.scale.reread_at}
    if not rereading or not isinstance(cache, EnsembleCache) or not num_new:
        return []
    num_past = int(cache.get_seq_length())
    past = [num_past] if mask is None else mask[:, :-num_new].sum(1).tolist()
    texts = [num_past + num_new] if mask is None else mask.sum(1).tolist()
    if not num_past:
        return []
    return [
        roles
        for roles, num in rereading.items()
        if any(before <= num < after for before, after in zip(past, texts, strict=True))
    ]


def prepare_caches(
    runners: Sequence[ModelRunner],
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> None:
    """Let every member prepare the cache it would prepare alone (dynamic, static, quantised), and join them.

    They are put into `model_kwargs` as `past_key_values`. Where a member takes none, there is none for any: all read
    each text again at every token.
    """
    caches: dict[Roles, Cache] = {}
    for runner in runners:
        model: Any = plain_model(runner.model)
        if not has_cache(runner):
            roles, kind = " and ".join(runner.roles), type(model).__name__
            _logger.warning_once(f"{roles} ({kind}) takes no cache: every token costs a forward of the whole text")
            generation_config.use_cache = model_kwargs["use_cache"] = False
            return
        own = {**model_kwargs, "past_key_values": None}
        model._prepare_cache_for_generation(
            generation_config, own, generation_mode, batch_size * len(runner.roles), max_cache_length
        )
        caches[runner.roles] = own[runner.cache_name]
    model_kwargs["past_key_values"] = EnsembleCache(caches)


def _in_every_block(indices: Tensor, num_blocks: int, cache: Cache) -> Tensor:
    """Rows of one member as rows of all blocks of its cache."""
    if num_blocks == 1:
        return indices
    num_rows = next((num for layer in cache.layers if (num := _num_rows(layer))), 0) // num_blocks
    if not num_rows:
        return indices
    rows = torch.arange(num_rows, device=indices.device)[indices]
    return torch.cat([rows + block * num_rows for block in range(num_blocks)])


def _num_rows(layer: Any) -> int:
    """Return the rows of a layer with keys, or with states alone; 0 where it holds nothing yet."""
    states = [getattr(layer, "keys", None)]
    for by_number in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
        states += by_number.values()
    return next((one.shape[0] for one in states if one is not None), 0)


def _counts_tokens(cache: Cache) -> bool:
    """Return whether a cache has a layer of keys and values: states do not count."""
    return not cache.layers or any(isinstance(layer, CacheLayerMixin) for layer in cache.layers)


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
