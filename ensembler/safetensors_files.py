"""Safetensors files by their headers: which files a model or a patch has, whether they are whole, their tensors.

Reads no weights and loads no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensembler.errors import MemberError
from ensembler.files import model_name, naming, read_json, reading

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
PICKLE_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
ITEM_BYTES |= {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
# What arithmetic in fp32 and one rounding can serve; anything else is quantised, or would lose digits on the way.
FLOATS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_FINGERPRINT_BYTES = 4096


def header_bytes(path: Path) -> bytes:
    """Return the first bytes of a safetensors file up to its tensors; raise MemberError where they are cut off."""
    with reading(path), path.open("rb") as file:
        size = path.stat().st_size
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise MemberError(f"{path} is not a whole safetensors file ({size:,} bytes); fetch it again")
        return start + file.read(length)


def _main_file(folder: Path) -> Path | None:
    """Return the file that says which weights are the model's: one safetensors file, or the index of several.

    In the order of transformers: the one that config.json names (transformers_weights), the single file, the index;
    an index beside a single file is not read. None where there is neither.
    """
    named = _named_file(folder)
    names = (WEIGHTS, WEIGHTS_INDEX) if named is None else (named,)
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _named_file(folder: Path) -> str | None:
    """Return the weights file that config.json names (transformers_weights), or None."""
    config = folder / "config.json"
    named = read_json(config).get("transformers_weights") if config.is_file() else None
    return None if named is None else str(named)


def index_file(folder: Path) -> Path | None:
    """Return the index of a sharded model; None for a model of one file."""
    main = _main_file(folder)
    return main if main is not None and main.suffix == ".json" else None


def _weight_map(folder: Path) -> dict[str, str]:
    """Return the file of each tensor as a sharded model's index says it; empty for a model of one file."""
    index = index_file(folder)
    if index is None:
        return {}
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict):
        raise MemberError(f"{index} is no index of weights; fetch it again")
    return names


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder, shards in the order of the index; empty where there are none."""
    main = _main_file(folder)
    if main is None or main.suffix != ".json":
        return [] if main is None else [main]
    return [folder / name for name in dict.fromkeys(_weight_map(folder).values())]


def check_folder(role: str, folder: Path) -> None:
    """Raise MemberError unless `folder` holds a model whose safetensors files are whole."""
    with naming(role):
        if not folder.is_dir():
            raise MemberError(f"there is no folder {folder}; give a model folder or a hub id")
        if not (folder / "config.json").is_file():
            gguf = "; GGUF files are not read, give the model's safetensors" if any(folder.glob("*.gguf")) else ""
            raise MemberError(f"{folder} has no config.json, so it is not a model folder{gguf}")
        files = weight_files(folder)
        named = _named_file(folder)
        if not files and named is not None:
            raise MemberError(
                f"{folder / 'config.json'} names {named} as its weights (transformers_weights), which is not there; "
                "fetch it, or take the entry out"
            )
        if not files:
            pickles = [name for name in PICKLE_WEIGHTS if (folder / name).exists()]
            if pickles:
                raise MemberError(f"{folder / pickles[0]} is a pickle file; convert the weights to safetensors")
            raise MemberError(f"{folder} holds no {WEIGHTS}; expected safetensors weights")
        for file in files:
            if not file.is_file():
                raise MemberError(f"{file} is named by {index_file(folder)} and is not there; fetch it again")
            stored_tensors(file)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a safetensors file: `start` is its first byte in the file, `dtype` the header's word for it.

    `values` are there where it came from another kind of file.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int
    values: Tensor | None = None

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns): all axes but the last by that, as it lies on disk; of one axis, rows of one value each."""
        rows = math.prod(self.shape[:-1] if len(self.shape) > 1 else self.shape)
        return rows, self.num_elements // rows if rows else 0

    def is_zero(self) -> bool:
        """Return whether every value is 0, from the bytes up to the first that is not."""
        if self.values is not None:
            return not self.values.any()
        return not any(chunk.strip(b"\0") for chunk in self._chunks())

    def has_values_of(self, other: StoredTensor) -> bool:
        """Return whether both files hold the same bytes for the two, of one dtype and shape; reads up to the first
        difference.
        """
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        return all(mine == theirs for mine, theirs in zip(self._chunks(), other._chunks(), strict=True))

    def _chunks(self) -> Iterator[bytes]:
        with reading(self.file), self.file.open("rb") as file:
            file.seek(self.start)
            for start in range(0, self.num_bytes, 2**20):
                yield file.read(min(2**20, self.num_bytes - start))


def stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file in the order of their bytes; raise MemberError if it is not whole.

    A truncated download is found from the first bytes and the size, before minutes of loading.
    """
    header = header_bytes(file)
    tensors = []
    try:
        for name, entry in json.loads(header[8:]).items():
            if name != "__metadata__":
                first, last = (len(header) + offset for offset in entry["data_offsets"])
                tensors.append(StoredTensor(name, file, entry["dtype"], tuple(entry["shape"]), first, last - first))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise MemberError(f"{file} has no safetensors header; fetch it again or convert it") from error
    size = file.stat().st_size
    expected = max([len(header), *(tensor.start + tensor.num_bytes for tensor in tensors)])
    if expected != size:
        cut = [tensor.name for tensor in tensors if tensor.start + tensor.num_bytes > size]
        where = f", so {cut[0]} is cut off" if cut else ""
        raise MemberError(f"{file} has {size:,} bytes; its header says {expected:,}{where}; fetch it again")
    for tensor in tensors:
        item_bytes = ITEM_BYTES.get(tensor.dtype)
        if item_bytes is not None and tensor.num_elements * item_bytes != tensor.num_bytes:
            raise MemberError(
                f"{file}: {tensor.name} is {tensor.dtype} of shape {tensor.shape} and has {tensor.num_bytes:,} bytes; "
                "the header is damaged, fetch the file again"
            )
    return {tensor.name: tensor for tensor in sorted(tensors, key=lambda tensor: tensor.start)}


@dataclass(frozen=True)
class StoredModel:
    """A model on disk: its folder and its tensors by name, of one file or of all shards."""

    folder: Path
    tensors: Mapping[str, StoredTensor]

    @cached_property
    def config(self) -> dict[str, Any]:
        """Return the content of config.json; raise MemberError where it cannot be read."""
        return read_json(self.folder / "config.json")

    @property
    def name(self) -> str:
        """The id on the hub, or the name of the folder."""
        return model_name(self.folder)

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def fingerprint(self) -> str:
        """Return the `fingerprint` of all tensors."""
        return fingerprint(self.tensors.values())


def read_model(folder: Path) -> StoredModel:
    """Return a model's tensors from the headers of its files; raise MemberError where files are not whole."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise MemberError(f"{folder} is an adapter, not a model; add it to its base first: ensembler patch apply")
    check_folder("model", folder)
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        if file.parent != folder:
            raise MemberError(f"{index_file(folder)} names {file}, which is not beside it; move the shards there")
        for name, tensor in stored_tensors(file).items():
            if name in tensors:
                raise MemberError(f"{folder}: {name} is in {tensors[name].file.name} and in {file.name}; keep one")
            tensors[name] = tensor
    absent = [name for name in _weight_map(folder) if name not in tensors]
    if absent:
        raise MemberError(f"{index_file(folder)} names {listed(absent)}, which no shard holds; fetch the model again")
    return StoredModel(folder, tensors)


def fingerprint(tensors: Iterable[StoredTensor]) -> str:
    """Return a SHA-256 over name, dtype, shape and the first 4 KiB of every tensor, in the order of names.

    It tells two versions of a model apart in milliseconds, whatever their size and their shards; it is no proof that
    every byte is equal.
    """
    state = hashlib.sha256()
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        state.update(f"{tensor.name} {tensor.dtype} {tensor.shape}\n".encode())
        with reading(tensor.file), tensor.file.open("rb", buffering=0) as file:
            file.seek(tensor.start)
            state.update(file.read(min(tensor.num_bytes, _FINGERPRINT_BYTES)))
    return state.hexdigest()


def listed(names: Iterable[str]) -> str:
    """Return the first five names, and how many more there are."""
    every = list(names)
    rest = f" and {len(every) - 5:,} more" if len(every) > 5 else ""
    return ", ".join(every[:5]) + rest
