"""When a text has to be decoded plainly: what speculative decoding cannot take back, or cannot tell apart."""

from __future__ import annotations

from typing import Any

from transformers import LogitsProcessorList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ensembler.cache import EnsembleCache
from ensembler.decoding.choosing import NOT_BY_ROW
from ensembler.modeling import EnsembleForCausalLM

_GROWING = (DynamicLayer, DynamicSlidingWindowLayer)  # not what is derived from them


def why_plain(
    model: EnsembleForCausalLM,
    processors: LogitsProcessorList,
    cache: Any,
    num_kept: int,
    prompt_length: int,
    max_length: int,
) -> str | None:
    """Return the reason why texts from `prompt_length` up to `max_length` positions cannot be drafted, if there is one.

    `num_kept`: the rows that somebody who gave the cache wants to go on with.
    """
    if model.world is not None:
        return "several processes share the members"
    if sum(map(len, model.groups)) == 1:
        return "all members run in one forward, so that there is none to verify"
    by_number = next((one for one in processors if isinstance(one, NOT_BY_ROW)), None)
    if by_number is not None:
        return f"{type(by_number).__name__} knows texts by their place in the batch, or keeps a state of its own"
    if cache is None:
        return "there is no cache to go on with"
    if cache.get_seq_length() >= prompt_length:
        return "the cache that was given holds the whole prompt already"
    return _why_not_taken_back(cache, num_kept, max_length)


def _why_not_taken_back(cache: EnsembleCache, num_kept: int, max_length: int) -> str | None:
    for roles, part in cache.parts.items():
        names = " and ".join(roles)
        if any(part.is_linear):
            return f"{names} keeps a recurrent state, which cannot be taken back"
        for layer in part.layers:
            if type(layer) not in _GROWING:
                return f"the cache of {names} has a {type(layer).__name__}, which cannot be taken back"
            window = getattr(layer, "sliding_window", None)
            if window is not None and max_length > window:
                return f"{names} keeps a window of {window} tokens and a text may have {max_length}"
    if num_kept > 1 and getattr(cache, "_is_user_defined", False):
        return "a cache that was given is gone on with, and rows would be shifted in it"
    return None
