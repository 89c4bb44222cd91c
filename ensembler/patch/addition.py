"""The arithmetic of a patch: W + Σ scale · Δ for some rows of one weight, in fp32, with one rounding at the end."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from io import FileIO
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ensembler.adapters import CheckedAdapter
from ensembler.errors import PatchError, RunError
from ensembler.files import reading
from ensembler.patch.boxes import stack_shape
from ensembler.patch.formats import Patch
from ensembler.patch.lora_fitting import fit_loaded
from ensembler.patch.low_rank import Held, LowRank, Pieces
from ensembler.patch.patch_device import CPU, block_elements, host_memory, is_finite, on_device
from ensembler.patch.patch_plan import PatchPlan
from ensembler.safetensors_files import FLOATS, StoredTensor

DTYPES = {word: getattr(torch, name) for name, word in FLOATS.items()}
_FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu}
_INTEGERS = {
    f"{word}{bits}": getattr(torch, f"{name}{bits}")
    for word, name in (("I", "int"), ("U", "uint"))
    for bits in (8, 16, 32, 64)
}
_STORED_DTYPES = DTYPES | _FLOAT8 | _INTEGERS | {"F64": torch.float64, "BOOL": torch.bool}


def read_tensor(stored: StoredTensor, start: int = 0, stop: int | None = None, device: torch.device = CPU) -> Tensor:
    """Return rows [start, stop) of a stored tensor as a matrix (rows, columns), in the dtype of the file.

    By plain reads and not by a memory map, whose pages would count as this process's memory.
    """
    rows, columns = stored.matrix
    stop = rows if stop is None else stop
    if stored.values is not None:
        return on_device(stored.values.reshape(rows, columns)[start:stop], device)
    if rows * columns == 0:
        return torch.empty(stop - start, columns, dtype=_STORED_DTYPES[stored.dtype], device=device)
    row_bytes = stored.num_bytes // rows
    values = host_memory((stop - start) * row_bytes, device)
    buffer: Any = values.numpy()
    with reading(stored.file), stored.file.open("rb", buffering=0) as file:
        file.seek(stored.start + start * row_bytes)
        fill(memoryview(buffer), file, stored)
    return on_device(values.view(_STORED_DTYPES[stored.dtype]).view(stop - start, columns), device)


def fill(buffer: memoryview, file: FileIO, stored: StoredTensor) -> None:
    """Read bytes of a tensor until the buffer is full: one read gives 2 GiB at most.

    Raises RunError where the file ends before.
    """
    while buffer:
        num_bytes = file.readinto(buffer)
        if not num_bytes:
            raise RunError(f"{stored.file}: {stored.name} ended early; the file changed while it was read, try again")
        buffer = buffer[num_bytes:]


def read_finite(stored: StoredTensor, start: int = 0, stop: int | None = None) -> Tensor:
    """Return rows as `read_tensor`, in fp32; raise PatchError where they hold NaN or infinity."""
    values = read_tensor(stored, start, stop).float()
    if not torch.isfinite(values).all():
        raise PatchError(f"{stored.file}: {stored.name} holds NaN or infinity; it is damaged, make or fetch it again")
    return values


def load_factors(factors: LowRank) -> tuple[Tensor, Tensor]:
    """Return (rows, r) and (r, columns) in fp32 whose product is Δ as it lies beside its weight, scale included.

    Raises PatchError where they hold NaN or infinity.
    """
    (pair,) = load_stack(factors)
    return pair


def load_stack(factors: LowRank) -> list[tuple[Tensor, Tensor]]:
    """Return (rows, r) and (r, columns) as `load_factors`, for each matrix in a stack."""
    a, b = read_finite(factors.a), read_finite(factors.b) * factors.scale
    num, rank = factors.num_matrices, a.shape[0] // factors.num_matrices
    pairs = [(b[:, number::num], a[number * rank : (number + 1) * rank]) for number in range(num)]
    if factors.transposed:
        pairs = [(right.T, left.T) for left, right in pairs]
    return [(left.contiguous(), right.contiguous()) for left, right in pairs]


@dataclass(frozen=True)
class RowUpdate:
    """The update left (num_rows, r) @ right (r, columns) of the rows of a weight from `start` on."""

    start: int
    left: Tensor
    right: Tensor

    @property
    def stop(self) -> int:
        return self.start + self.left.shape[0]


@dataclass(frozen=True)
class WeightUpdate:
    """The update of one weight (rows, columns): left @ right, in fp32 with the strengths inside, and full deltas.

    `full`: each with its strength. `replacement`: values that stand instead of the weight. `parts`: updates of some
    rows besides, in the order of their first rows.
    """

    left: Tensor | None = None
    right: Tensor | None = None
    full: tuple[tuple[StoredTensor, float], ...] = ()
    replacement: StoredTensor | None = None
    parts: tuple[RowUpdate, ...] = ()

    @cached_property
    def _starts(self) -> list[int]:
        return [part.start for part in self.parts]

    @cached_property
    def _most_rows(self) -> int:
        return max((part.stop - part.start for part in self.parts), default=0)

    def to(self, device: torch.device) -> WeightUpdate:
        """Return the update with its factors on a device; full deltas are read to it when they are added."""
        if device.type == "cpu":
            return self
        left, right = (None if each is None else on_device(each, device) for each in (self.left, self.right))
        parts = [RowUpdate(p.start, on_device(p.left, device), on_device(p.right, device)) for p in self.parts]
        return replace(self, left=left, right=right, parts=tuple(parts))

    def parts_in(self, start: int, stop: int) -> Iterator[RowUpdate]:
        """Yield the parts of rows [start, stop), each cut to these rows."""
        first = bisect_right(self._starts, start - self._most_rows)
        for part in self.parts[first : bisect_left(self._starts, stop)]:
            begin, end = max(start, part.start), min(stop, part.stop)
            if begin < end:
                yield RowUpdate(begin, part.left[begin - part.start : end - part.start], part.right)


def load_update(patches: Sequence[Patch], name: str) -> WeightUpdate:
    """Read the LoRA factors that patches hold for one tensor; full deltas are read when they are added.

    Raises PatchError where a factor holds NaN or infinity.
    """
    lefts, rights, parts = [], [], []
    for patch in patches:
        if name in patch.low_rank:
            left, right = load_factors(patch.low_rank[name])
            scale = patch.strength(name)
            lefts.append(left if scale == 1 else left * scale)
            rights.append(right)
        if name in patch.pieces:
            parts += load_pieces(patch.pieces[name], patch.stacks, patch.strength(name))
    return WeightUpdate(
        torch.cat(lefts, 1) if lefts else None,
        torch.cat(rights) if rights else None,
        tuple((patch.full[name], patch.strength(name)) for patch in patches if name in patch.full),
        next((patch.replaced[name] for patch in patches if name in patch.replaced), None),
        tuple(sorted(parts, key=lambda part: part.start)),
    )


def load_pieces(pieces: Pieces, stacks: Held, scale: float = 1.0) -> list[RowUpdate]:
    """Read the factors of pieces, cut to the rows and columns that each changes, with zeros around these."""
    _, height, width = stack_shape(pieces.shape)
    updates = []
    for piece in pieces.pieces:
        stack = stacks.get(piece.factors, partial(load_stack, piece.factors))
        left, right = stack[piece.source.matrices[0]]
        left, right = _cut(left, 0, piece.source.rows), _cut(right, 1, piece.source.columns)
        if piece.turned:
            left, right = right.T, left.T
        rows, columns = piece.target.rows, piece.target.columns
        num_rows = rows[-1] + 1 - rows[0]
        left = _spread(left, 0, range(0, num_rows, rows.step), num_rows)
        right = _spread(right, 1, columns, width)
        start = piece.target.matrices[0] * height + rows[0]
        updates.append(RowUpdate(start, (left if scale == 1 else left * scale).contiguous(), right.contiguous()))
    return updates


def _cut(values: Tensor, axis: int, positions: range) -> Tensor:
    index = slice(positions[0], positions[-1] + 1, positions.step)
    return values[index] if axis == 0 else values[:, index]


def _spread(values: Tensor, axis: int, positions: range, length: int) -> Tensor:
    """Return a matrix with `values` at these positions of an axis of this length, and zeros elsewhere."""
    if len(positions) == length:
        return values
    shape = list(values.shape)
    shape[axis] = length
    spread = values.new_zeros(shape)
    _cut(spread, axis, positions).copy_(values)
    return spread


def planned_update(plan: PatchPlan, name: str) -> WeightUpdate:
    """Read the update of one tensor as the plan's transport carries it to the new base."""
    update = load_update(plan.patches, name)
    return update if plan.transport is None else plan.transport.apply(name, update)


