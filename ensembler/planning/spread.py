"""One model over several devices, as accelerate's strategy 'sequential' does it when transformers loads a model.

It fills one device after another with whole pieces up to max_memory, which limits weights alone, and on the first
keeps room for the largest piece that is left. So the limits here leave room for the KV cache of the pieces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import floor

from ensembler.planning.sizes import Block
from ensembler.quantization import Quantization

_KEPT_BY_QUANTIZERS = 0.9  # transformers uses this part of max_memory where bitsandbytes quantises


@dataclass(frozen=True)
class Share:
    """A device's share of a model: bytes with its part of the KV cache, and its limit as max_memory wants it."""

    num_bytes: int
    limit: str


@dataclass(frozen=True)
class Pieces:
    """The pieces of a model in their order.

    `exact`: bytes with the KV cache. `sizes`: bytes of the weights as transformers counts them, times `error`, so that
    none is too small; the scales of quantised weights are not counted there. `weights`: the smallest fraction of a
    piece that is weights and not KV cache. `kept`: the part of max_memory that transformers uses.
    """

    exact: tuple[int, ...]
    sizes: tuple[float, ...]
    error: float
    weights: float
    kept: float

    @classmethod
    def of(cls, blocks: Sequence[Block], method: Quantization | None, *, context: int, rows: int) -> Pieces:
        """Measure `blocks` for `rows` rows (all members of the group together) of `context` tokens."""
        exact = [block.num_bytes(method) for block in blocks]
        caches = [block.cache_bytes(context) * rows for block in blocks]
        estimates = [block.estimate(method) for block in blocks]
        error = max((size / counted for size, counted in zip(exact, estimates, strict=True) if counted), default=1.0)
        sizes = tuple(counted * error for counted in estimates)
        both = [(size, size + cache) for size, cache in zip(sizes, caches, strict=True)]
        return cls(
            exact=tuple(size + cache for size, cache in zip(exact, caches, strict=True)),
            sizes=sizes,
            error=error,
            weights=min((size / total for size, total in both if total), default=1.0),
            kept=1.0 if method is None else _KEPT_BY_QUANTIZERS,
        )


def spread(pieces: Pieces, room: Mapping[str, int]) -> dict[str, Share] | None:
    """Return the share of each device of which `room` bytes are free, or None where the model does not fit."""
    limits = {device: free * pieces.weights for device, free in room.items() if free > 0}
    placed = _fill(pieces.sizes, limits)
    if placed is None:
        return None
    first = next(iter(limits))
    if placed[0] != first:  # a device that gets nothing is not named, and the next is then the first
        return spread(pieces, {**room, first: 0})
    used: dict[str, int] = {}
    for device, num_bytes in zip(placed, pieces.exact, strict=True):
        used[device] = used.get(device, 0) + num_bytes
    return {
        device: Share(num_bytes, f"{floor(limits[device] / pieces.error / pieces.kept / 2**10)}KiB")
        for device, num_bytes in used.items()
    }


def _fill(sizes: Sequence[float], limits: Mapping[str, float]) -> list[str] | None:
    """The device of each piece, or None where they do not fit."""
    devices = list(limits)
    largest_left = list(accumulate(reversed(sizes), max))[::-1]
    placed: list[str] = []
    current, used = 0, 0.0
    for size, largest in zip(sizes, largest_left, strict=True):
        while current < len(devices):
            reserve = largest if current == 0 else 0
            if used + size + reserve <= limits[devices[current]] - 2**10:  # limits are written in whole KiB
                break
            current, used = current + 1, 0.0
        else:
            return None
        used += size
        placed.append(devices[current])
    return placed
