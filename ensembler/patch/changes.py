"""The arithmetic of a patch: W + Σ scale · Δ for some rows of one weight, in fp32, with one rounding at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import FileIO

import torch
from torch import Tensor

from ensembler.errors import PatchError, RunError
from ensembler.patch.formats import LowRank, Patch
from ensembler.patch.headers import FLOATS, StoredTensor

DTYPES = {word: getattr(torch, name) for name, word in FLOATS.items()}
BLOCK_ELEMENTS = 128 * 1024  # half a megabyte in fp32: a block and its factors stay in a core's own cache


def read_tensor(stored: StoredTensor, start: int = 0, stop: int | None = None) -> Tensor:
    """Return rows [start, stop) of a stored tensor as a matrix (rows, columns), in the dtype of the file.

    By plain reads and not by a memory map, whose pages would count as this process's memory.
    """
    rows, columns = stored.matrix
    stop = rows if stop is None else stop
    if stored.held is not None:
        return stored.held.reshape(rows, columns)[start:stop]
    if rows * columns == 0:
        return torch.empty(stop - start, columns, dtype=DTYPES[stored.dtype])
    row_bytes = stored.num_bytes // rows
    buffer = bytearray((stop - start) * row_bytes)
    with stored.file.open("rb", buffering=0) as file:
        file.seek(stored.start + start * row_bytes)
        fill(memoryview(buffer), file, stored)
    return torch.frombuffer(buffer, dtype=DTYPES[stored.dtype]).view(stop - start, columns)


def fill(buffer: memoryview, file: FileIO, stored: StoredTensor) -> None:
    """Read bytes of a tensor until the buffer is full: one read gives 2 GiB at most.

    Raises RunError where the file ends before.
    """
    while buffer:
        num_bytes = file.readinto(buffer)
        if not num_bytes:
            raise RunError(f"{stored.file}: {stored.name} ended early; the file changed while it was read, try again")
        buffer = buffer[num_bytes:]


@dataclass(frozen=True)
class Change:
    """The change of one weight (rows, columns): left @ right, in fp32 with the strengths inside, and full deltas.

    `replacement`: values that stand instead of the weight.
    """

    left: Tensor | None
    right: Tensor | None
    full: tuple[tuple[StoredTensor, float], ...]
    replacement: StoredTensor | None

    @property
    def any(self) -> bool:
        return self.left is not None or bool(self.full) or self.replacement is not None


def load_change(parts: Sequence[tuple[Patch, float]], name: str) -> Change:
    """Read the LoRA factors that patches with their strengths hold for one tensor; full deltas are read when used.

    Raises PatchError where a factor holds NaN or infinity.
    """
    lefts, rights = [], []
    low_rank = [(patch.low_rank[name], scale) for patch, scale in parts if name in patch.low_rank]
    for factors, strength in low_rank:
        left, right = load_factors(factors)
        lefts.append(left if strength == 1 else left * strength)
        rights.append(right)
    full = tuple((patch.full[name], scale) for patch, scale in parts if name in patch.full)
    replacement = next((patch.replaced[name] for patch, _ in parts if name in patch.replaced), None)
    if not lefts:
        return Change(None, None, full, replacement)
    if len(lefts) == 1:
        return Change(lefts[0], rights[0], full, replacement)
    return Change(torch.cat(lefts, 1), torch.cat(rights), full, replacement)


def load_factors(factors: LowRank) -> tuple[Tensor, Tensor]:
    """Return (rows, r) and (r, columns) in fp32 whose product is Δ as it lies beside its weight, scale included.

    Raises PatchError where they hold NaN or infinity.
    """
    a, b = (finite(read_tensor(stored).float(), stored) for stored in (factors.a, factors.b))
    b = b * factors.scale
    return (a.T.contiguous(), b.T.contiguous()) if factors.transposed else (b, a)


def patched(weight: Tensor, change: Change, *, dtype: torch.dtype, start: int = 0) -> Tensor:
    """Return rows of W + Δ: fp32 arithmetic, one rounding to `dtype`.

    `weight` (rows, columns) are the rows of W from `start` on, in any float dtype; an fp32 one may be overwritten.
    Raises PatchError for NaN or infinity in a full delta, RunError where a sum is none or too large for `dtype`.
    """
    stop = start + weight.shape[0]
    device = weight.device
    if change.replacement is not None:
        total = finite(read_tensor(change.replacement, start, stop).float(), change.replacement).to(device)
    else:
        total = weight.float()
    if change.left is not None and change.right is not None:
        total.addmm_(change.left[start:stop].to(device), change.right.to(device))
    for stored, scale in change.full:
        total.add_(finite(read_tensor(stored, start, stop).float(), stored).to(device), alpha=scale)
    result = total.to(dtype)
    # Any NaN or infinity shows in the sum, a tenth of the time of isfinite; a tensor that is only cast may hold them.
    narrow = dtype == torch.float16
    if (narrow or change.any) and not math.isfinite((result if narrow else total).sum(dtype=torch.float32).item()):
        raise RunError(_too_large(dtype))
    return result


def block_rows(rows: int, columns: int) -> int:
    """Return the number of rows of a weight that are changed at a time."""
    return min(rows, max(1, BLOCK_ELEMENTS // max(1, columns)))


@torch.no_grad()
def patch_in_place(weight: Tensor, change: Change) -> None:
    """Add a change to a weight in memory, of any shape and device: the blocks and the arithmetic of a file's."""
    matrix = weight.detach().view(weight.shape[0] if weight.dim() else 1, -1)
    step = max(1, block_rows(*matrix.shape))
    for start in range(0, matrix.shape[0], step):
        block = matrix[start : start + step]
        block.copy_(patched(block, change, dtype=weight.dtype, start=start))


def _too_large(dtype: torch.dtype) -> str:
    if dtype == torch.float16:
        return "a patched value is too large for float16 (65,504); write bfloat16 with --dtype bfloat16"
    return f"a patched value is NaN or too large for {str(dtype).removeprefix('torch.')}; give a smaller scale"


def finite(values: Tensor, stored: StoredTensor) -> Tensor:
    """Return the values of `stored`; raise PatchError where they hold NaN or infinity."""
    if not torch.isfinite(values).all():
        raise PatchError(f"{stored.file}: {stored.name} holds NaN or infinity; it is damaged, make or fetch it again")
    return values
