"""A model's tensors with patches added, for loaders that take them one after the other: nothing is written to disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from ensembler.patch.addition import patch_in_place, planned_update, read_tensor
from ensembler.patch.patch_plan import PatchPlan
from ensembler.patch.requantize import requantized
from ensembler.patch.schemes.scheme import QuantizedWeight
from ensembler.safetensors_files import StoredTensor

Tensors = list[tuple[str, Tensor]]
_MOST_AHEAD = 4


def load_patched(plan: PatchPlan) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the plan's model under its name on disk, quantised again where it is quantised.

    The values are those that `patch apply` writes. A few tensors are made ahead, one in each thread, so that a loader
    waits for the disk and not for sums; memory is these, and the factors of their updates. Raises PatchError,
    MemberError or RunError where a value is damaged.
    """
    waiting: deque[Future[Tensors]] = deque()
    num_threads = torch.get_num_threads()
    num_ahead = min(num_threads, _MOST_AHEAD)
    with ThreadPoolExecutor(num_ahead, initializer=partial(torch.set_num_threads, 1)) as pool:
        try:
            for job in _jobs(plan):
                waiting.append(pool.submit(job))
                if len(waiting) > num_ahead:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(num_threads)


def _jobs(plan: PatchPlan) -> Iterator[Callable[[], Tensors]]:
    changed = set(plan.names)
    again = {
        part.name: weight
        for name, weight in plan.quantized.items()
        if name in changed
        for part in weight.parts.values()
    }
    for name, stored in plan.model.tensors.items():
        weight = again.get(name)
        if weight is None:
            yield partial(_load, plan, stored, name in changed)
        elif name == next(iter(weight.parts.values())).name:  # all its parts, where the first one is
            yield partial(_load_again, plan, weight)


def _load(plan: PatchPlan, stored: StoredTensor, is_changed: bool) -> Tensors:
    tensor = read_tensor(stored).view(stored.shape)
    if is_changed:
        patch_in_place(tensor, planned_update(plan, stored.name))
    return [(stored.name, tensor)]


def _load_again(plan: PatchPlan, weight: QuantizedWeight) -> Tensors:
    found: dict[str, Tensor] = {}
    for part, start, rows in requantized(weight, planned_update(plan, weight.name)):
        if part not in found:
            found[part] = torch.empty(weight.parts[part].matrix, dtype=rows.dtype)
        found[part][start : start + len(rows)] = rows
    return [
        (stored.name, found[part].view(plan.model.tensors[stored.name].shape)) for part, stored in weight.parts.items()
    ]
