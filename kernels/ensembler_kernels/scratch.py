"""Memory for partial results of the GPU kernels, allocated once and reused."""

from __future__ import annotations

import torch
from torch import Tensor

_FOR_GRAPHS = 1 << 18  # counters
_MOST_KEPT = 1 << 24  # fp32 numbers, 64 MB: partial results of a large scoring call are not kept


class Scratch:
    """Partial results and counters, one set per device and stream, on which calls follow one another.

    Counters are 0 between calls: the last program of an output sets its own back. A call that is captured in a CUDA
    graph gets memory of the graph's own, and counters that no other call has: cut from some that were set to 0 by the
    first call that was not captured, so that a replay need not do it.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}
        self._for_graphs: dict[torch.device, Tensor] = {}

    def take(self, device: torch.device, floats: int, counters: int) -> tuple[Tensor, Tensor]:
        """Return fp32 memory of at least this size, and at least so many int32 counters that are 0."""
        stream = 0
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return torch.empty(floats, device=device), self._cut(device, counters)
            stream = torch.cuda.current_stream(device).cuda_stream
        if floats > _MOST_KEPT:
            return _allocate(device, floats, counters)
        kept = self._kept.get((device, stream))
        if kept is None or kept[0].shape[0] < floats or kept[1].shape[0] < counters:
            if kept is not None:
                floats, counters = max(kept[0].shape[0], floats), max(kept[1].shape[0], counters)
            kept = self._kept[device, stream] = _allocate(device, floats, counters)
            if device.type == "cuda" and device not in self._for_graphs:
                self._for_graphs[device] = torch.zeros(_FOR_GRAPHS, dtype=torch.int32, device=device)
        return kept

    def _cut(self, device: torch.device, counters: int) -> Tensor:
        left = self._for_graphs.get(device)
        if left is None or left.shape[0] < counters:  # set to 0 at every replay
            return torch.zeros(counters, dtype=torch.int32, device=device)
        self._for_graphs[device] = left[-(-counters // 4) * 4 :]  # aligned to 16 bytes, for which Triton has compiled
        return left[:counters]


def _allocate(device: torch.device, floats: int, counters: int) -> tuple[Tensor, Tensor]:
    return torch.empty(floats, device=device), torch.zeros(counters, dtype=torch.int32, device=device)
