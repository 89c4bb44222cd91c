"""Keys and values of several texts, each row with a length of its own.

A forward says at which positions of which rows its tokens stand; it writes there, and sees what stands before. So rows
are rolled back by reading again from an earlier position, ragged rows need no shifting, and a row is copied by one
copy. Buffers are allocated once and stay where they are: a captured graph finds them again. A sliding window needs no
ring: the mask cuts it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ensembler.engine.scaled_positions import PositionScale

Roles = tuple[str, ...]

# Families whose logits on a row cache are those of their own growing caches (tests/test_row_cache.py). They take masks
# in 4-D, positions per row, and keep nothing of a text but keys and values.
FAMILIES = {
    "apertus", "arcee", "biogpt", "bitnet", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "ernie4_5", "exaone4",
    "falcon", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neox",
    "gpt_oss", "granite", "granitemoe", "helium", "hunyuan_v1_dense", "jetmoe", "llama", "ministral", "mistral",
    "mixtral", "mpt", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon", "phi", "phi3", "phimoe",
    "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2", "xglm",
}  # fmt: skip
SLIDING = "sliding_attention"
SMALLEST = 256  # slots that a step reads at least, where the number is rounded: part of what a graph is made for
_ATTENTIONS = ("sdpa", "eager")  # those that take a mask in 4-D


def why_not_by_row(model: PreTrainedModel) -> str | None:
    """Return why a model cannot run on a row cache, or None where it can."""
    config = model.config.get_text_config(decoder=True)
    if config.model_type not in FAMILIES:
        return f"{type(model).__name__} has not been tried on it"
    if config._attn_implementation not in _ATTENTIONS:
        return f"its attention ({config._attn_implementation}) takes no mask per row; load it with attention 'sdpa'"
    if config.model_type == "falcon" and config.alibi:
        return "it makes ALiBi's biases from a mask in 2-D"
    return None


@dataclass(frozen=True)
class Slots:
    """The slots of the `num` new tokens of each of `num_rows` rows of the cache, from `first_row` on.

    `start`: the slot of the first token where all rows stand together and nothing is padded. Else `index` says of each
    token its row in the cache, (rows, 1), and its slot there, (rows, num), which is the cache's room for padding; both
    int64. `length`: slots that are read, from the first on. `is_static`: shapes and addresses are those of a graph, or
    of a compiled step.
    """

    first_row: int
    num_rows: int
    num: int
    length: int
    start: int | None = None
    index: tuple[Tensor, Tensor] | None = None
    is_static: bool = False

    @classmethod
    def of(cls, positions: Tensor, on_device: Tensor, room: int, first_row: int = 0) -> Slots:
        """Return the slots of tokens at `positions` (rows, n) int64 on the CPU, the same `on_device`; −1 is padding."""
        num_rows, num = positions.shape
        found = positions.tolist()
        first, length = found[0][0], max(map(max, found)) + 1
        if first >= 0 and found == [list(range(first, first + num))] * num_rows:
            return cls(first_row, num_rows, num, length, start=first)
        return cls(first_row, num_rows, num, length, index=_index(on_device, room, first_row))

    @classmethod
    def static(cls, positions: Tensor, room: int, length: int) -> Slots:
        """Return the slots of tokens at `positions` (rows, n) on a device, that the host does not look at."""
        num_rows, num = positions.shape
        return cls(0, num_rows, num, length, index=_index(positions, room, 0), is_static=True)


def _index(positions: Tensor, room: int, first_row: int) -> tuple[Tensor, Tensor]:
    rows = torch.arange(first_row, first_row + positions.shape[0], device=positions.device)
    return rows[:, None], positions.where(positions >= 0, room)


def common_length(rows: Sequence[Sequence[int]]) -> int:
    """Return how many ids all `rows` begin with."""
    return next((i for i, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1), min(map(len, rows)))


def bucket(num: int, smallest: int = SMALLEST) -> int:
    """Return the next power of two, at least `smallest`."""
    return max(smallest, 1 << (num - 1).bit_length())


@dataclass(frozen=True)
class MaskKind:
    """The masks of a model: its sliding `window`, if any, and its `layer_types`, None where all layers take one.

    `dtype`: that of its weights; None where a mask has to be bool.
    """

    window: int | None
    layer_types: frozenset[str] | None
    dtype: torch.dtype | None

    @classmethod
    def of(cls, model: PreTrainedModel) -> MaskKind:
        """Return the kind that a model takes."""
        config = model.config.get_text_config(decoder=True)
        layer_types = getattr(config, "layer_types", None)
        # A mask that is added is made once, a bool one is turned into that by each attention. But quantised layers
        # compute in a dtype of their own.
        is_quantised = getattr(model, "hf_quantizer", None) is not None
        dtype = None if is_quantised and config._attn_implementation == "sdpa" else model.dtype
        window = getattr(config, "sliding_window", None)
        return cls(window, None if layer_types is None else frozenset(layer_types), dtype)


class Masks:
    """The masks of a forward by what models want: made once for all members on a device.

    `positions` (rows, n) int64 of tokens that stand in `slots`; −1 is padding, which sees the first slot alone.
    """

    def __init__(self, positions: Tensor, slots: Slots) -> None:
        self._num_rows = positions.shape[0]
        at = positions if slots.start is None else positions[:1]  # rows that stand together share the memory of one
        self._at = at.clamp(min=0)[:, None, :, None]
        self._slots = torch.arange(slots.length, device=positions.device)
        self._made: dict[object, Tensor] = {}

    def of(self, kind: MaskKind) -> Tensor | dict[str, Tensor]:
        """Return the mask (rows, 1, n, length) of a model, by layer type where it has several."""
        if kind.layer_types is None:
            return self._mask(kind.window, kind.dtype)
        return {one: self._mask(kind.window if one == SLIDING else None, kind.dtype) for one in kind.layer_types}

    def _mask(self, window: int | None, dtype: torch.dtype | None) -> Tensor:
        """Bool, True where a token is seen; with a `dtype` what is added to scores, 0 or its smallest number."""
        key = window, dtype
        if key not in self._made:
            seen = self._slots <= self._at
            seen = seen if window is None else seen & (self._slots > self._at - window)
            if dtype is not None:
                low = torch.finfo(dtype).min
                seen = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, low)
            self._made[key] = seen.expand(self._num_rows, -1, -1, -1)
        return self._made[key]


class RowCache:
    """The caches of all members for `num_rows` texts of at most `room` tokens.

    Of each row all members have read the first `lengths` tokens of `texts`: the loop sets both, and what stands behind
    them counts for nothing. `caches` has one for each model, by the roles that it serves; a model that serves several
    members keeps a block of rows for each. `plan`: number of the plan of runners that it was made for. `scales`: those
    of the members whose positions have one; `longest`: the tokens of the longest text that it ever held.
    """

    def __init__(
        self, roles: Iterable[Roles], num_rows: int, room: int, plan: int = 0, scales: Sequence[PositionScale] = ()
    ) -> None:
        self.caches = {one: ModelRowCache(len(one), num_rows, room) for one in roles}
        self.num_rows = num_rows
        self.room = room
        self.plan = plan
        self.scales = tuple(scales)
        self.longest = 0
        self.lengths = [0] * num_rows
        self.texts: list[Sequence[int]] = [()] * num_rows
        self.version = object()  # of the buffers: another when they have moved, and in each copy

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the tokens of the longest row."""
        return max(self.lengths, default=0)

    def empty(self) -> None:
        """Let all rows hold nothing; the buffers stay where they are."""
        self.texts, self.lengths = [()] * self.num_rows, [0] * self.num_rows

    def hold(self, texts: Sequence[Sequence[int]], lengths: Sequence[int], first: int = 0) -> None:
        """Set what rows from `first` on hold: the first `lengths` tokens of `texts`."""
        self.texts[first : first + len(texts)] = texts
        self.lengths[first : first + len(texts)] = lengths

    def num_held(self, row: int, ids: Sequence[int]) -> int:
        """Return how many tokens of a text a row holds; its last is read again, for the logits behind it."""
        if not self.is_unscaled(max(self.longest, len(ids))):
            return 0
        num = min(self.lengths[row], len(ids) - 1) if row < self.num_rows else 0
        held, wanted = self.texts[row][:num] if num else (), ids[:num]
        return num if held == wanted else common_length([held, wanted])

    def is_unscaled(self, length: int) -> bool:
        """Return whether a text of `length` tokens may begin with what was read for another one."""
        return all(length <= scale.unscaled for scale in self.scales)

    def next_reread(self, num_read: int) -> int | None:
        """Return the length behind which a text that has `num_read` tokens will be read anew, or None."""
        return min((at for one in self.scales if (at := one.reread_at or 0) > num_read), default=None)

    def reserve(self, num_rows: int, room: int) -> None:
        """Make room for more or longer texts: buffers that are too small move to larger ones, of a power of two."""
        if num_rows <= self.num_rows and room <= self.room:
            return
        num_rows = self.num_rows if num_rows <= self.num_rows else bucket(num_rows, 1)
        room = self.room if room <= self.room else bucket(room)
        larger = RowCache(self.caches, num_rows, room, self.plan, self.scales)
        larger.copy_rows(range(self.num_rows), range(self.num_rows), self.room, self)  # all is as it was if this fails
        self.caches, self.num_rows, self.room, self.version = larger.caches, num_rows, room, object()
        self.lengths += [0] * (num_rows - len(self.lengths))
        self.texts += [()] * (num_rows - len(self.texts))

    def copied(self, num_rows: int) -> RowCache:
        """Return a cache of the first `num_rows` rows, just long enough for them."""
        length = max(self.lengths[:num_rows])
        copied = RowCache(self.caches, num_rows, length, self.plan, self.scales)
        copied.longest = self.longest
        copied.copy_rows(range(num_rows), range(num_rows), length, self)
        copied.hold(self.texts[:num_rows], self.lengths[:num_rows])
        return copied

    def copy_rows(
        self, sources: Sequence[int], targets: Sequence[int], length: int, other: RowCache | None = None
    ) -> None:
        """Make the first `length` tokens of the rows `targets` those of the rows `sources`, here or in `other`."""
        other = self if other is None else other
        for roles, cache in self.caches.items():
            cache.copy_rows(sources, targets, other.caches[roles], length)

    def forget_behind(self) -> None:
        """Clear what stands behind the lengths: after a forward that computed NaN, which a mask does not stop."""
        for cache in self.caches.values():
            cache.forget_behind(self.lengths)


