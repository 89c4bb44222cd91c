"""A folder of tensors on disk: one safetensors file for each part of a run, each there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor

from ensembler.errors import OutputError, RunError
from ensembler.files import write_whole

_MARK = "run"  # this file holds the run's fingerprint, and says that the folder is ours to remove


class LogitsFolder:
    """The folder at `path` of the run with the fingerprint `run`; made by `open`, removed by `remove`.

    `resume` takes up only what the same run left, `overwrite` removes what another run left. Raises OutputError.
    """

    def __init__(self, path: Path, run: str, *, resume: bool = False, overwrite: bool = False) -> None:
        self.path = path
        self._run = run
        self._replaces = path.exists() and not resume
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise OutputError(f"{path.parent} is not a folder that may be written to; choose another --output")
        if not path.exists():
            return
        found = (path / _MARK).read_text(encoding="utf-8") if (path / _MARK).is_file() else None
        if not path.is_dir() or (found is None and any(path.iterdir())):
            raise OutputError(f"{path} holds something else than logits of a run; move it, or choose another --output")
        if not (resume or overwrite):
            raise OutputError(
                f"{path} is left of an interrupted run or a finished one; add --resume to go on with it or --overwrite"
            )
        if resume and found not in (run, None):
            raise OutputError(
                f"{path} was begun with another ensemble, other data or other options (run {found}, now {run}); "
                "resume with the same ones, choose another --output or add --overwrite"
            )

    def check_space(self, sizes: Mapping[str, int]) -> int:
        """Return the bytes of all files, `sizes` by name; raise OutputError where the missing ones have no room."""
        num_bytes = sum(size for name, size in sizes.items() if not self.has(name))
        free = shutil.disk_usage(self.path.parent).free
        if free < num_bytes:
            raise OutputError(
                f"{self.path} will take {num_bytes:,} bytes and its disk has {free:,} free; make room, or choose "
                "an --output on another disk"
            )
        return sum(sizes.values())

    def open(self) -> None:
        """Make the folder, or take it up where it is."""
        if self._replaces:
            self.remove()
        self.path.mkdir(exist_ok=True)
        self.write_bytes(_MARK, self._run.encode())

    def has(self, name: str) -> bool:
        """Return whether a file is there and may be used."""
        return not self._replaces and (self.path / name).is_file()

    def read(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a file by their keys, in the dtype in which they were written."""
        return load_file(self.path / name)

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors by their keys; raise RunError as `write_bytes` does."""
        self.write_bytes(name, save({key: values.contiguous().cpu() for key, values in tensors.items()}))

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file in one rename; raise RunError where the disk does not take it."""
        try:
            write_whole(self.path / name, content)
        except OutputError as error:
            raise RunError(f"{error}, or make room or mend the disk, and go on with --resume") from error

    def remove(self) -> None:
        """Remove the folder and what is in it."""
        shutil.rmtree(self.path)
        self._replaces = False
