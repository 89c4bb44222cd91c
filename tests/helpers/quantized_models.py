"""Quantised checkpoints made from plain ones, in every scheme that patches are added to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from ensembler.patch.schemes import bitsandbytes4, fp8, int4, mxfp4
from ensembler.patch.schemes.scheme import Scheme

GROUP, BLOCK = 32, 64
SIZE = {"hidden_size": 128, "intermediate_size": 256, "initializer_range": 0.05}  # FP8 goes by blocks of 128
LAYERS = [f"model.layers.{layer}." for layer in range(2)]
CHANGED = [f"{layer}{name}" for layer in LAYERS for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")]
# bitsandbytes' nf4, the quantiles of a normal distribution (arXiv 2305.14314, appendix E).
NF4 = (-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0)
NF4 += (0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0)
SECOND_OFFSET = 0.05


@dataclass(frozen=True)
class Kind:
    """A scheme as checkpoints have it: `settings` of config.json, and what makes the scheme and empty parts.

    `names`: endings of the parts behind the module's name, `make(rows, columns)` for a linear weight (out, in).
    """

    settings: Mapping[str, Any]
    names: Mapping[str, str]
    make: Callable[[int, int], tuple[Scheme, dict[str, Tensor]]]


def _ceil(number: int, by: int) -> int:
    return -(-number // by)


def _fp8(
    block: tuple[int, int] | None,
    *,
    by_row: bool = False,
    dtype: torch.dtype = torch.float32,
    is_power: bool = False,
) -> Any:
    def make(rows: int, columns: int) -> tuple[Scheme, dict[str, Tensor]]:
        size = (1, columns) if by_row else block or (rows, columns)
        scales = torch.zeros(_ceil(rows, size[0]), _ceil(columns, size[1]), dtype=dtype)
        codes = torch.zeros(rows, columns).to(torch.float8_e4m3fn)
        return fp8.FP8((rows, columns), size, is_power=is_power), {fp8.WEIGHT: codes, fp8.SCALE: scales}

    return make


def _packed_rows(*, has_zeros: bool) -> Any:
    def make(rows: int, columns: int) -> tuple[Scheme, dict[str, Tensor]]:
        groups = columns // GROUP
        parts = {
            int4.CODES: torch.zeros(rows, _ceil(columns, 8), dtype=torch.int32),
            int4.SCALE: torch.zeros(rows, groups, dtype=torch.bfloat16),
            int4.SHAPE: torch.tensor([rows, columns]),
        }
        if has_zeros:
            parts[int4.ZERO] = torch.zeros(_ceil(rows, 8), groups, dtype=torch.int32)
        return int4.PackedRows(GROUP, has_zeros=has_zeros), parts

    return make


def _packed_columns(
    *, is_gptq: bool, is_symmetric: bool, zero_offset: int, has_order: bool = False, is_whole: bool = False
) -> Any:
    def make(rows: int, columns: int) -> tuple[Scheme, dict[str, Tensor]]:
        size = columns if is_whole else GROUP
        groups = columns // size  # the weight lies as (in, out)
        parts = {
            int4.CODES: torch.zeros(*((columns // 8, rows) if is_gptq else (columns, rows // 8)), dtype=torch.int32),
            int4.SCALE: torch.zeros(groups, rows, dtype=torch.float16),
            int4.ZERO: torch.zeros(groups, rows // 8, dtype=torch.int32),
        }
        if is_gptq:
            parts[int4.GROUP_OF] = torch.arange(columns, dtype=torch.int32) // size
        scheme = int4.PackedColumns(
            size,
            packs_rows=is_gptq,
            zero_offset=zero_offset,
            is_symmetric=is_symmetric,
            has_order=has_order,
        )
        return scheme, parts

    return make


def second_table() -> Tensor:
    """Return a table of 256 values from -1 to 1, denser around 0."""
    steps = torch.linspace(-1, 1, 256)
    return steps * steps.abs()


def _four_bit(*, has_second: bool) -> Any:
    def make(rows: int, columns: int) -> tuple[Scheme, dict[str, Tensor]]:
        num = _ceil(rows * columns, BLOCK)
        parts = {
            bitsandbytes4.CODES: torch.zeros(_ceil(rows * columns, 2), 1, dtype=torch.uint8),
            bitsandbytes4.MAGNITUDE: torch.zeros(num, dtype=torch.uint8 if has_second else torch.float32),
            bitsandbytes4.TABLE: torch.tensor(NF4),
        }
        state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": [rows, columns]}
        if has_second:
            parts[bitsandbytes4.SECOND_MAGNITUDE] = torch.zeros(_ceil(num, 256))
            parts[bitsandbytes4.SECOND_TABLE] = second_table()
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": SECOND_OFFSET}
        parts[bitsandbytes4.STATE] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8).clone()
        offset = SECOND_OFFSET if has_second else 0.0
        return bitsandbytes4.FourBit(columns, BLOCK, 256 if has_second else None, offset, "nf4"), parts

    return make


def _compressed(bits: int, kind: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": bits, "type": kind, "symmetric": True, **weights}}
    settings = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "ignore": ["lm_head"]}
    return {**settings, "config_groups": {"group_0": group}}


_BNB = {
    bitsandbytes4.CODES: ".weight",
    bitsandbytes4.MAGNITUDE: ".weight.absmax",
    bitsandbytes4.TABLE: ".weight.quant_map",
    bitsandbytes4.SECOND_MAGNITUDE: ".weight.nested_absmax",
    bitsandbytes4.SECOND_TABLE: ".weight.nested_quant_map",
    bitsandbytes4.STATE: ".weight.quant_state.bitsandbytes__nf4",
}
_PACKED = {
    int4.CODES: ".weight_packed",
    int4.SCALE: ".weight_scale",
    int4.SHAPE: ".weight_shape",
    int4.ZERO: ".weight_zero_point",
}
_COLUMNS = {int4.CODES: ".qweight", int4.SCALE: ".scales", int4.ZERO: ".qzeros", int4.GROUP_OF: ".g_idx"}
_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
_IN_4_BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}

KINDS: dict[str, Kind] = {
    "fp8-blocks": Kind(
        {**_FP8, "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]},
        {fp8.WEIGHT: ".weight", fp8.SCALE: ".weight_scale_inv"},
        _fp8((128, 128)),
    ),
    "fp8-powers": Kind(
        {**_FP8, "weight_block_size": [128, 128], "scale_fmt": "ue8m0"},
        {fp8.WEIGHT: ".weight", fp8.SCALE: ".weight_scale_inv"},
        _fp8((128, 128), is_power=True),
    ),
    "fp8-e8m0": Kind(
        {**_FP8, "weight_block_size": [64, 32], "scale_fmt": "ue8m0"},
        {fp8.WEIGHT: ".weight", fp8.SCALE: ".weight_scale_inv"},
        _fp8((64, 32), is_power=True, dtype=torch.float8_e8m0fnu),
    ),
    "fp8-rows": Kind(
        {**_compressed(8, "float", strategy="channel"), "format": "float-quantized"},
        {fp8.WEIGHT: ".weight", fp8.SCALE: ".weight_scale"},
        _fp8(None, by_row=True, dtype=torch.bfloat16),
    ),
    "fp8-whole": Kind(
        {**_compressed(8, "float", strategy="tensor"), "format": "float-quantized"},
        {fp8.WEIGHT: ".weight", fp8.SCALE: ".weight_scale"},
        _fp8(None),
    ),
    "int4-rows": Kind(
        {**_compressed(4, "int", strategy="group", group_size=GROUP), "format": "pack-quantized"},
        _PACKED,
        _packed_rows(has_zeros=False),
    ),
    "int4-rows-zeros": Kind(
        {**_compressed(4, "int", strategy="group", group_size=GROUP, symmetric=False), "format": "pack-quantized"},
        _PACKED,
        _packed_rows(has_zeros=True),
    ),
    "gptq": Kind(_GPTQ, _COLUMNS, _packed_columns(is_gptq=True, is_symmetric=True, zero_offset=1)),
    "gptq-v2-zeros": Kind(
        {**_GPTQ, "sym": False, "checkpoint_format": "gptq_v2"},
        _COLUMNS,
        _packed_columns(is_gptq=True, is_symmetric=False, zero_offset=0),
    ),
    "gptq-zeros": Kind(
        {**_GPTQ, "sym": False}, _COLUMNS, _packed_columns(is_gptq=True, is_symmetric=False, zero_offset=1)
    ),
    "gptq-whole": Kind(
        {**_GPTQ, "group_size": -1},
        _COLUMNS,
        _packed_columns(is_gptq=True, is_symmetric=True, zero_offset=1, is_whole=True),
    ),
    "gptq-order": Kind(
        {**_GPTQ, "desc_act": True},
        _COLUMNS,
        _packed_columns(is_gptq=True, is_symmetric=True, zero_offset=1, has_order=True),
    ),
    "awq": Kind(_AWQ, _COLUMNS, _packed_columns(is_gptq=False, is_symmetric=False, zero_offset=0)),
    "nf4": Kind(_IN_4_BITS, _BNB, _four_bit(has_second=False)),
    "nf4-double": Kind({**_IN_4_BITS, "bnb_4bit_use_double_quant": True}, _BNB, _four_bit(has_second=True)),
}


def quantize_folder(plain: Path, out: Path, kind: str, *, num_files: int = 1, dtype: Any = torch.bfloat16) -> Path:
    """Write a model with the weights of its linear layers, but for the head, in a scheme; return its folder.

    `num_files`: tensors by turns in so many files, so that the parts of a weight lie apart; `dtype` of the others.
    """
    shutil.copytree(plain, out)
    tensors: dict[str, Tensor] = {}
    for name, weight in load_file(plain / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj"):
            tensors[name] = weight.to(dtype)
            continue
        for part, values in quantize(weight.float(), kind).items():
            tensors[module + KINDS[kind].names[part]] = values
    save_tensors(tensors, out, num_files)
    edit_config(out, quantization_config=dict(KINDS[kind].settings), dtype=str(dtype).removeprefix("torch."))
    return out


def save_tensors(tensors: Mapping[str, Tensor], out: Path, num_files: int = 1) -> None:
    """Write the weights of a model in one file, or by turns in several with an index."""
    if num_files == 1:
        save_file(dict(tensors), out / "model.safetensors", metadata={"format": "pt"})
        return
    (out / "model.safetensors").unlink()
    files = [f"model-{number:05d}-of-{num_files:05d}.safetensors" for number in range(1, num_files + 1)]
    places = {name: files[number % num_files] for number, name in enumerate(tensors)}
    for file in files:
        inside = {name: tensor for name, tensor in tensors.items() if places[name] == file}
        save_file(inside, out / file, metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))


def edit_config(folder: Path, **changes: Any) -> None:
    """Change entries of a model's config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a model."""
    return {name: each for file in sorted(folder.glob("*.safetensors")) for name, each in load_file(file).items()}


