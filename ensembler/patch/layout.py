"""Lay out the files of a patched model: weights with their headers, and the files beside them. No torch."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ensembler.patch.headers import FLOATS, ITEM_BYTES, StoredTensor, header_end
from ensembler.patch.plan import Plan
from ensembler.patch.settings import ADAPTER_CONFIG
from ensembler.weights import WEIGHTS_INDEX, weight_files

CARD = "README.md"
# Weights in other formats would still be those without the patch.
_WEIGHT_ENDINGS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".ot"),
    *(".tflite", ".bin.index.json"),
)


@dataclass(frozen=True)
class Place:
    """The position of one tensor: its dtype and its first byte in the new file."""

    stored: StoredTensor
    dtype: str
    start: int

    @property
    def num_bytes(self) -> int:
        if self.dtype == self.stored.dtype:
            return self.stored.num_bytes
        return self.stored.num_elements * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class FileLayout:
    """One weights file to write: its name, its whole header and the places of its tensors."""

    name: str
    header: bytes
    places: tuple[Place, ...]

    @property
    def num_bytes(self) -> int:
        return max([len(self.header), *(place.start + place.num_bytes for place in self.places)])


def plan_files(plan: Plan, dtype: str | None) -> list[FileLayout]:
    """Lay out the new weights files: as the old ones, byte for byte, unless `dtype` changes the sizes."""
    files = []
    for path in weight_files(plan.model):
        tensors = [tensor for tensor in plan.tensors.values() if tensor.file == path]
        with path.open("rb") as opened:
            header = opened.read(header_end(path))
        if dtype is None:
            places = [Place(tensor, tensor.dtype, tensor.start) for tensor in tensors]
        else:
            header, places = _recast(header, tensors, FLOATS[dtype])
        files.append(FileLayout(path.name, header, tuple(places)))
    return files


def _recast(header: bytes, tensors: Sequence[StoredTensor], dtype: str) -> tuple[bytes, list[Place]]:
    metadata = json.loads(header[8:]).get("__metadata__")
    entries: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    places, end = [], 0
    for tensor in tensors:
        place = Place(tensor, dtype if tensor.dtype in FLOATS.values() else tensor.dtype, end)
        end += place.num_bytes
        offsets = [place.start, end]
        entries[tensor.name] = {"dtype": place.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        places.append(place)
    made = make_header(entries)
    return made, [Place(place.stored, place.dtype, len(made) + place.start) for place in places]


def make_header(entries: dict[str, object], *, length: int = 0) -> bytes:
    """Return the first bytes of a safetensors file: the length, and JSON padded to 8 bytes or to `length`."""
    text = json.dumps(entries, separators=(",", ":")).encode()
    text = text.ljust(max(-(-len(text) // 8) * 8, length - 8))
    return struct.pack("<Q", len(text)) + text


def carry_files(model: Path, made: Path) -> None:
    """Copy everything of the model but its weights, its card, config.json, and an adapter's configuration.

    transformers would load a model with the latter in its folder as that adapter on the adapter's own base.
    """

    def left_out(folder: str, names: list[str]) -> set[str]:
        top = ("config.json", CARD, ADAPTER_CONFIG) if Path(folder) == model else ()
        return {name for name in names if name.startswith(".") or name.endswith(_WEIGHT_ENDINGS) or name in top}

    mode = made.stat().st_mode  # a model that may only be read is no reason for a result that cannot be finished
    shutil.copytree(model, made, ignore=left_out, dirs_exist_ok=True, copy_function=shutil.copyfile)
    made.chmod(mode)


def write_config(model: Path, made: Path, files: Sequence[FileLayout], dtype: str | None) -> None:
    """Write config.json, which makes the folder a model, so the last of all; `dtype` in it and the index's total."""
    if dtype is None:
        shutil.copyfile(model / "config.json", made / "config.json")
        return
    if (made / WEIGHTS_INDEX).is_file():
        index = json.loads((made / WEIGHTS_INDEX).read_text("utf-8"))
        total = sum(place.num_bytes for file in files for place in file.places)
        index["metadata"] = {**index.get("metadata", {}), "total_size": total}
        (made / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    config = json.loads((model / "config.json").read_text("utf-8"))
    for settings in [config, *(value for value in config.values() if isinstance(value, dict))]:
        for key in ("dtype", "torch_dtype"):
            if key in settings:
                settings[key] = dtype
    (made / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
