"""Score with one group of members in memory at a time; their needed logits wait on disk.

Forwards and sums are those of members that are loaded together, so the numbers are the same bit for bit. A trio that is
larger than the machine is scored in the memory of its largest member.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence

import torch

from ensembler.engine.devices import check_devices
from ensembler.engine.forward import check_nan
from ensembler.engine.grid import Grid, GridPoint
from ensembler.engine.member_set import MemberSet
from ensembler.engine.members import MemberFiles, group_members, load_members
from ensembler.errors import ConfigError
from ensembler.evaluation.backends import Advance, ignore
from ensembler.evaluation.batches import Batch, Logits, Pass, run_passes
from ensembler.evaluation.logits_folder import LogitsFolder
from ensembler.evaluation.scoring import ScoredRequest, score_batch
from ensembler.planning.measuring import member_dtype
from ensembler.preflight import CheckedEnsemble


class OfflineScorer:
    """Loads one group of members after the other; `folder` is where their logits wait, and is removed at the end.

    `num_rounds`: how often `score` goes over the requests, once for each group and once to combine. Nothing is loaded
    or written before `score`. Raises ConfigError for members that are loaded already.
    """

    def __init__(self, checked: CheckedEnsemble, folder: LogitsFolder) -> None:
        if checked.loaded:
            role = next(iter(checked.loaded))
            raise ConfigError(f"{role} is loaded already; members one at a time are given by path")
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
        grid = Grid.of(points, rule, self._checked.contract, config.outside).on(device)
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
