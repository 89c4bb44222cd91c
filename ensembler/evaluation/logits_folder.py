"""A folder of logits on disk: one safetensors file per group of members and pass, each there whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor

from ensembler.errors import OutputError, RunError

_MARK = "run"  # this file holds the run's fingerprint, and says that the folder is ours to remove


class LogitsFolder:
    """The folder at `path` of the run with the fingerprint `run`; made by `open`, removed by `remove`.

    `resume` takes up only what the same run left, `overwrite` removes what another run left. Raises OutputError.
    """

    def __init__(self, path: Path, run: str, *, resume: bool = False, overwrite: bool = False) -> None:
        self.path = path
        self._run = run
        self._replaces = False
        if not path.exists():
            return
        mark = path / _MARK
        if not path.is_dir() or (any(path.iterdir()) and not mark.is_file()):
            raise OutputError(f"{path} holds something else than logits of a run; move it, or choose another --output")
        if not (resume or overwrite):
            raise OutputError(f"{path} is left of an interrupted run; add --resume to go on with it or --overwrite")
        found = mark.read_text(encoding="utf-8") if mark.is_file() else run
        if resume and found != run:
            raise OutputError(
                f"{path} was begun with another ensemble, other data or other options (run {found}, now {run}); "
                "resume with the same ones, choose another --output or add --overwrite"
            )
        self._replaces = not resume

    def open(self) -> None:
        """Make the folder, or take it up where it is."""
        if self._replaces:
            self.remove()
        self.path.mkdir(exist_ok=True)
        self._write(_MARK, self._run.encode())

    def has(self, name: str) -> bool:
        """Whether the logits `name` are there and may be used."""
        return not self._replaces and self._file(name).is_file()

    def read(self, name: str) -> dict[str, Tensor]:
        """Return logits (num_needed, V_member) by role, in the dtype in which they were written."""
        return load_file(self._file(name))

    def write(self, name: str, logits: dict[str, Tensor]) -> None:
        """Write logits by role; raise RunError, and leave nothing half-written, where the disk does not take them."""
        self._write(self._file(name).name, save({role: values.contiguous().cpu() for role, values in logits.items()}))

    def remove(self) -> None:
        """Remove the folder and what is in it."""
        shutil.rmtree(self.path)
        self._replaces = False

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.safetensors"

    def _write(self, name: str, content: bytes) -> None:
        path, partial = self.path / name, self.path / f".{name}.partial"
        try:
            partial.write_bytes(content)
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise RunError(
                f"{path} cannot be written ({error.strerror}); make room or mend the disk, and go on with --resume"
            ) from error
