"""Scoring with one group of members in memory at a time: their needed logits wait on disk for one another.

The forwards, and what is combined, are those of `scoring.score_together`, so the numbers are the same bit for bit. A
trio that is larger than the machine is scored in the memory of its largest member.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ensembler.engine.devices import check_devices
from ensembler.engine.ensemble_cache import EnsembleCache
from ensembler.engine.forward import Step, check_nan
from ensembler.engine.grid import Grid, GridPoint
from ensembler.engine.member_set import MemberSet
from ensembler.engine.members import MemberFiles, group_members, load_group
from ensembler.errors import ConfigError, OutputError
from ensembler.evaluation.batches import Batch
from ensembler.evaluation.logits_folder import LogitsFolder
from ensembler.evaluation.passes import Pass, run_pass
from ensembler.evaluation.scoring import ScoredRequest, score_batch, unfinished
from ensembler.inspection import summarise
from ensembler.preflight import CheckedEnsemble

MemberGroup = tuple[MemberFiles, ...]


class OfflineScoring:
    """Scores the batches of a run; `folder` is where the members' logits wait.

    `num_bytes`: what the folder will hold when it is full. Nothing is loaded or written before `run`. Raises
    ConfigError for members that are loaded already.
    """

    def __init__(
        self,
        checked: CheckedEnsemble,
        batches: Sequence[Batch],
        folder: LogitsFolder,
        *,
        done: frozenset[int] = frozenset(),
    ) -> None:
        if checked.loaded:
            raise ConfigError(
                f"{next(iter(checked.loaded))} is loaded already; members one at a time are given by path"
            )
        check_devices(checked.files.values())
        self._checked = checked
        self._batches = unfinished(batches, done)
        self._folder = folder
        self._done = done
        self._groups = group_members(checked.files)
        # A dtype that torch names otherwise (of fp8 files) is computed in something wider; fp32 is the safe guess.
        sizes = {
            member.role: torch.finfo(getattr(torch, member.dtype, torch.float32)).bits // 8
            for member in summarise(checked).members
        }
        self._row_bytes = {role: sizes[role] * width for role, width in checked.contract.widths.items()}
        self.num_bytes = sum(self._file_bytes(group, one) for group in self._groups for one in self._passes)

    @property
    def _passes(self) -> list[Pass]:
        return [one for batch in self._batches for one in batch.all_passes]

    def _file_bytes(self, group: MemberGroup, one: Pass) -> int:
        return one.num_needed * sum(self._row_bytes[member.role] for member in group)

    def check_space(self) -> None:
        """Raise OutputError where the disk has less room than the files take that are not there yet."""
        missing = [(group, one) for group in self._groups for one in self._missing(group)]
        wanted = sum(self._file_bytes(group, one) for group, one in missing)
        free = shutil.disk_usage(self._folder.path.parent).free
        if free < wanted:
            raise OutputError(
                f"{self._folder.path} will take {wanted:,} bytes and its disk has {free:,} free; make room, or choose "
                "an --output on another disk"
            )

    def run(
        self, grid: Sequence[GridPoint], *, advance: Callable[[int], None] = lambda num_requests: None
    ) -> Iterator[list[ScoredRequest]]:
        """Yield the scores of one batch after another, once all members have run; then remove the folder.

        `advance` is called with the number of requests that a group of members has finished. Raises RunError or
        MemberError; what was computed until then stays for a run that goes on.
        """
        config, contract = self._checked.config, self._checked.contract
        device = torch.device(config.members[config.get_rule().anchor].device)
        points = Grid.of(grid, config.get_rule(), contract, config.outside).on(device)
        self._folder.open()
        for group in self._groups:
            if self._missing(group):
                self._collect(group, advance)
                _free()
            else:
                advance(sum(map(self._num_wanted, self._batches)))
        for batch in self._batches:
            results = ((one, self._read(one, device)) for one in batch.all_passes)
            yield score_batch(batch, results, points, done=self._done)
        self._folder.remove()

    @property
    def num_groups(self) -> int:
        """How many times members are loaded."""
        return len(self._groups)

    def _num_wanted(self, batch: Batch) -> int:
        return sum(request.number not in self._done for request in batch.requests)

    def _missing(self, group: MemberGroup) -> list[Pass]:
        return [one for one in self._passes if not self._folder.has(_name(group, one))]

    @torch.inference_mode()
    def _collect(self, group: MemberGroup, advance: Callable[[int], None]) -> None:
        """Load a group, run it, keep its needed logits. All that holds its weights ends with this function."""
        loaded = load_group(group)
        backbones = [] if loaded.backbone is None else [loaded.backbone]
        members = MemberSet(loaded.models, backbones, self._checked.contract)

        def run(step: Step, cache: EnsembleCache | None) -> dict[str, Tensor]:
            logits = members.logits(step, cache)
            check_nan(logits)  # before it waits on the disk for the other members
            return logits

        for batch in self._batches:
            for whole in batch.passes:
                if all(self._folder.has(_name(group, one)) for one in whole.together):
                    continue  # of a pass and its tails, all are run again: what is missing goes on from its cache
                for one, logits in run_pass(whole, run, members.new_cache):
                    self._folder.write(_name(group, one), logits)
            advance(self._num_wanted(batch))

    def _read(self, one: Pass, device: torch.device) -> dict[str, Tensor]:
        parts = [self._folder.read(_name(group, one)) for group in self._groups]
        return {role: values.to(device) for part in parts for role, values in part.items()}


def _name(group: MemberGroup, one: Pass) -> str:
    return f"{'+'.join(member.role for member in group)}.{one.number:06d}"


def _free() -> None:
    """Give the weights back: a backbone and its views refer to one another, and a GPU's memory is cached."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
