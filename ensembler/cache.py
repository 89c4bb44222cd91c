"""The caches of all members as one `transformers.Cache`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import Cache, DynamicCache, PreTrainedModel

from ensembler.errors import RunError


class EnsembleCache(Cache):  # type: ignore[misc,unused-ignore]
    """One cache per role, whatever its type; `layers` are the layers of all of them.

    Everything that `transformers` does to a cache (reorder for beam search, crop for speculation, repeat, select,
    reset) it does to `layers`, and so to all members at once.
    """

    def __init__(self, members: Mapping[str, Cache]) -> None:
        super().__init__(layers=[layer for cache in members.values() for layer in cache.layers])
        self.members = dict(members)
        self._broken = False

    @classmethod
    def dynamic(cls, models: Iterable[tuple[str, PreTrainedModel]]) -> EnsembleCache:
        """Return an empty growing cache for each model, sliding windows as its config says."""
        return cls({role: DynamicCache(config=model.config) for role, model in models})

    @property
    def is_compileable(self) -> bool:
        """False: members make their own masks, and are compiled (if at all) one by one."""
        return False

    def lengths(self) -> list[int]:
        """Return the number of tokens that each layer has seen; raises RunError for a cache that a step has broken."""
        if self._broken:
            raise RunError("this cache was left uneven by a failed step and cannot be used; start from a new one")
        return [_length(layer) for layer in self.layers]

    def restore(self, lengths: list[int]) -> None:
        """Undo a step that failed half-way: crop the layers that are ahead, so that all members agree again.

        Layers that keep no past (a full sliding window, a recurrent state) cannot go back; the cache is then marked as
        broken and refuses to be used.
        """
        for layer, length in zip(self.layers, lengths, strict=True):
            try:
                ahead = _length(layer) - length
                if ahead:
                    layer.crop(-ahead)
            except (RuntimeError, ValueError, AttributeError):
                self._broken = True
        self._broken = self._broken or any(self.is_linear)


def _length(layer: Any) -> int:
    get = getattr(layer, "get_seq_length", None)
    return int(get()) if get is not None else 0  # recurrent states have no length
