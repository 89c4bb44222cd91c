"""The update without its part along the base's own: Δ′ = Δ − (⟨Δ, D⟩ / ⟨D, D⟩) · D with D = θ′ − θ, for each tensor.

The projection is that of linear algebra; as a transport of task vectors it is named "orthogonal shift" in the benchmark
Merge-and-Rebase (Panariello et al. 2026), without a paper of its own. Needs θ and no data. The inner products are
summed in fp64 over blocks of rows, and the result is Δ with θ′ and θ as two more terms, so that memory is that of plain
addition. Costs two readings of θ and two more of θ′, for the tensors that change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from ensembler.errors import PatchError
from ensembler.patch.addition import WeightUpdate, read_finite
from ensembler.patch.patch_plan import PatchPlan
from ensembler.patch.transports.transport import Progress, Sources, Transport, check_plain, delta_rows, silent
from ensembler.safetensors_files import FLOATS, StoredModel, StoredTensor, listed, read_model


@dataclass(frozen=True)
class Orthogonal(Transport):
    """Leave out the part of each Δ along θ′ − θ: `new` is θ′ and `old` is θ, by the name of the tensor."""

    new: Mapping[str, StoredTensor]
    old: StoredModel

    name = "orthogonal"
    needs = ("old",)

    @classmethod
    def check(cls, plan: PatchPlan, sources: Sources) -> None:
        """Raise PatchError unless the old base has the plan's tensors in their shapes, as floats."""
        check_plain(plan, cls.name)
        folder = _folder(sources)
        old = read_model(folder)
        if folder.resolve() == plan.model.folder.resolve():
            raise PatchError(f"--from and --to are both {folder}; give the base that the patch was made for as --from")
        names = [name for name in plan.names if not any(name in patch.replaced for patch in plan.patches)]
        missing = [name for name in names if name not in old.tensors]
        if missing:
            raise PatchError(
                f"{folder} has no {listed(missing)}, which the patch changes in {plan.model.folder}; give another "
                "version of the same architecture as --from"
            )
        for name in names:
            new, before = plan.model.tensors[name], old.tensors[name]
            if new.shape != before.shape:
                raise PatchError(
                    f"{name} has shape {before.shape} in {folder} and {new.shape} in {plan.model.folder}; there is no "
                    "difference to take, give two versions of one architecture"
                )
            if before.dtype not in FLOATS.values():
                raise PatchError(f"{name} in {folder} is {before.dtype}; expected one of {', '.join(FLOATS)}")

    @classmethod
    def prepare(cls, plan: PatchPlan, sources: Sources, progress: Progress = silent) -> Self:
        """Return the transport; it reads headers alone."""
        return cls(plan.model.tensors, read_model(_folder(sources)))

    def apply(self, name: str, update: WeightUpdate) -> WeightUpdate:
        """Return Δ − c · θ′ + c · θ with c = ⟨Δ, D⟩ / ⟨D, D⟩, which is 0 where the tensor did not change."""
        if update.replacement is not None:
            return update
        share = self.share(name, update)
        if share == 0:
            return update
        terms = ((self.new[name], -share), (self.old.tensors[name], share))
        return replace(update, full=(*update.full, *terms))

    def share(self, name: str, update: WeightUpdate) -> float:
        """Return c = ⟨Δ, D⟩ / ⟨D, D⟩ of one tensor; 0 for D = 0. Raises PatchError for NaN or infinity."""
        new, old = self.new[name], self.old.tensors[name]
        inner = squared = 0.0
        for start, delta in delta_rows(update, *new.matrix):
            stop = start + delta.shape[0]
            shift = read_finite(new, start, stop).double().sub_(read_finite(old, start, stop))
            inner += float((shift * delta).sum())
            squared += float(shift.square_().sum())
        return inner / squared if squared else 0.0

    @property
    def notes(self) -> tuple[str, ...]:
        """Say what was left out, and of which base."""
        return (
            f"transport orthogonal: of each update its part along the base's own change is left out, measured from "
            f"{self.old.name}, fingerprint {self.old.fingerprint()}",
        )


def _folder(sources: Sources) -> Path:
    assert sources.old is not None  # `find_transport` has seen to it
    return sources.old