def quantize(weight: Tensor, kind: str) -> dict[str, Tensor]:
    """Return the parts of a weight (out, in), from nothing."""
    scheme, parts = KINDS[kind].make(*weight.shape)
    if isinstance(scheme, int4.PackedColumns) and scheme.has_order:
        return _in_order(weight, parts)
    values = weight.T.contiguous() if scheme.is_transposed else weight
    new = scheme.quantize(values.clone(), as_matrices(parts), float(weight.abs().max()))
    return {part: new.get(part, each).to(each.dtype).reshape(each.shape).contiguous() for part, each in parts.items()}


def _in_order(weight: Tensor, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the parts of a weight whose inputs belong to groups by chance, as GPTQ's desc_act leaves them."""
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0))
    sorted_parts = quantize(weight[:, order], "gptq")
    codes = torch.empty(weight.shape[1], weight.shape[0], dtype=torch.int32)
    codes[order] = int4.unpack(sorted_parts[int4.CODES], 0)
    group_of = torch.empty_like(parts[int4.GROUP_OF])
    group_of[order] = sorted_parts[int4.GROUP_OF]
    return {**sorted_parts, int4.CODES: int4.pack(codes, 0), int4.GROUP_OF: group_of}


def bits(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor."""
    return tensor.reshape(-1).clone().view(torch.uint8)


def as_matrices(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return parts as schemes take them."""
    return {part: each.view(each.shape[0], -1) for part, each in parts.items()}


def parts_of(tensors: Mapping[str, Tensor], kind: str, module: str) -> tuple[Scheme, dict[str, Tensor]]:
    """Return the scheme of a quantised module among a model's tensors, and its parts as matrices."""
    names = KINDS[kind].names
    parts = {part: tensors[module + ending] for part, ending in names.items() if module + ending in tensors}
    if int4.SHAPE in parts:
        rows, columns = parts[int4.SHAPE].tolist()
    elif int4.GROUP_OF in parts:
        rows, columns = parts[int4.SCALE].shape[1], len(parts[int4.GROUP_OF])
    elif int4.ZERO in parts:
        rows, columns = parts[int4.SCALE].shape[1], len(parts[int4.CODES])
    elif bitsandbytes4.STATE in parts:
        rows, columns = json.loads(parts[bitsandbytes4.STATE].numpy().tobytes())["shape"]
    else:
        rows, columns = parts[fp8.WEIGHT].shape
    return KINDS[kind].make(rows, columns)[0], as_matrices(parts)


def values_of(tensors: Mapping[str, Tensor], kind: str, module: str) -> Tensor:
    """Return the values fp32 (out, in) of a quantised module, all of them at once."""
    scheme, parts = parts_of(tensors, kind, module)
    values = scheme.dequantize(parts)
    return values.T.contiguous() if scheme.is_transposed else values


def quantize_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return blocks (experts, out, in / 32, 16) and scales (experts, out, in / 32) of experts (experts, in, out)."""
    experts, columns, rows = weight.shape
    values = weight.transpose(1, 2).reshape(experts * rows, columns).contiguous()
    groups = columns // mxfp4.BLOCK
    empty = {
        mxfp4.BLOCKS: torch.zeros(len(values), columns // 2, dtype=torch.uint8),
        mxfp4.SCALES: torch.zeros(len(values), groups, dtype=torch.uint8),
    }
    new = mxfp4.MXFP4().quantize(values, empty)
    blocks = new[mxfp4.BLOCKS].view(experts, rows, groups, mxfp4.BLOCK // 2)
    return blocks, new[mxfp4.SCALES].view(experts, rows, groups)


def mxfp4_values(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return the values fp32 (experts, in, out) of MXFP4 experts."""
    experts, rows, groups, _ = blocks.shape
    parts = {mxfp4.BLOCKS: blocks.reshape(experts * rows, -1), mxfp4.SCALES: scales.reshape(experts * rows, groups)}
    return mxfp4.MXFP4().dequantize(parts).view(experts, rows, -1).transpose(1, 2)


Change = Callable[[dict[str, Tensor]], Any]


def without(name: str) -> Change:
    """Return a change that takes a tensor out."""
    return lambda tensors: {key: each for key, each in tensors.items() if key != name}


def flipped(name: str, place: int) -> Change:
    """Return a change that inverts one byte of a tensor."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(torch.uint8).view(-1)[place] ^= 255

    return change


def peft_deltas(plain: Path, lora: Path) -> dict[str, Tensor]:
    """Return what PEFT's merge adds to each weight, in fp64."""
    base = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float64)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    merged = PeftModel.from_pretrained(base, lora).double().merge_and_unload()
    return {name: weight - before[name] for name, weight in merged.state_dict().items()}
