"""Sizes in bytes: as people write them, as this machine has them, and of weights, KV caches and logits by arithmetic.

`BlockSizes` spreads a model over devices as transformers and accelerate do.
Loads no torch unless it is asked for the memory of this machine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import ceil, floor

from ensembler.errors import ConfigError
from ensembler.quantization import Quantization

_DECIMAL = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_BINARY = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_UNITS = {**_DECIMAL, **_BINARY}
DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
_LOGIT_BYTES = 4  # combined in fp32, whatever the member's dtype
_BLOCK_4BIT, _BLOCK_OF_SCALES = 64, 256  # weights per scale, and scales per scale of scales, in bitsandbytes
_CODE_4BIT, _CODE_8BIT = 16 * 4, 256 * 4  # bytes of the tables that each quantised layer keeps
_KEPT_BY_QUANTIZERS = 0.9  # transformers uses this fraction of max_memory where bitsandbytes quantises


def parse_size(text: str) -> int:
    """Return bytes of a size like '24GiB', '80 GB' or '512MiB'. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    unit = _UNITS.get(match.group(2).lower()) if match else None
    num_bytes = int(float(match.group(1)) * unit) if match and unit else 0
    if not num_bytes:
        raise ConfigError(f"{text!r} is not a size; expected a number above 0 and a unit: 24GiB, 80GB, 512MiB")
    return num_bytes


def show_size(num_bytes: float) -> str:
    """Return a number of bytes in binary units: '13.5 GiB'."""
    for unit, factor in reversed(_BINARY.items()):
        if abs(num_bytes) >= factor:
            return f"{num_bytes / factor:,.2f} {unit[0].upper()}iB"
    return f"{num_bytes:,.0f} B"


def show_digits(number: float) -> str:
    """Return a number with three significant digits: '0.0123', '1,230'."""
    return f"{float(f'{number:.3g}'):z,g}"


def device_budgets(sizes: Sequence[str]) -> dict[str, int]:
    """Return bytes by device: the given sizes, of cuda:0 first; without any, what is free on this machine.

    That is on each GPU, or in memory ('cpu') where there is none. Raises ConfigError.
    """
    if sizes:
        return {f"cuda:{number}": parse_size(text) for number, text in enumerate(sizes)}
    import torch

    if torch.cuda.is_available():
        return {f"cuda:{number}": torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count())}
    import psutil

    return {"cpu": int(psutil.virtual_memory().available)}


@dataclass(frozen=True)
class LayerCache:
    """The KV cache of one layer and one row: bytes per token, of at most `window` tokens, and `fixed` (a state)."""

    per_token: int
    window: int | None = None
    fixed: int = 0

    def num_bytes(self, length: int) -> int:
        """Return bytes of one row of `length` tokens."""
        return self.fixed + self.per_token * (length if self.window is None else min(length, self.window))


@dataclass(frozen=True)
class Block:
    """A block of a model that stays on one device: a decoder layer, an embedding, a head.

    `plain`: bytes that are never quantised. `linear`: (weights, output rows) of each layer that can be, at `itemsize`
    bytes a weight as long as it is not. `cache`: of the decoder layers in it.
    """

    plain: int
    linear: tuple[tuple[int, int], ...] = ()
    itemsize: int = 2
    cache: tuple[LayerCache, ...] = ()

    def num_bytes(self, quantization: Quantization | None = None) -> int:
        """Return bytes of the weights."""
        return self.plain + sum(
            num * self.itemsize if quantization is None else _quantised(num, rows, quantization)
            for num, rows in self.linear
        )

    def estimate(self, quantization: Quantization | None = None) -> float:
        """Return bytes as transformers counts them to spread a model: quantised weights without their scales."""
        each = self.itemsize if quantization is None else quantization.bits / 8
        return self.plain + sum(num * each for num, _ in self.linear)

    def cache_bytes(self, length: int) -> int:
        """Return bytes of the KV cache of one row of `length` tokens."""
        return sum(layer.num_bytes(length) for layer in self.cache)


@dataclass(frozen=True)
class ModelSizes:
    """One copy of a model's weights: parameters (tied ones once), dtype, logits per row, blocks in their order."""

    parameters: int
    dtype: str
    width: int
    blocks: tuple[Block, ...]

    def num_bytes(self, quantization: Quantization | None = None) -> int:
        """Return bytes of parameters, buffers and scales once loaded."""
        return sum(block.num_bytes(quantization) for block in self.blocks)

    def cache_bytes(self, length: int) -> int:
        """Return bytes of the KV cache of one row of `length` tokens."""
        return sum(block.cache_bytes(length) for block in self.blocks)

    @property
    def cache_per_token(self) -> int:
        """Bytes that a token adds to the KV cache of one row, as long as no sliding window is full."""
        return sum(layer.per_token for block in self.blocks for layer in block.cache)


