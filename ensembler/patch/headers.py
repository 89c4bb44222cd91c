"""Find each tensor of a model or a patch on disk by safetensors headers alone. Loads no torch."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ensembler.errors import MemberError, PatchError
from ensembler.weights import WEIGHTS_INDEX, check_folder, safetensors_header, weight_files

if TYPE_CHECKING:
    from torch import Tensor

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
# What arithmetic in fp32 and one rounding can serve; anything else is quantised, or would lose digits on the way.
FLOATS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_FINGERPRINT_BYTES = 4096


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a safetensors file: `start` is its first byte in the file, `dtype` the header's word for it.

    `held` is its value where it came from another kind of file.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int
    held: Tensor | None = None

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns): the first axis by all others, as it lies on disk; a single number is 1 by 1."""
        rows = self.shape[0] if self.shape else 1
        return rows, self.num_elements // rows if rows else 0


def stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file in the order of their bytes; raise MemberError if it is damaged."""
    header = safetensors_header(file)
    start = header_end(file)
    tensors = []
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        tensor = StoredTensor(name, file, entry["dtype"], tuple(entry["shape"]), start + first, last - first)
        item_bytes = ITEM_BYTES.get(tensor.dtype)
        if item_bytes is not None and tensor.num_elements * item_bytes != tensor.num_bytes:
            raise MemberError(
                f"{file}: {name} is {tensor.dtype} of shape {tensor.shape} and has {tensor.num_bytes:,} bytes; "
                "the header is damaged, fetch the file again"
            )
        tensors.append(tensor)
    return {tensor.name: tensor for tensor in sorted(tensors, key=lambda tensor: tensor.start)}


def header_end(file: Path) -> int:
    """The first byte behind the header of a whole safetensors file."""
    with file.open("rb") as opened:
        return 8 + int(struct.unpack("<Q", opened.read(8))[0])


def model_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return all tensors of a model folder, single or sharded; raise MemberError where files are not whole."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise MemberError(f"{folder} is an adapter, not a model; add it to its base first: ensembler patch apply")
    check_folder("model", folder)
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        if file.parent != folder:
            raise MemberError(f"{folder / WEIGHTS_INDEX} names {file}, which is not beside it; move the shards there")
        for name, tensor in stored_tensors(file).items():
            if name in tensors:
                raise MemberError(f"{folder}: {name} is in {tensors[name].file.name} and in {file.name}; keep one")
            tensors[name] = tensor
    index = folder / WEIGHTS_INDEX
    if index.is_file():
        absent = [name for name in json.loads(index.read_text("utf-8"))["weight_map"] if name not in tensors]
        if absent:
            raise MemberError(f"{index} names {listed(absent)}, which no shard holds; fetch the model again")
    return tensors


def fingerprint(tensors: Iterable[StoredTensor]) -> str:
    """Return a SHA-256 over name, dtype, shape and the first 4 KiB of every tensor, in the order of names.

    It tells two versions of a model apart in milliseconds, whatever their size and their shards; it is no proof that
    every byte is equal.
    """
    digest = hashlib.sha256()
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        digest.update(f"{tensor.name} {tensor.dtype} {tensor.shape}\n".encode())
        with tensor.file.open("rb", buffering=0) as file:
            file.seek(tensor.start)
            digest.update(file.read(min(tensor.num_bytes, _FINGERPRINT_BYTES)))
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, object]:
    """Return the object in a JSON file; raise PatchError where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PatchError(f"{path} cannot be read ({' '.join(str(error).split())}); fetch it again") from error
    if not isinstance(content, dict):
        raise PatchError(f"{path} holds no JSON object; fetch it again")
    return content


def listed(names: Iterable[str]) -> str:
    """The first five names, and how many more there are."""
    every = list(names)
    rest = f" and {len(every) - 5:,} more" if len(every) > 5 else ""
    return ", ".join(every[:5]) + rest
