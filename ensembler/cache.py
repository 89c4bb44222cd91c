"""The caches of all members as one `transformers.Cache`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Cache, DynamicCache, PreTrainedModel

from ensembler.errors import RunError


class EnsembleCache(Cache):  # type: ignore[misc,unused-ignore]
    """One cache per role, whatever its type; `layers` are the layers of all of them.

    Everything that `transformers` does to a cache (reorder for beam search, crop for speculation, repeat, select,
    reset) it does to `layers`, and so to all members at once.
    """

    def __init__(self, members: Mapping[str, Cache]) -> None:
        self.members = dict(members)
        self._broken = False
        super().__init__(layers=[])

    @classmethod
    def dynamic(cls, models: Mapping[str, PreTrainedModel]) -> EnsembleCache:
        """Return an empty growing cache for each model, sliding windows as its config says."""
        return cls({role: DynamicCache(config=model.config) for role, model in models.items()})

    @property
    def layers(self) -> list[Any]:
        """The layers of all members, those that a member made since the last look included."""
        return [layer for cache in self.members.values() for layer in cache.layers]

    @layers.setter
    def layers(self, value: list[Any]) -> None:
        """Nothing to set: Cache.__init__ assigns here, and the layers belong to the members."""

    @property
    def is_compileable(self) -> bool:
        """False: members make their own masks, and are compiled (if at all) one by one."""
        return False

    def lengths(self) -> dict[str, int]:
        """Return the number of tokens that each member has seen, by role; raises RunError for a broken cache."""
        if self._broken:
            raise RunError("this cache was left uneven by a failed step and cannot be used; start from a new one")
        return {role: int(cache.get_seq_length()) for role, cache in self.members.items()}

    def restore(self, lengths: Mapping[str, int]) -> None:
        """Undo a step that failed half-way: crop the layers that are ahead, so that all members agree again.

        Layers that keep no past (a full sliding window, a recurrent state) cannot go back; the cache is then marked as
        broken and refuses to be used.
        """
        for role, cache in self.members.items():
            for layer in cache.layers:
                self._broken = not _cropped(layer, lengths[role]) or self._broken
        self._broken = self._broken or any(self.is_linear)

    def reset(self) -> None:
        """Empty all layers; a broken cache is whole again."""
        super().reset()
        self._broken = False


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
