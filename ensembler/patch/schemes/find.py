"""Find the quantised weights of a model in its configuration and the headers of its files, and the scheme of each."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from ensembler.errors import EnsemblerError, MemberError
from ensembler.files import one_line
from ensembler.patch.addition import read_tensor
from ensembler.patch.schemes import bitsandbytes4, fp8, int4, mxfp4
from ensembler.patch.schemes.quantization_settings import METHOD, is_scale, quantization_of, said_scheme
from ensembler.patch.schemes.scheme import QuantizedWeight
from ensembler.safetensors_files import FLOATS, StoredModel, StoredTensor

_FP8 = "F8_E4M3"
_FP8_SCALES = (*FLOATS.values(), "F8_E8M0")
Found = Iterator[QuantizedWeight]


def find_quantized(model: StoredModel) -> dict[str, QuantizedWeight]:
    """Return the weights that stand as several tensors on disk, by the name that they have when loaded.

    Weights in a scheme that is not known are left out. Raises MemberError where the tensors of a weight do not fit
    each other, or where the settings are damaged.
    """
    settings = quantization_of(model)
    search = _SEARCHES.get(str(settings.get(METHOD)))
    try:
        return {} if search is None else {weight.name: weight for weight in search(model, settings)}
    except EnsemblerError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # sizes that are no sizes
        raise MemberError(
            f"{model.folder}: the settings of its quantisation are damaged ({said_scheme(model)}: {one_line(error)}); "
            "fetch the model again"
        ) from error


def _fp8(model: StoredModel, settings: Mapping[str, Any]) -> Found:
    """FP8 codes beside scales that are called weight_scale_inv, weight_scale, or as experts in one: NAME_scale_inv."""
    blocks = settings.get("weight_block_size") or _of_weights(settings, "block_structure")
    is_power = settings.get("scale_fmt") == "ue8m0"
    for name, codes in model.tensors.items():
        if codes.dtype != _FP8 or len(codes.shape) < 2 or is_scale(name):  # NVFP4 has scales in e4m3
            continue
        names = (f"{name}_scale_inv", f"{name}_scale")
        scale = next((model.tensors[each] for each in names if each in model.tensors), None)
        if scale is None:
            raise _missing(model, name, names[0])
        if scale.dtype not in _FP8_SCALES:
            continue
        matrix = (math.prod(codes.shape[:-1]), codes.shape[-1])
        block = _block_of(scale, codes, matrix, blocks, model)
        parts = {fp8.WEIGHT: _as_matrix(codes), fp8.SCALE: _as_matrix(scale)}
        yield QuantizedWeight(name, codes.shape, matrix, parts, fp8.FP8(matrix, block, is_power=is_power))


def _of_weights(settings: Mapping[str, Any], key: str) -> Any:
    """Return what the groups of compressed-tensors say of weights, None where they differ."""
    groups = settings.get("config_groups") or {}
    found = [(group.get("weights") or {}).get(key) for group in groups.values() if isinstance(group, dict)]
    return found[0] if found and all(each == found[0] for each in found) else None


def _block_of(
    scale: StoredTensor, codes: StoredTensor, matrix: tuple[int, int], blocks: Any, model: StoredModel
) -> tuple[int, int]:
    """Return the block (rows, columns) that has one scale; raise MemberError where there are not so many scales."""
    if scale.num_elements == 1:
        return matrix
    rows, columns = _as_matrix(scale).matrix
    if rows == matrix[0] and columns and matrix[1] % columns == 0:
        return 1, matrix[1] // columns
    block = (int(blocks[0]), int(blocks[1])) if blocks else (codes.shape[-2], codes.shape[-1])
    stacked = math.prod(codes.shape[:-2])
    is_cut = stacked > 1 and codes.shape[-2] % block[0]  # blocks that reach from one of a stack into the next
    expected = (stacked * math.ceil(codes.shape[-2] / block[0]), math.ceil(matrix[1] / block[1]))
    if is_cut or (rows, columns) != expected:
        size = f" in blocks of {block[0]} x {block[1]}" if blocks else ""
        raise _misfit(model, scale, f"{codes.name} of shape {codes.shape}{size}")
    return block


def _compressed(model: StoredModel, settings: Mapping[str, Any]) -> Found:
    """compressed-tensors: FP8 codes, or four-bit integers packed along rows."""
    if settings.get("transform_config"):
        raise MemberError(
            f"{model.folder} has weights that are rotated (transform_config in its config.json), and patches are for "
            "those before that; give the model before quantisation"
        )
    yield from _fp8(model, settings)
    if _of_weights(settings, "num_bits") != 4:
        return
    tensors = model.tensors
    for name, codes in tensors.items():
        module = name.removesuffix(".weight_packed")
        if module == name or codes.dtype != "I32" or f"{module}.weight_g_idx" in tensors:
            continue
        for part in ("weight_scale", "weight_shape"):
            if f"{module}.{part}" not in tensors:
                raise _missing(model, name, f"{module}.{part}")
        parts = {
            int4.CODES: codes,
            int4.SCALE: tensors[f"{module}.weight_scale"],
            int4.SHAPE: tensors[f"{module}.weight_shape"],
        }
        zeros = tensors.get(f"{module}.weight_zero_point")
        if zeros is not None:
            parts[int4.ZERO] = zeros
        if parts[int4.SHAPE].shape != (2,):
            raise _misfit(model, parts[int4.SHAPE], name)
        rows, columns = (int(size) for size in read_tensor(parts[int4.SHAPE]).flatten().tolist())
        _, groups = parts[int4.SCALE].matrix
        if codes.shape != (rows, math.ceil(columns / 8)):
            raise _misfit(model, codes, f"{rows} x {columns} values")
        if parts[int4.SCALE].shape != (rows, groups) or not groups or columns % groups:
            raise _misfit(model, parts[int4.SCALE], f"{rows} x {columns} values")
        if zeros is not None and zeros.shape != (math.ceil(rows / 8), groups):
            raise _misfit(model, zeros, f"{rows} x {columns} values in {groups} groups a row")
        scheme = int4.PackedRows(columns // groups, has_zeros=zeros is not None)
        yield QuantizedWeight(f"{module}.weight", (rows, columns), (rows, columns), parts, scheme)


def _packed(model: StoredModel, settings: Mapping[str, Any]) -> Found:
    """GPTQ and AWQ with four bits, which keep a weight as (in, out)."""
    tensors, is_gptq = model.tensors, settings.get(METHOD) == "gptq"
    if settings.get("bits", settings.get("w_bit")) != 4 or settings.get("version") not in (None, "gemm", "GEMM"):
        return
    group_size = int(settings.get("group_size", settings.get("q_group_size", 128)))
    has_order = is_gptq and bool(settings.get("desc_act"))
    is_first_format = is_gptq and settings.get("checkpoint_format", "gptq") == "gptq"
    is_symmetric = bool(settings.get("sym", True)) if is_gptq else not settings.get("zero_point", True)
    for name, codes in tensors.items():
        module = name.removesuffix(".qweight")
        if module == name or codes.dtype != "I32":
            continue
        for part in ("scales", "qzeros", *(["g_idx"] if has_order else [])):
            if f"{module}.{part}" not in tensors:
                raise _missing(model, name, f"{module}.{part}")
        parts = {int4.CODES: codes, int4.SCALE: tensors[f"{module}.scales"], int4.ZERO: tensors[f"{module}.qzeros"]}
        if f"{module}.g_idx" in tensors and is_gptq:
            parts[int4.GROUP_OF] = tensors[f"{module}.g_idx"]
        rows, columns = (codes.shape[0] * 8, codes.shape[1]) if is_gptq else (codes.shape[0], codes.shape[1] * 8)
        size = rows if group_size == -1 else group_size
        values = f"{rows} x {columns} values in groups of {size}"
        groups = math.ceil(rows / size)
        if rows % size or parts[int4.SCALE].shape != (groups, columns):
            raise _misfit(model, parts[int4.SCALE], values)
        if parts[int4.ZERO].shape != (groups, math.ceil(columns / 8)):
            raise _misfit(model, parts[int4.ZERO], values)
        if int4.GROUP_OF in parts and parts[int4.GROUP_OF].shape != (rows,):
            raise _misfit(model, parts[int4.GROUP_OF], values)
        if has_order:
            low, high = read_tensor(parts[int4.GROUP_OF]).aminmax()
            if low < 0 or high >= groups:
                raise MemberError(
                    f"{model.folder}: {module}.g_idx names groups {low} to {high}, and there are {groups}; fetch the "
                    "model again"
                )
        scheme = int4.PackedColumns(
            size,
            packs_rows=is_gptq,
            zero_offset=1 if is_first_format else 0,
            is_symmetric=is_symmetric,
            has_order=has_order,
        )
        yield QuantizedWeight(f"{module}.weight", (columns, rows), (rows, columns), parts, scheme)


def _four_bit(model: StoredModel, settings: Mapping[str, Any]) -> Found:
    """bitsandbytes' four bits; its eight bits are not known here."""
    tensors = model.tensors
    for name, codes in tensors.items():
        states = [f"{name}.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")]
        state = next((tensors[each] for each in states if each in tensors), None)
        if state is None:
            continue
        if codes.dtype != "U8":
            raise MemberError(
                f"{model.folder} keeps the codes of {name} as {codes.dtype} (bnb_4bit_quant_storage); expected U8: "
                "save it with uint8, or give the model before quantisation"
            )
        try:
            said = json.loads(bytes(read_tensor(state).flatten().tolist()))
            rows, columns = (int(size) for size in said["shape"])
            block, second = int(said["blocksize"]), said.get("nested_blocksize")
            offset, kind = float(said.get("nested_offset") or 0), str(said["quant_type"])
        except (ValueError, KeyError, TypeError) as error:
            raise MemberError(f"{model.folder}: {state.name} is damaged; fetch the model again") from error
        names = {bitsandbytes4.MAGNITUDE: "absmax", bitsandbytes4.TABLE: "quant_map"}
        if second is not None:
            names |= {bitsandbytes4.SECOND_MAGNITUDE: "nested_absmax", bitsandbytes4.SECOND_TABLE: "nested_quant_map"}
        parts = {bitsandbytes4.CODES: codes, bitsandbytes4.STATE: state}
        for part, ending in names.items():
            if f"{name}.{ending}" not in tensors:
                raise _missing(model, name, f"{name}.{ending}")
            parts[part] = tensors[f"{name}.{ending}"]
        num_blocks = math.ceil(rows * columns / block)
        expected = {bitsandbytes4.CODES: math.ceil(rows * columns / 2), bitsandbytes4.MAGNITUDE: num_blocks}
        expected |= {bitsandbytes4.TABLE: 16}
        if second is not None:
            expected |= {bitsandbytes4.SECOND_MAGNITUDE: math.ceil(num_blocks / second)}
            expected |= {bitsandbytes4.SECOND_TABLE: 256}
        for part, num in expected.items():
            if parts[part].num_elements != num:
                raise _misfit(model, parts[part], f"{rows} x {columns} values in blocks of {block}")
        scheme = bitsandbytes4.FourBit(columns, block, second, offset, kind)
        yield QuantizedWeight(name, (rows, columns), (rows, columns), parts, scheme)


