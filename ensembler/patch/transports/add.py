"""Plain addition: θ′ + Δθ_i (PortLLM, arXiv 2410.10870, eq. 6). Needs nothing and costs nothing."""

from __future__ import annotations

from typing import Self

from ensembler.patch.addition import WeightUpdate
from ensembler.patch.patch_plan import PatchPlan
from ensembler.patch.transports.transport import Progress, Sources, Transport, silent


class Add(Transport):
    """The update as it is."""

    name = "add"

    @classmethod
    def check(cls, plan: PatchPlan, sources: Sources) -> None:
        """Any plan can be carried as it is."""

    @classmethod
    def prepare(cls, plan: PatchPlan, sources: Sources, progress: Progress = silent) -> Self:
        """Return the transport, which has no state."""
        return cls()

    def apply(self, name: str, update: WeightUpdate) -> WeightUpdate:
        """Return the update itself."""
        return update
