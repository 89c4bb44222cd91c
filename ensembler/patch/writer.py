"""Write a safetensors file one tensor at a time: how many there will be, and how large, need not be known before."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from ensembler.patch.changes import DTYPES
from ensembler.patch.layout import make_header

_ENTRY_BYTES = 160  # dtype, shape and offsets of one tensor, with room to spare


class SafetensorsWriter:
    """A file that holds room for the header of all `names`, then the tensors as they are added, and is headed last.

    A file that got no tensors is removed when the writer closes.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        self._path = path
        self._words = {dtype: word for word, dtype in DTYPES.items()}
        self._header_bytes = 64 + sum(len(json.dumps(name)) + _ENTRY_BYTES for name in names)
        self._header_bytes += -self._header_bytes % 8
        self._entries: dict[str, Any] = {}
        self._end = 0
        self._file = path.open("wb")
        self._file.seek(self._header_bytes)

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a float tensor."""
        flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))  # of stride 1
        values: Any = flat.view(torch.uint8).numpy()
        self._file.write(values)
        offsets = [self._end, self._end + tensor.nbytes]
        self._entries[name] = {"dtype": self._words[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        self._end = offsets[1]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._entries:
            self._file.seek(0)
            entries = {"__metadata__": {"format": "pt"}, **self._entries}
            self._file.write(make_header(entries, length=self._header_bytes))
        self._file.close()
        if not self._entries:
            self._path.unlink()
