"""Score with one group of members in memory at a time; their needed logits wait on disk.

Forwards and sums are those of members that are loaded together, so the numbers are the same bit for bit. A trio that is
larger than the machine is scored in the memory of its largest member.
"""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ensembler.decoding.output_file import RunSettings
from ensembler.engine.devices import check_devices
from ensembler.engine.grid import Grid, GridPoint
from ensembler.engine.member_set import MemberSet
from ensembler.engine.members import MemberFiles, group_members, load_members
from ensembler.engine.model_runner import check_nan
from ensembler.errors import ConfigError, InputError, OutputError, RunError
from ensembler.evaluation.backends import Advance, ignore
from ensembler.evaluation.request_batches import Batch, Logits, Pass, run_passes
from ensembler.evaluation.scoring import ScoredRequest, score_batch
from ensembler.files import read_json, write_whole
from ensembler.planning.member_sizes import member_dtype
from ensembler.preflight import CheckedEnsemble

_MARK, _FORMAT = "run.json", "ensembler-logits"  # the settings of the run, by whose format the folder is known as ours
_OWN = ("index.json", "*.safetensors", ".*.partial", _MARK)  # a partial file is left by a process that was killed


class LogitsFolder:
    """The folder at `path` of the run with `settings` (JSON); made by `open`, removed by `remove`.

    A folder of the same settings is gone on with; with `overwrite` one of others is removed first. Raises OutputError,
    which names the difference.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.path = path
        self._settings = RunSettings({"format": _FORMAT, **settings})
        self._replaces = path.exists() and overwrite
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise OutputError(f"{path.parent} is not a folder that may be written to; choose another --output")
        if not path.exists():
            return
        if not path.is_dir() or not self._is_ours():
            raise OutputError(f"{path} holds something else than logits of a run; move it, or choose another --output")
        if overwrite or not (path / _MARK).exists():
            return
        if difference := self._settings.difference(path / _MARK):
            raise OutputError(
                f"{path} was begun with other settings: {difference}; choose another --output, or add --overwrite to "
                "begin again"
            )

    def _is_ours(self) -> bool:
        """Return whether the folder is empty, or has the mark and no other files than ours."""
        entries = set(self.path.iterdir())
        if not entries:
            return True
        try:
            return entries == set(self._own_files()) and read_json(self.path / _MARK)["format"] == _FORMAT
        except (InputError, KeyError):
            return False

    def _own_files(self) -> list[Path]:
        """Return our files in the folder; the mark comes last."""
        return [file for pattern in _OWN for file in self.path.glob(pattern) if file.is_file()]

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
        self._settings.write(self.path / _MARK)

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
            raise RunError(
                f"{error}, or make room or mend the disk, and go on with the same command, without --overwrite"
            ) from error

    def remove(self) -> None:
        """Remove our files, and the folder unless something else was put into it."""
        for file in self._own_files():
            file.unlink()
        with suppress(OSError):
            self.path.rmdir()
        self._replaces = False


class OfflineScorer:
    """Loads one group of members after the other; `folder` is where their logits wait, and is removed at the end.

    `num_rounds`: how often `score` goes over the requests, once for each group and once to combine. Nothing is loaded
    or written before `score`. Raises ConfigError for members that are loaded already.
    """

    def __init__(self, checked: CheckedEnsemble, folder: LogitsFolder) -> None:
        if checked.loaded:
            role = next(iter(checked.loaded))
            raise ConfigError(f"{role} is loaded already; members one at a time are given by path")
        if checked.contract.is_text:
            raise ConfigError(
                "the members have different tokenizers, and are asked together; leave out --offline-members"
            )
        check_devices(checked.files.values())
        self._checked = checked
        self._folder = folder
        self._groups = group_members(checked.files)
        self.num_rounds = len(self._groups) + 1

    def check_space(self, batches: Sequence[Batch]) -> int:
        """Return how many bytes the folder takes when it is full; raise OutputError where its disk lacks the room."""
        widths = self._checked.contract.widths
        sizes: dict[str, int] = {}
        for group in self._groups:
            # A dtype that torch names otherwise (of fp8 files) is computed in something wider; fp32 is the safe guess.
            dtypes = {member.role: getattr(torch, member_dtype(member), torch.float32) for member in group}
            row = sum(widths[role] * dtype.itemsize for role, dtype in dtypes.items())
            sizes |= {_name(group, one): len(one.taken) * row for batch in batches for one in batch.passes}
        return self._folder.check_space(sizes)

    def score(
        self, batches: Sequence[Batch], points: Sequence[GridPoint], advance: Advance = ignore
    ) -> Iterator[list[ScoredRequest]]:
        """Yield the scores of one batch after another, once all members have run.

        Raises RunError or MemberError; what was computed until then stays in the folder for a run that goes on.
        """
        config, rule = self._checked.config, self._checked.config.get_rule()
        device = torch.device(config.members[rule.anchor].device)
        grid = Grid.of(points, rule, self._checked.contract, config.outside).to(device)
        self._folder.open()
        for group in self._groups:
            self._collect(group, batches, advance)
            gc.collect()  # a backbone and its views refer to one another
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        for batch in batches:
            scored = score_batch(batch, self._read(batch), grid)
            advance(len(batch.requests))
            yield scored
        self._folder.remove()

    @torch.inference_mode()
    def _collect(self, group: Sequence[MemberFiles], batches: Sequence[Batch], advance: Advance) -> None:
        """Load a group, run it and keep its needed logits. Its weights are let go when this function ends."""
        members = None
        for batch in batches:
            missing = [one for one in batch.passes if not self._folder.has(_name(group, one))]
            if missing:
                if members is None:
                    loaded = load_members({member.role: member for member in group})
                    members = MemberSet(*loaded, self._checked.contract)
                # What is missing may go on from the cache of a pass that is there.
                passes = [one for one in batch.passes if one in missing or one.is_forked]
                for one, logits in run_passes(passes, members):
                    check_nan(logits)  # before it waits on the disk for the other members
                    self._folder.write(_name(group, one), logits)
            advance(len(batch.requests))

    def _read(self, batch: Batch) -> Iterator[tuple[Pass, Logits]]:
        for one in batch.passes:
            parts = [self._folder.read(_name(group, one)) for group in self._groups]
            yield one, {role: values for part in parts for role, values in part.items()}


def _name(group: Sequence[MemberFiles], one: Pass) -> str:
    return f"{'+'.join(member.role for member in group)}.{one.number:06d}.safetensors"
