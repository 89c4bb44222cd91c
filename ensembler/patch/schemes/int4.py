"""Four-bit integers in groups, as compressed-tensors, GPTQ and AWQ pack them: value = (code - zero) · scale.

A group gets the scale and zero that leave the smaller squared error: those it had, so that what does not change is
kept bit by bit, or those of its new smallest and largest value. Eight codes are in an int32, in an order of the
format's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ensembler.patch.schemes.scheme import Parts, Scheme

CODES, SCALE, ZERO, GROUP_OF, SHAPE = "codes", "scale", "zero", "group_of", "shape"
_IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the columns whose codes stand in an int32 from its lowest bits on
_LARGEST, _MIDDLE = 15, 8


def unpack(packed: Tensor, dim: int, order: Sequence[int] = _IN_ORDER) -> Tensor:
    """Return the codes 0 to 15 of int32 along `dim` (0 or 1), as int32: eight times as long there."""
    codes = torch.stack([(packed >> 4 * order.index(place)) & _LARGEST for place in range(8)], dim + 1)
    return codes.flatten(dim, dim + 1)


def pack(codes: Tensor, dim: int, order: Sequence[int] = _IN_ORDER) -> Tensor:
    """Return int32 with eight codes each along `dim`; what is missing at the end is 0."""
    short = -codes.shape[dim] % 8
    if short:
        codes = torch.nn.functional.pad(codes, (0, short) if dim == 1 else (0, 0, 0, short))
    places = _in_groups(codes.int(), dim, codes.shape[dim] // 8).unbind(dim + 1)
    packed = torch.zeros(places[0].shape, dtype=torch.int32, device=codes.device)
    for bits, place in enumerate(order):
        packed |= places[place] << 4 * bits
    return packed


def _in_groups(values: Tensor, dim: int, num: int) -> Tensor:
    """Return values with `dim` (0 or 1) cut into groups, and a dimension for these before it."""
    shape = values.shape
    return values.reshape(*shape[:dim], num, shape[dim] // num, *shape[dim + 1 :])


def _nearest(values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return the codes nearest to values."""
    codes = values / torch.where(scale == 0, 1, scale)
    return codes.round_().add_(zero).clamp_(0, _LARGEST)


def requantize(
    values: Tensor, scale: Tensor, zero: Tensor, dim: int, *, is_symmetric: bool, smallest_zero: int = 0
) -> tuple[Tensor, ...]:
    """Return codes, scales and zeros of groups along `dim` of `values` (3-d).

    `scale` in its dtype on disk and `zero` are those before, with length 1 in `dim`; a group keeps them unless new ones
    leave a smaller error. `is_symmetric`: the zero is 8.
    """
    low, high = values.amin(dim, keepdim=True).clamp_max_(0), values.amax(dim, keepdim=True).clamp_min_(0)
    if is_symmetric:
        new_scale, new_zero = torch.maximum(-low, high) * 2 / _LARGEST, torch.full_like(zero, _MIDDLE)
    else:
        new_scale = (high - low) / _LARGEST
        new_zero = (-low / torch.where(new_scale == 0, 1, new_scale)).round_()
        new_zero = new_zero.clamp_(smallest_zero, _LARGEST).to(zero.dtype)
    new_scale = new_scale.to(scale.dtype)
    codes, error = _coded(values, scale.float(), zero, dim)
    new_codes, new_error = _coded(values, new_scale.float(), new_zero, dim)
    is_better = new_error < error
    return (
        torch.where(is_better, new_codes, codes),
        torch.where(is_better, new_scale, scale),
        torch.where(is_better, new_zero, zero),
    )