class SumCheck:
    """Finds NaN and infinity in the patched blocks of one tensor: the host waits for a GPU once, at the end.

    Any NaN or infinity shows in the sum, a tenth of the time of isfinite; a tensor that is only cast may hold them.
    """

    def __init__(self, update: WeightUpdate, dtype: torch.dtype) -> None:
        self.update, self.dtype = update, dtype
        is_only_cast = update.left is None and update.replacement is None and not (update.full or update.parts)
        self.is_needed = dtype == torch.float16 or not is_only_cast
        self._sums: list[Tensor] = []

    def add(self, total: Tensor, result: Tensor) -> None:
        """Take in a block: its sum in fp32, and that rounded to the dtype."""
        if self.is_needed:
            values = result if self.dtype == torch.float16 else total
            self._sums.append(values.sum(dtype=torch.float32))

    def close(self) -> None:
        """Raise PatchError for NaN or infinity in a full delta, RunError where a sum is none or too large."""
        if is_finite(self._sums):
            return
        for stored in filter(None, (self.update.replacement, *(stored for stored, _ in self.update.full))):
            rows, columns = stored.matrix
            step = max(1, block_rows(rows, columns))
            for start in range(0, rows, step):
                read_finite(stored, start, min(start + step, rows))
        if self.dtype == torch.float16:
            raise RunError("a patched value is too large for float16 (65,504); write bfloat16 with --dtype bfloat16")
        name = str(self.dtype).removeprefix("torch.")
        raise RunError(f"a patched value is NaN or too large for {name}; give a smaller scale")


