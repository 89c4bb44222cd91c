"""One model over several devices, as accelerate's strategy 'sequential' does it when transformers loads a model.

It fills one device after another with whole pieces up to max_memory, which limits weights alone, and on the first
keeps room for the largest piece that is left. So the limits here leave room for the KV cache of the pieces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor

from ensembler.quantization import Quantization
from ensembler.sizes import Block

_KEPT_BY_QUANTIZERS = 0.9  # transformers uses this part of max_memory where bitsandbytes quantises


@dataclass(frozen=True)
class Share:
    """What a device gets of a model: bytes with its part of the KV cache, and its limit as max_memory wants it."""

    num_bytes: int
    limit: str


def spread(
    blocks: Sequence[Block], method: Quantization | None, room: Mapping[str, int], *, context: int, rows: int
) -> dict[str, Share] | None:
    """Return the share of each device of which `room` bytes are free, or None where the model does not fit."""
    exact = [block.num_bytes(method) for block in blocks]
    caches = [block.cache_bytes(context) * rows for block in blocks]
    # What transformers counts lacks the scales: all its numbers are made larger by the largest error of a piece.
    estimates = [block.estimate(method) for block in blocks]
    error = max((size / counted for size, counted in zip(exact, estimates, strict=True) if counted), default=1.0)
    sizes = [counted * error for counted in estimates]
    weights = min((size / (size + cache) for size, cache in zip(sizes, caches, strict=True) if size + cache), default=1)
    limits = {device: free * weights for device, free in room.items() if free > 0}
    placed = _fill(sizes, limits)
    if placed is None:
        return None
    if placed[0] != next(iter(limits)):  # a device that gets nothing is not named, and the next is then the first
        return spread(blocks, method, {**room, next(iter(limits)): 0}, context=context, rows=rows)
    used: dict[str, int] = {}
    for index, device in enumerate(placed):
        used[device] = used.get(device, 0) + exact[index] + caches[index]
    kept = 1.0 if method is None else _KEPT_BY_QUANTIZERS
    return {
        device: Share(num_bytes, f"{floor(limits[device] / error / kept / 2**10)}KiB")
        for device, num_bytes in used.items()
    }


def _fill(sizes: Sequence[float], limits: Mapping[str, float]) -> list[str] | None:
    """The device of each piece, or None where they do not fit."""
    devices = list(limits)
    placed: list[str] = []
    current, used = 0, 0.0
    for index, size in enumerate(sizes):
        while current < len(devices):
            reserve = max(sizes[index:]) if current == 0 else 0
            if used + size + reserve <= limits[devices[current]] - 2**10:  # limits are written in whole KiB
                break
            current, used = current + 1, 0.0
        else:
            return None
        used += size
        placed.append(devices[current])
    return placed
