"""The arithmetic of bytes: weights, quantised weights, adapters, KV cache, logits. It knows numbers, and no files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import torch

from ensembler.quantization import Quantization

_LOGIT_BYTES = 4  # combined in fp32, whatever the member's dtype
_BLOCK_4BIT, _BLOCK_OF_SCALES = 64, 256  # weights per scale, and scales per scale of scales, in bitsandbytes
_CODE_4BIT, _CODE_8BIT = 16 * 4, 256 * 4  # bytes of the tables that each quantised layer keeps


@dataclass(frozen=True)
class LayerCache:
    """The KV cache of one layer and one row: bytes per token, at most `window` tokens (None: all), and what is fixed
    (a recurrent state).
    """

    per_token: int
    window: int | None = None
    fixed: int = 0

    def num_bytes(self, length: int) -> int:
        """Bytes of one row of `length` tokens."""
        return self.fixed + self.per_token * (length if self.window is None else min(length, self.window))


@dataclass(frozen=True)
class Block:
    """A piece of a model that stays on one device: a decoder layer, an embedding, a head.

    `plain`: bytes of what is never quantised. `linear`: (weights, output rows) of each layer that can be, `itemsize`
    bytes a weight as long as it is not. `cache`: of the decoder layers in it.
    """

    plain: int
    linear: tuple[tuple[int, int], ...] = ()
    itemsize: int = 2
    cache: tuple[LayerCache, ...] = ()

    def num_bytes(self, quantization: Quantization | None = None) -> int:
        """Bytes of the weights."""
        return self.plain + sum(
            num * self.itemsize if quantization is None else _quantised(num, rows, quantization)
            for num, rows in self.linear
        )

    def estimate(self, quantization: Quantization | None = None) -> float:
        """Bytes as transformers counts them when it spreads a model: quantised weights without their scales."""
        each = self.itemsize if quantization is None else quantization.bits / 8
        return self.plain + sum(num * each for num, _ in self.linear)

    def cache_bytes(self, length: int) -> int:
        """Bytes of the KV cache of one row of `length` tokens."""
        return sum(layer.num_bytes(length) for layer in self.cache)


@dataclass(frozen=True)
class ModelSizes:
    """One copy of a model's weights: parameters (tied ones once), dtype, logits per row, pieces in their order."""

    parameters: int
    dtype: str
    width: int
    blocks: tuple[Block, ...]

    def num_bytes(self, quantization: Quantization | None = None) -> int:
        """Bytes of parameters, buffers and scales once loaded."""
        return sum(block.num_bytes(quantization) for block in self.blocks)

    def cache_bytes(self, length: int) -> int:
        """Bytes of the KV cache of one row of `length` tokens."""
        return sum(block.cache_bytes(length) for block in self.blocks)

    @property
    def cache_per_token(self) -> int:
        """Bytes that a token adds to the KV cache of one row, as long as no sliding window is full."""
        return sum(layer.per_token for block in self.blocks for layer in block.cache)


@dataclass(frozen=True)
class GroupSizes:
    """Members on one copy of the weights.

    `adapters`: parameters of each member's adapter, by role. `quantization`: what the user chose, which stays.
    `device`: where the user put the group, or None where it may be placed. `is_anchor`: the logits of all members are
    combined beside this group.
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
        return sum(self.adapters.values()) * int(getattr(torch, self.model.dtype).itemsize)

    def weight_bytes(self, quantization: Quantization | None = None, *, spread: bool = False) -> int:
        """Bytes of the weights, and of the adapters that are kept beside them (one alone is merged where it can be)."""
        beside = len(self.roles) > 1 or quantization is not None or spread
        return self.model.num_bytes(quantization) + (self.adapter_bytes if beside else 0)

    def cache_bytes(self, context: int, batch_size: int) -> int:
        """Bytes of the KV cache at this length: every member has rows of its own."""
        return self.model.cache_bytes(context) * batch_size * len(self.roles)


def logits_bytes(groups: Sequence[GroupSizes], batch_size: int) -> dict[tuple[str, ...], int]:
    """Bytes of the last position's logits by group: its members' own; beside the anchor all others' and the result."""
    own = {group.roles: group.model.width * len(group.roles) * batch_size * _LOGIT_BYTES for group in groups}
    total = sum(own.values())
    return {
        group.roles: total + group.model.width * batch_size * _LOGIT_BYTES if group.is_anchor else own[group.roles]
        for group in groups
    }


def _quantised(num: int, rows: int, quantization: Quantization) -> int:
    """Bytes of a layer of `num` weights and `rows` outputs as bitsandbytes keeps it, its scales and tables included."""
    if quantization.bits == 8:
        return num + 4 * rows
    scales = ceil(num / _BLOCK_4BIT)
    kept = 4 * scales
    if quantization.double_quant:  # a byte per scale, fp32 for 256 of them, their mean and a table
        kept = scales + 4 * ceil(scales / _BLOCK_OF_SCALES) + 4 + _CODE_8BIT
    return ceil(num / 2) + kept + _CODE_4BIT
