"""Schemes of quantised weights against references in fp64 that look at one value after the other."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from helpers.quantized_models import BLOCK, GROUP, KINDS, SECOND_OFFSET, as_matrices, bits, quantize, quantize_mxfp4
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ensembler.patch.schemes import bitsandbytes4, fp8, int4, mxfp4
from ensembler.patch.schemes.scheme import Scheme

LARGEST = 448.0
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
AWQ_PLACE = (0, 4, 1, 5, 2, 6, 3, 7)  # of each column's code in its int32


def e4m3(code: int) -> float:
    """Return the value of eight bits: a sign, four of the exponent, three of the fraction; no infinity."""
    sign, exponent, fraction = (-1.0 if code & 128 else 1.0), code >> 3 & 15, code & 7
    if exponent == 15 and fraction == 7:
        return math.nan
    return sign * (fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7))


FP8_VALUES = np.array([e4m3(code) for code in range(256)])


def nibble(word: int, place: int) -> int:
    return (int(word) & 0xFFFFFFFF) >> 4 * place & 15


def as_arrays(parts: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Return the parts with FP8 codes as bytes, other integers as they are, and the rest in fp64."""
    found = {}
    for part, each in parts.items():
        is_codes = each.dtype == torch.float8_e4m3fn
        values = each.view(torch.uint8) if is_codes else each.float().double() if each.is_floating_point() else each
        found[part] = values.numpy()
    return found


def reference(scheme: Scheme, parts: dict[str, Tensor], rows: int, columns: int) -> np.ndarray:
    """Return the values of a weight in fp64, as it lies on disk."""
    arrays = as_arrays(parts)
    found = np.empty((rows, columns))
    for i in range(rows):
        for j in range(columns):
            found[i, j] = _value(scheme, arrays, i, j, columns)
    return found


