"""Safetensors files by their headers: which files a model has and whether they are whole. Reads no weights."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ensembler.errors import MemberError

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
PICKLE_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def safetensors_header(path: Path) -> dict[str, Any]:
    """Return the header of a safetensors file; raise MemberError where the file is not whole.

    A truncated download is found from the first bytes and the size, before minutes of loading.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise MemberError(f"{path} is not a whole safetensors file ({size:,} bytes); fetch it again")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            expected = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise MemberError(f"{path} has no safetensors header; fetch it again or convert it") from error
    if expected != size:
        cut = [name for name, tensor in header.items() if 8 + length + tensor["data_offsets"][1] > size]
        where = f", so {cut[0]} is cut off" if cut else ""
        raise MemberError(f"{path} has {size:,} bytes; its header says {expected:,}{where}; fetch it again")
    return header


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, shards in the order of the index; empty where there are none."""
    index = folder / WEIGHTS_INDEX
    if index.is_file():
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise MemberError(f"{index} is no index of weights; fetch it again") from error
        return [folder / name for name in dict.fromkeys(names)]
    return [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else []


@contextmanager
def naming(role: str) -> Iterator[None]:
    """Put the member's role in front of the message of a MemberError."""
    try:
        yield
    except MemberError as error:
        raise MemberError(f"{role}: {error}") from error


def check_folder(role: str, folder: Path) -> None:
    """Raise MemberError unless `folder` holds a model whose safetensors files are whole."""
    if not folder.is_dir():
        raise MemberError(f"{role}: there is no folder {folder}; give a model folder or a hub id")
    if not (folder / "config.json").is_file():
        gguf = "; GGUF files are not read, give the model's safetensors" if any(folder.glob("*.gguf")) else ""
        raise MemberError(f"{role}: {folder} has no config.json, so it is not a model folder{gguf}")
    with naming(role):
        files = weight_files(folder)
    if not files:
        pickles = [name for name in PICKLE_WEIGHTS if (folder / name).exists()]
        if pickles:
            raise MemberError(f"{role}: {folder / pickles[0]} is a pickle file; convert the weights to safetensors")
        raise MemberError(f"{role}: {folder} holds no {WEIGHTS}; expected safetensors weights")
    for file in files:
        if not file.is_file():
            raise MemberError(f"{role}: {file} is named by {WEIGHTS_INDEX} and is not there; fetch it again")
        with naming(role):
            safetensors_header(file)