def patched(
    weight: Tensor, update: WeightUpdate, *, dtype: torch.dtype, start: int = 0, check: SumCheck | None = None
) -> Tensor:
    """Return rows of W + Δ: fp32 arithmetic, one rounding to `dtype`.

    `weight` (rows, columns) are the rows of W from `start` on, in any float dtype; an fp32 one may be overwritten.
    `check` takes in the rows and raises when it is closed; without one, they are checked here. Raises PatchError for
    NaN or infinity in a full delta, RunError where a sum is none or too large for `dtype`.
    """
    stop = start + weight.shape[0]
    device = weight.device
    total = weight.float()
    if update.replacement is not None:
        total = read_tensor(update.replacement, start, stop, device).float()
    if update.left is not None and update.right is not None:
        total.addmm_(update.left[start:stop].to(device), update.right.to(device))
    for part in update.parts_in(start, stop):
        total[part.start - start : part.stop - start].addmm_(part.left.to(device), part.right.to(device))
    for stored, scale in update.full:
        total.add_(read_tensor(stored, start, stop, device).float(), alpha=scale)
    result = total.to(dtype)
    own = check or SumCheck(update, dtype)
    own.add(total, result)
    if check is None:
        own.close()
    return result


def block_rows(rows: int, columns: int, device: torch.device = CPU) -> int:
    """Return the number of rows of a weight that are changed at a time."""
    return min(rows, max(1, block_elements(device) // max(1, columns)))


@torch.no_grad()
def patch_in_place(weight: Tensor, update: WeightUpdate) -> None:
    """Update a weight in memory, of any shape and device: the blocks and the arithmetic of a file's."""
    matrix = weight.detach().view(-1, weight.shape[-1] if weight.dim() > 1 else 1)
    update, check = update.to(weight.device), SumCheck(update, weight.dtype)
    rows, columns = matrix.shape
    step = max(1, block_rows(rows, columns, weight.device))
    for start in range(0, rows, step):
        block = matrix[start : start + step]
        block.copy_(patched(block, update, dtype=weight.dtype, start=start, check=check))
    check.close()


def merge_adapter(model: PreTrainedModel, adapter: CheckedAdapter) -> PreTrainedModel:
    """Add the update to the weights, so that one forward costs what the base costs; return the model.

    θ′ + Δθ in fp32, rounded once (PortLLM, eq. 6): the weights that `patch apply` would write. Tied layers of which a
    LoRA or a trained value concerns one are no longer tied. What is no sum with the weights (DoRA ...) is left to PEFT.
    Raises PatchError where a value is damaged.
    """
    if adapter.patch is None:
        return _merge_with_peft(model, adapter)
    weights = _weights(model)
    patch = adapter.patch
    is_plain = all(weight.dtype in DTYPES.values() and not weight.is_meta for weight in weights.values())
    fitted = patch if patch.names <= weights.keys() else fit_loaded(patch, model) if is_plain else None
    if fitted is None:
        add_deltas(model, adapter)
        return _merge_with_peft(model, adapter)
    _untie(model, {id(weights[name]) for name in (*fitted.low_rank, *fitted.pieces, *fitted.replaced)})
    layers = dict(model.named_modules(remove_duplicate=False))

    def is_transposed(name: str) -> bool | None:
        return isinstance(layers.get(name.removesuffix(".weight")), Conv1D) if name in patch.low_rank else None

    fitted = fitted.oriented(is_transposed)
    _add(_weights(model), fitted, fitted.names)
    return model


def add_deltas(model: PreTrainedModel, adapter: CheckedAdapter) -> None:
    """Add the full deltas of a patch, and leave its LoRA alone. Raises ValueError where a weight is quantised or away.

    A LoRA runs beside weights of any kind; what PEFT has no room for must go into them.
    """
    if adapter.patch is not None:
        _add(_weights(model), adapter.patch, adapter.deltas)


def deltas_added(known: Mapping[str, Tensor], adapter: CheckedAdapter) -> dict[str, Tensor]:
    """Return copies of the weights that full deltas concern, by name, with the deltas added."""
    copies = {name: known[name].detach().clone() for name in adapter.deltas}
    if adapter.patch is not None:
        _add(copies, adapter.patch, adapter.deltas)
    return copies


def _weights(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


def _add(weights: Mapping[str, Tensor], patch: Patch, names: Iterable[str]) -> None:
    tied: set[int] = set()  # deltas of both names of a tensor are one change
    for name in names:
        weight = weights[name]
        if id(weight) in tied:
            continue
        tied.add(id(weight))
        if weight.is_meta or not weight.is_floating_point():
            where = "on disk or offloaded" if weight.is_meta else f"quantised ({weight.dtype})"
            raise ValueError(
                f"the patch holds a full delta for {name}, whose weight is {where}; add the patch to the files first: "
                "ensembler patch apply"
            )
        patch_in_place(weight, load_update([patch], name))


def _merge_with_peft(model: PreTrainedModel, adapter: CheckedAdapter) -> PreTrainedModel:
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(model, adapter.folder)
    layers = [model.get_submodule(name) for name in adapted.base_model.targeted_module_names]
    _untie(model, {id(weight) for layer in layers for weight in layer.parameters()})
    merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    return merged


def _untie(model: PreTrainedModel, changed: Collection[int]) -> None:
    """Give layers that share a weight one each where it is among the `changed` ids: an update of one is none of others.

    The config says so too, for those who save the model or tie it again.
    """
    seen: set[int] = set()
    is_apart = False
    for layer in model.modules():
        for name, weight in list(layer.named_parameters(recurse=False)):
            if id(weight) in seen and id(weight) in changed:
                setattr(layer, name, nn.Parameter(weight.detach().clone(), requires_grad=False))
                is_apart = True
            seen.add(id(weight))
    if is_apart:
        for config in (model.config, model.config.get_text_config(decoder=True)):
            config.tie_word_embeddings = False
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