def _value(scheme: Scheme, parts: dict[str, np.ndarray], i: int, j: int, columns: int) -> float:
    if isinstance(scheme, fp8.FP8):
        scale = parts[fp8.SCALE][i // scheme.block[0], j // scheme.block[1]]
        return float(FP8_VALUES[parts[fp8.WEIGHT][i, j]] * scale)
    if isinstance(scheme, mxfp4.MXFP4):
        byte = int(parts[mxfp4.BLOCKS][i, j // 2])
        return E2M1[byte >> 4 if j % 2 else byte & 15] * 2.0 ** (int(parts[mxfp4.SCALES][i, j // 32]) - 127)
    if isinstance(scheme, int4.PackedRows):
        zero = nibble(parts[int4.ZERO][i // 8, j // GROUP], i % 8) if int4.ZERO in parts else 8
        code = nibble(parts[int4.CODES][i, j // 8], j % 8)
        return float((code - zero) * parts[int4.SCALE][i, j // GROUP])
    if isinstance(scheme, int4.PackedColumns):
        group = int(parts[int4.GROUP_OF][i, 0]) if int4.GROUP_OF in parts else i // scheme.group_size
        place = j % 8 if scheme.packs_rows else AWQ_PLACE[j % 8]
        if scheme.packs_rows:
            code = nibble(parts[int4.CODES][i // 8, j], i % 8)
        else:
            code = nibble(parts[int4.CODES][i, j // 8], place)
        zero = nibble(parts[int4.ZERO][group, j // 8], place) + scheme.zero_offset
        return float((code - zero) * parts[int4.SCALE][group, j])
    assert isinstance(scheme, bitsandbytes4.FourBit)
    at = i * columns + j
    byte = int(parts[bitsandbytes4.CODES][at // 2, 0])
    magnitude = float(parts[bitsandbytes4.MAGNITUDE].flat[at // BLOCK])
    if scheme.second_block is not None:
        second = float(parts[bitsandbytes4.SECOND_MAGNITUDE].flat[at // BLOCK // 256])
        magnitude = float(parts[bitsandbytes4.SECOND_TABLE].flat[int(magnitude)]) * second + SECOND_OFFSET
    return float(parts[bitsandbytes4.TABLE].flat[byte & 15 if at % 2 else byte >> 4]) * magnitude


def random_weight(kind: str, rows: int, columns: int, seed: int) -> tuple[Scheme, dict[str, Tensor], Tensor]:
    """Return the scheme, the parts as matrices and the values as on disk of a random weight of a linear layer."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    weight[:, :3] *= 8  # some columns are large, as they are in trained models
    parts = as_matrices(quantize(weight, kind))
    scheme, _ = KINDS[kind].make(rows, columns)
    return scheme, parts, scheme.dequantize(parts)


def test_every_code_of_fp8() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16).view(torch.float8_e4m3fn)
    scheme, scale = fp8.FP8((16, 16), (16, 16)), torch.tensor([[0.3]])
    wanted = FP8_VALUES.reshape(16, 16) * float(scale)
    found = scheme.dequantize({fp8.WEIGHT: codes, fp8.SCALE: scale})
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-7)
    valid = codes.view(-1)[~torch.from_numpy(np.isnan(FP8_VALUES))].view(1, -1)
    found = fp8.FP8((1, 254), (1, 254)).dequantize({fp8.WEIGHT: valid, fp8.SCALE: scale})
    np.testing.assert_allclose(found.numpy()[0], FP8_VALUES[~np.isnan(FP8_VALUES)] * float(scale), rtol=1e-7)


SHAPES = st.tuples(st.integers(1, 6).map(lambda n: 8 * n), st.integers(1, 4).map(lambda n: GROUP * n))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**20))
def test_values_are_those_of_the_reference(kind: str, shape: tuple[int, int], seed: int) -> None:
    scheme, parts, values = random_weight(kind, *shape, seed)
    np.testing.assert_allclose(values.numpy(), reference(scheme, parts, *values.shape), rtol=3e-7, atol=1e-38)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**20))
def test_what_does_not_change_is_kept_bit_by_bit(kind: str, shape: tuple[int, int], seed: int) -> None:
    scheme, parts, values = random_weight(kind, *shape, seed)
    again = scheme.quantize(values.clone(), parts, float(values.abs().max()))
    for part, each in again.items():
        assert torch.equal(bits(each.to(parts[part].dtype)), bits(parts[part])), part


def groups(
    scheme: Scheme, parts: dict[str, Tensor], rows: int, columns: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the rows and columns that share a scale; for schemes whose groups are rectangles."""
    if isinstance(scheme, int4.PackedColumns):
        of_row = parts[int4.GROUP_OF].flatten().numpy() if scheme.has_order else np.arange(rows) // scheme.group_size
        for group in range(of_row.max() + 1):
            for j in range(columns):
                yield np.flatnonzero(of_row == group), np.array([j])
        return
    size = scheme.block if isinstance(scheme, fp8.FP8) else (1, GROUP)
    for i in range(0, rows, size[0]):
        for j in range(0, columns, size[1]):
            yield np.arange(i, min(i + size[0], rows)), np.arange(j, min(j + size[1], columns))


def smallest_error(
    kind: str, scheme: Scheme, parts: dict[str, np.ndarray], values: np.ndarray, at: tuple[int, int]
) -> float:
    """Return the squared error of a group in fp64 by the best code for each value, at its old scale or a new one.

    `at`: the row and the column of a value of the group.
    """
    scale, zero = _scale_and_zero(scheme, parts, *at)
    peak = np.abs(values).max()
    if isinstance(scheme, fp8.FP8):
        dtype = torch.bfloat16 if kind == "fp8-rows" else torch.float32
        new = (
            2.0 ** math.ceil(math.log2(peak / LARGEST))
            if scheme.is_power
            else float(torch.tensor(peak / LARGEST).to(dtype))
        )
        levels = [FP8_VALUES[~np.isnan(FP8_VALUES)] * (scale if peak <= scale * LARGEST else new)]
    elif isinstance(scheme, mxfp4.MXFP4):
        levels = [np.array(E2M1) * scale, np.array(E2M1) * 2.0 ** (math.frexp(peak)[1] - 3)]
    else:
        is_symmetric = kind == "int4-rows" or getattr(scheme, "is_symmetric", False)
        low, high = min(values.min(), 0.0), max(values.max(), 0.0)
        width = 2 * max(-low, high) if is_symmetric else high - low
        dtype = torch.bfloat16 if isinstance(scheme, int4.PackedRows) else torch.float16
        new = float(torch.tensor(width / 15).to(dtype))
        middle = 8 if is_symmetric else max(round(-low / (width / 15)), getattr(scheme, "zero_offset", 0))
        levels = [(np.arange(16) - zero) * scale]
        if not getattr(scheme, "has_order", False):
            levels.append((np.arange(16) - middle) * new)
    return min(float(np.square(np.abs(values[..., None] - each).min(-1)).sum()) for each in levels)


def _scale_and_zero(scheme: Scheme, parts: dict[str, np.ndarray], i: int, j: int) -> tuple[float, int]:
    if isinstance(scheme, fp8.FP8):
        return float(parts[fp8.SCALE][i // scheme.block[0], j // scheme.block[1]]), 0
    if isinstance(scheme, mxfp4.MXFP4):
        return 2.0 ** (int(parts[mxfp4.SCALES][i, j // 32]) - 127), 0
    if isinstance(scheme, int4.PackedRows):
        zero = nibble(parts[int4.ZERO][i // 8, j // GROUP], i % 8) if int4.ZERO in parts else 8
        return float(parts[int4.SCALE][i, j // GROUP]), zero
    assert isinstance(scheme, int4.PackedColumns)
    group = int(parts[int4.GROUP_OF][i, 0]) if int4.GROUP_OF in parts else i // scheme.group_size
    place = j % 8 if scheme.packs_rows else AWQ_PLACE[j % 8]
    zero = nibble(parts[int4.ZERO][group, j // 8], place) + scheme.zero_offset
    return float(parts[int4.SCALE][group, j]), zero


def check_nearest(kind: str, scheme: Scheme, parts: dict[str, Tensor], old: Tensor, delta: Tensor) -> None:
    exact = old + delta
    new = scheme.quantize(exact.clone(), parts, float(exact.abs().max()))
    found = reference(scheme, {**parts, **new}, *exact.shape)
    values, arrays = exact.double().numpy(), as_arrays(parts)
    for rows, columns in groups(scheme, parts, *exact.shape):
        group = np.ix_(rows, columns)
        best = smallest_error(kind, scheme, arrays, values[group], (rows[0], columns[0]))
        error = float(np.square(found[group] - values[group]).sum())
        assert error <= best * (1 + 1e-4) + 1e-12, (rows[0], columns[0])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("nf4")])
@settings(max_examples=6, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**20), size=st.sampled_from([0.01, 0.1, 1.0, 30.0]))
def test_new_values_are_as_near_as_the_best_codes_in_fp64(
    kind: str, shape: tuple[int, int], seed: int, size: float
) -> None:
    scheme, parts, old = random_weight(kind, *shape, seed)
    delta = torch.randn(old.shape, generator=torch.Generator().manual_seed(seed + 1)) * 0.05 * size
    check_nearest(kind, scheme, parts, old, delta)


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 9), groups=st.integers(1, 4), seed=st.integers(0, 2**20), size=st.sampled_from([0.1, 3.0]))
def test_mxfp4_against_fp64(rows: int, groups: int, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, groups * 32, rows, generator=generator) * 0.05
    blocks, scales = quantize_mxfp4(weight)
    parts = {mxfp4.BLOCKS: blocks.view(rows, -1), mxfp4.SCALES: scales.view(rows, -1)}
    scheme = mxfp4.MXFP4()
    old = scheme.dequantize(parts)
    np.testing.assert_array_equal(old.numpy(), reference(scheme, parts, *old.shape))
    again = scheme.quantize(old.clone(), parts)
    assert torch.equal(scheme.dequantize({**parts, **again}), old)
    check_nearest("mxfp4", scheme, parts, old, torch.randn(old.shape, generator=generator) * 0.05 * size)


@pytest.mark.parametrize("kind", ["nf4", "nf4-double"])
@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 2**20), size=st.sampled_from([0.1, 3.0]))
def test_four_bits_are_the_nearest_entries_of_the_table(
    kind: str, rows: int, columns: int, seed: int, size: float
) -> None:
    """A block keeps its magnitude or has a new one: in both cases each value has the nearest entry."""
    scheme, parts, old = random_weight(kind, 8 * rows, 32 * columns, seed)
    exact = old + torch.randn(old.shape, generator=torch.Generator().manual_seed(seed + 1)) * 0.05 * size
    new = {**parts, **scheme.quantize(exact.clone(), parts)}
    assert isinstance(scheme, bitsandbytes4.FourBit)
    found = reference(scheme, new, *exact.shape).reshape(-1)
    values = exact.double().numpy().reshape(-1)
    table = parts[bitsandbytes4.TABLE].flatten().double().numpy()
    magnitudes = scheme._magnitudes(as_matrices(new)).double().numpy()
    for number, magnitude in enumerate(magnitudes):
        block = slice(number * BLOCK, (number + 1) * BLOCK)
        nearest = np.abs(values[block, None] - table * magnitude).min(1)
        np.testing.assert_allclose(np.abs(found[block] - values[block]), nearest, rtol=1e-4, atol=1e-6)
    before = reference(scheme, parts, *exact.shape).reshape(-1)
    assert np.square(found - values).sum() <= np.square(before - values).sum() * (1 + 1e-6)