class ModelRowCache(Cache):  # type: ignore[misc,unused-ignore]
    """The cache of one model on a RowCache. `slots` are set before each forward."""

    def __init__(self, num_blocks: int, num_rows: int, room: int) -> None:
        super().__init__(layers=[])
        self.num_blocks = num_blocks
        self.num_rows = num_rows
        self.room = room
        self.slots: Slots | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new keys and values (blocks · rows, heads, n, width); return all that the tokens may see."""
        layer = self._layer(layer_idx, key_states, value_states)
        return self._advance(layer.keys, key_states), self._advance(layer.values, value_states)

    def _layer(self, index: int, keys: Tensor, values: Tensor) -> Any:
        """Return a layer with buffers (blocks · rows, heads, room + 1, width), made at first for states like these."""
        while len(self.layers) <= index:
            self.layers.append(DynamicLayer())
        layer = self.layers[index]
        if layer.keys is None:
            layer.keys, layer.values = self._allocate(keys), self._allocate(values)
        return layer

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return how many slots are read, and the first of them: for a mask that a model makes by itself."""
        return (query_length if self.slots is None else self.slots.length), 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the slots before the new tokens; positions are given, so that no model counts with it."""
        return 0 if self.slots is None else self.slots.length - self.slots.num

    def _allocate(self, like: Tensor) -> Tensor:
        # Zeros: what a mask hides is still multiplied by 0, and NaN would stay. One slot more takes padding.
        with torch.inference_mode(mode=False):  # it may outlive the mode of this call, and is written to then
            return like.new_zeros(self.num_blocks * self.num_rows, like.shape[-3], self.room + 1, like.shape[-1])

    def _by_block(self, states: Tensor) -> Tensor:
        """The same of shape (blocks, rows, heads, slots, width)."""
        return states.view(self.num_blocks, -1, *states.shape[1:])

    def _advance(self, buffer: Tensor, new: Tensor) -> Tensor:
        at = self.slots
        assert at is not None
        rows = buffer
        if at.num_rows < self.num_rows:
            rows = self._by_block(buffer)[:, at.first_row : at.first_row + at.num_rows]
            rows = rows[0] if self.num_blocks == 1 else rows
        if at.start is not None:
            here = rows.narrow(-2, at.start, at.num)
            here.copy_(new.view(here.shape))
        else:
            assert at.index is not None
            index, slots = (one.to(buffer.device) for one in at.index)  # of a member on several devices
            by_slot = (1, 3, 0, 2, 4)  # (rows, slots, blocks, heads, width)
            self._by_block(buffer).permute(by_slot)[index, slots] = self._by_block(new).permute(by_slot)
        seen = rows.narrow(-2, 0, at.length)
        return seen if seen.dim() == 4 else seen.flatten(0, 1)

    def copy_rows(self, sources: Sequence[int], targets: Sequence[int], other: ModelRowCache, length: int) -> None:
        """Copy the first `length` slots of rows."""
        for index, theirs in enumerate(other.layers):
            mine = self._layer(index, theirs.keys, theirs.values)
            for target, source in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                copied = other._by_block(source)[:, list(sources), :, :length]
                self._by_block(target)[:, list(targets), :, :length] = copied

    def forget_behind(self, lengths: Sequence[int]) -> None:
        """Zero all slots behind the rows' lengths."""
        for layer in self.layers:
            for states in (layer.keys, layer.values):
                for row, length in enumerate(lengths) if states is not None else ():
                    self._by_block(states)[:, row, :, length:] = 0