def _mxfp4(model: StoredModel, settings: Mapping[str, Any]) -> Found:
    """MXFP4 experts (experts, out, in / 32, 16), which are (experts, in, out) when loaded."""
    for name, blocks in model.tensors.items():
        stem = name.removesuffix("_blocks")
        if stem == name or blocks.dtype != "U8":
            continue
        scales = model.tensors.get(f"{stem}_scales")
        if scales is None:
            raise _missing(model, name, f"{stem}_scales")
        if blocks.shape != (*scales.shape, mxfp4.BLOCK // 2):
            raise _misfit(model, scales, f"{name} of shape {blocks.shape}")
        *stack, out, groups = scales.shape
        matrix = (math.prod(stack) * out, groups * mxfp4.BLOCK)
        parts = {
            mxfp4.BLOCKS: replace(blocks, shape=(matrix[0], matrix[1] // 2)),
            mxfp4.SCALES: replace(scales, shape=(matrix[0], groups)),
        }
        yield QuantizedWeight(stem, (*stack, matrix[1], out), matrix, parts, mxfp4.MXFP4())


_SEARCHES: dict[str, Callable[[StoredModel, Mapping[str, Any]], Found]] = {
    "fp8": _fp8,
    "compressed-tensors": _compressed,
    "gptq": _packed,
    "awq": _packed,
    "bitsandbytes": _four_bit,
    "mxfp4": _mxfp4,
}


def _missing(model: StoredModel, name: str, part: str) -> MemberError:
    return MemberError(f"{model.folder}: {name} is quantised and there is no {part}; fetch the model again")


def _misfit(model: StoredModel, part: StoredTensor, values: str) -> MemberError:
    return MemberError(
        f"{model.folder}: {part.name} has shape {part.shape}, which does not fit {values}; fetch the model again, or "
        "give it before quantisation"
    )


def _as_matrix(tensor: StoredTensor) -> StoredTensor:
    """Return a tensor with all axes but the last as one, as its rows lie in the file."""
    return tensor if len(tensor.shape) < 3 else replace(tensor, shape=(math.prod(tensor.shape[:-1]), tensor.shape[-1]))