def _coded(values: Tensor, scale: Tensor, zero: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the nearest codes and each group's squared error."""
    codes = _nearest(values, scale, zero)
    return codes, ((codes - zero) * scale).sub_(values).square_().sum(dim, keepdim=True)


class PackedRows(Scheme):
    """compressed-tensors' pack-quantized: codes (rows, columns / 8), scales (rows, groups), zeros (rows / 8, groups).

    Without zeros the zero is 8. Codes and zeros are packed in their order.
    """

    def __init__(self, group_size: int, *, has_zeros: bool) -> None:
        self.group_size = group_size
        self.unit = 8 if has_zeros else 1  # eight rows share the int32 of their zeros
        self.part_rows = {CODES: self.unit, SCALE: self.unit, SHAPE: 0, **({ZERO: 1} if has_zeros else {})}
        self.label = f"INT4 in groups of {group_size} (compressed-tensors)"

    def dequantize(self, parts: Parts) -> Tensor:
        scale = parts[SCALE].float().unsqueeze(2)
        codes = unpack(parts[CODES], 1)[:, : scale.shape[1] * self.group_size]
        values = _in_groups(codes, 1, scale.shape[1]) - self._zero(parts)
        return (values * scale).flatten(1)

    def quantize(self, values: Tensor, parts: Parts, largest: float | None = None) -> dict[str, Tensor]:
        scale = parts[SCALE].unsqueeze(2)
        grouped = _in_groups(values, 1, scale.shape[1])
        codes, scale, zero = requantize(grouped, scale, self._zero(parts), 2, is_symmetric=ZERO not in parts)
        found = {CODES: pack(codes.flatten(1), 1), SCALE: scale.squeeze(2)}
        return found if ZERO not in parts else {**found, ZERO: pack(zero.squeeze(2), 0)}

    def _zero(self, parts: Parts) -> Tensor:
        rows, groups = parts[SCALE].shape
        if ZERO not in parts:
            return torch.full((rows, groups, 1), _MIDDLE, dtype=torch.int32, device=parts[SCALE].device)
        return unpack(parts[ZERO], 0)[:rows].unsqueeze(2)


class PackedColumns(Scheme):
    """GPTQ and AWQ: a weight (in, out) in groups of its rows, with scales (groups, out) and zeros (groups, out / 8).

    GPTQ packs eight rows of codes into one, AWQ eight columns, in an order of its own. `zero_offset`: what is added to
    stored zeros (1 for GPTQ's first format, where readers differ over a zero of 0, so that none is made). `has_order`:
    rows belong to the groups that GROUP_OF says (GPTQ's desc_act); scales and zeros then stay, since a group's rows lie
    apart.
    """

    is_transposed = True

    def __init__(
        self, group_size: int, *, packs_rows: bool, zero_offset: int, is_symmetric: bool, has_order: bool = False
    ) -> None:
        self.group_size, self.packs_rows, self.zero_offset = group_size, packs_rows, zero_offset
        self.is_symmetric, self.has_order = is_symmetric, has_order
        self.unit = self.group_size if not has_order else 8
        of_unit = 0 if has_order else 1
        self.part_rows = {CODES: self.unit // 8 if packs_rows else self.unit, SCALE: of_unit, ZERO: of_unit}
        self.part_rows |= {GROUP_OF: self.unit} if packs_rows else {}
        self.order = _IN_ORDER if packs_rows else _AWQ_ORDER
        self.label = f"INT4 in groups of {self.group_size} ({'GPTQ' if packs_rows else 'AWQ'})"

    def dequantize(self, parts: Parts) -> Tensor:
        codes = unpack(parts[CODES], 0) if self.packs_rows else unpack(parts[CODES], 1, self.order)
        scale, zero = parts[SCALE].float(), self._zero(parts)
        if self.has_order:
            groups = parts[GROUP_OF].flatten().long()
            return (codes - zero[groups]) * scale[groups]
        grouped = _in_groups(codes, 0, scale.shape[0]) - zero.unsqueeze(1)
        return (grouped * scale.unsqueeze(1)).flatten(0, 1)

    def quantize(self, values: Tensor, parts: Parts, largest: float | None = None) -> dict[str, Tensor]:
        scale, zero = parts[SCALE], self._zero(parts)
        if self.has_order:
            groups = parts[GROUP_OF].flatten().long()
            codes = _nearest(values, scale.float()[groups], zero[groups])
            return {CODES: self._packed(codes)}
        grouped = _in_groups(values, 0, scale.shape[0])
        codes, scale, zero = requantize(
            grouped,
            scale.unsqueeze(1),
            zero.unsqueeze(1),
            1,
            is_symmetric=self.is_symmetric,
            smallest_zero=self.zero_offset,
        )
        stored = pack((zero.squeeze(1) - self.zero_offset) & _LARGEST, 1, self.order)
        return {CODES: self._packed(codes.flatten(0, 1)), SCALE: scale.squeeze(1), ZERO: stored}

    def _packed(self, codes: Tensor) -> Tensor:
        return pack(codes, 0) if self.packs_rows else pack(codes, 1, self.order)

    def _zero(self, parts: Parts) -> Tensor:
        return unpack(parts[ZERO], 1, self.order)[:, : parts[SCALE].shape[1]] + self.zero_offset