@dataclass(frozen=True)
class GroupSizes:
    """Members on one copy of the weights.

    `adapters`: parameters of each member's adapter, by role. `quantization` and `device`: the user's choices, which
    stay (None: free). `is_anchor`: the logits of all members are combined beside this group.
    """

    roles: tuple[str, ...]
    name: str
    model: ModelSizes
    adapters: Mapping[str, int]
    quantization: Quantization | None = None
    device: str | None = None
    is_anchor: bool = False

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the adapters where they are kept beside the weights."""
        return sum(self.adapters.values()) * DTYPE_BYTES.get(self.model.dtype, 4)

    def weight_bytes(self, quantization: Quantization | None = None, *, is_spread: bool = False) -> int:
        """Return bytes of the weights and of adapters kept beside them: one alone is merged where it can be."""
        is_beside = len(self.roles) > 1 or quantization is not None or is_spread
        return self.model.num_bytes(quantization) + (self.adapter_bytes if is_beside else 0)

    def cache_bytes(self, context: int, batch_size: int) -> int:
        """Return bytes of the KV cache at this length: every member has rows of its own."""
        return self.model.cache_bytes(context) * batch_size * len(self.roles)


def logits_bytes(groups: Sequence[GroupSizes], batch_size: int) -> dict[tuple[str, ...], int]:
    """Return bytes of the last position's logits by group: its own; with the anchor all others' and the result."""
    own = {group.roles: group.model.width * len(group.roles) * batch_size * _LOGIT_BYTES for group in groups}
    total = sum(own.values())
    return {
        group.roles: total + group.model.width * batch_size * _LOGIT_BYTES if group.is_anchor else own[group.roles]
        for group in groups
    }


@dataclass(frozen=True)
class Share:
    """A device's share of a model: bytes with its part of the KV cache, and its limit as max_memory wants it."""

    num_bytes: int
    limit: str


@dataclass(frozen=True)
class BlockSizes:
    """The bytes of a model's blocks, in their order, as needed to spread them over devices.

    `exact`: with the KV cache. `estimates`: of the weights as transformers counts them, times `error`, so that none is
    too small; the scales of quantised weights are not counted there. `weights`: the smallest fraction of a block that
    is weights and not KV cache. `kept`: the fraction of max_memory that transformers uses.
    """

    exact: tuple[int, ...]
    estimates: tuple[float, ...]
    error: float
    weights: float
    kept: float

    @classmethod
    @lru_cache(maxsize=64)
    def of(cls, blocks: tuple[Block, ...], method: Quantization | None, context: int, rows: int) -> BlockSizes:
        """Measure `blocks` for `rows` rows (all members of the group together) of `context` tokens."""
        exact = [block.num_bytes(method) for block in blocks]
        caches = [block.cache_bytes(context) * rows for block in blocks]
        counted = [block.estimate(method) for block in blocks]
        error = max((size / count for size, count in zip(exact, counted, strict=True) if count), default=1.0)
        both = [(count * error, count * error + cache) for count, cache in zip(counted, caches, strict=True)]
        return cls(
            exact=tuple(size + cache for size, cache in zip(exact, caches, strict=True)),
            estimates=tuple(size for size, _ in both),
            error=error,
            weights=min((size / total for size, total in both if total), default=1.0),
            kept=1.0 if method is None else _KEPT_BY_QUANTIZERS,
        )

    def spread(self, room: Mapping[str, int]) -> dict[str, Share] | None:
        """Return the share of each device of which `room` bytes are free, or None where the model does not fit."""
        limits = {device: free * self.weights for device, free in room.items() if free > 0}
        devices = self._fill(limits)
        if devices is None:
            return None
        first = next(iter(limits))
        if devices[0] != first:  # a device that gets nothing is not named, and the next is then the first
            return self.spread({**room, first: 0})
        used: dict[str, int] = {}
        for device, num_bytes in zip(devices, self.exact, strict=True):
            used[device] = used.get(device, 0) + num_bytes
        return {
            device: Share(num_bytes, f"{floor(limits[device] / self.error / self.kept / 2**10)}KiB")
            for device, num_bytes in used.items()
        }

    def _fill(self, limits: Mapping[str, float]) -> list[str] | None:
        """Return the device of each block as accelerate fills them in turn, or None where they do not fit.

        It keeps room for the largest of the blocks that follow on the first device.
        """
        largest_left = list(accumulate(reversed(self.estimates), max))[::-1]
        waiting = iter(limits)
        device = next(waiting, None)
        is_first, used = True, 0.0
        found: list[str] = []
        for size, largest in zip(self.estimates, largest_left, strict=True):
            # Limits are written in whole KiB.
            while device is not None and used + size + (largest if is_first else 0) > limits[device] - 2**10:
                device, is_first, used = next(waiting, None), False, 0.0
            if device is None:
                return None
            used += size
            found.append(device)
        return found


def _quantised(num: int, rows: int, quantization: Quantization) -> int:
    """Return bytes of a layer of `num` weights and `rows` outputs in bitsandbytes, with its scales and tables."""
    if quantization.bits == 8:
        return num + 4 * rows
    scales = ceil(num / _BLOCK_4BIT)
    kept = 4 * scales
    if quantization.double_quant:  # a byte per scale, fp32 for 256 of them, their mean and a table
        kept = scales + 4 * ceil(scales / _BLOCK_OF_SCALES) + 4 + _CODE_8BIT
    return ceil(num / 2) + kept + _CODE_4BIT
