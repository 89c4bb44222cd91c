"""The arithmetic of a patch: W + Σ scale · Δ for some rows of one weight, in fp32, with one rounding at the end."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ensembler.adapters import CheckedAdapter
from ensembler.errors import PatchError, RunError
from ensembler.files import reading
from ensembler.patch.formats import LowRank, Patch
from ensembler.patch.patch_plan import PatchPlan
from ensembler.safetensors_files import FLOATS, StoredTensor

DTYPES = {word: getattr(torch, name) for name, word in FLOATS.items()}
BLOCK_ELEMENTS = 128 * 1024  # half a megabyte in fp32: a block and its factors stay in a core's own cache


def read_tensor(stored: StoredTensor, start: int = 0, stop: int | None = None) -> Tensor:
    """Return rows [start, stop) of a stored tensor as a matrix (rows, columns), in the dtype of the file.

    By plain reads and not by a memory map, whose pages would count as this process's memory.
    """
    rows, columns = stored.matrix
    stop = rows if stop is None else stop
    if stored.values is not None:
        return stored.values.reshape(rows, columns)[start:stop]
    if rows * columns == 0:
        return torch.empty(stop - start, columns, dtype=DTYPES[stored.dtype])
    row_bytes = stored.num_bytes // rows
    buffer = bytearray((stop - start) * row_bytes)
    with reading(stored.file), stored.file.open("rb", buffering=0) as file:
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
    a, b = read_finite(factors.a), read_finite(factors.b) * factors.scale
    return (a.T.contiguous(), b.T.contiguous()) if factors.transposed else (b, a)


@dataclass(frozen=True)
class WeightUpdate:
    """The update of one weight (rows, columns): left @ right, in fp32 with the strengths inside, and full deltas.

    `full`: each with its strength. `replacement`: values that stand instead of the weight.
    """

    left: Tensor | None = None
    right: Tensor | None = None
    full: tuple[tuple[StoredTensor, float], ...] = ()
    replacement: StoredTensor | None = None


def load_update(patches: Sequence[Patch], name: str) -> WeightUpdate:
    """Read the LoRA factors that patches hold for one tensor; full deltas are read when they are added.

    Raises PatchError where a factor holds NaN or infinity.
    """
    lefts, rights = [], []
    for patch in patches:
        if name in patch.low_rank:
            left, right = load_factors(patch.low_rank[name])
            lefts.append(left if patch.scale == 1 else left * patch.scale)
            rights.append(right)
    return WeightUpdate(
        torch.cat(lefts, 1) if lefts else None,
        torch.cat(rights) if rights else None,
        tuple((patch.full[name], patch.scale) for patch in patches if name in patch.full),
        next((patch.replaced[name] for patch in patches if name in patch.replaced), None),
    )


def patched(weight: Tensor, update: WeightUpdate, *, dtype: torch.dtype, start: int = 0) -> Tensor:
    """Return rows of W + Δ: fp32 arithmetic, one rounding to `dtype`.

    `weight` (rows, columns) are the rows of W from `start` on, in any float dtype; an fp32 one may be overwritten.
    Raises PatchError for NaN or infinity in a full delta, RunError where a sum is none or too large for `dtype`.
    """
    stop = start + weight.shape[0]
    device = weight.device
    total = weight.float()
    if update.replacement is not None:
        total = read_finite(update.replacement, start, stop).to(device)
    if update.left is not None and update.right is not None:
        total.addmm_(update.left[start:stop].to(device), update.right.to(device))
    for stored, scale in update.full:
        total.add_(read_finite(stored, start, stop).to(device), alpha=scale)
    result = total.to(dtype)
    # Any NaN or infinity shows in the sum, a tenth of the time of isfinite; a tensor that is only cast may hold them.
    is_half = dtype == torch.float16
    is_only_cast = update.left is None and update.replacement is None and not update.full
    if (is_half or not is_only_cast) and not math.isfinite((result if is_half else total).sum(dtype=torch.float32)):
        if is_half:
            raise RunError("a patched value is too large for float16 (65,504); write bfloat16 with --dtype bfloat16")
        name = str(dtype).removeprefix("torch.")
        raise RunError(f"a patched value is NaN or too large for {name}; give a smaller scale")
    return result


def block_rows(rows: int, columns: int) -> int:
    """Return the number of rows of a weight that are changed at a time."""
    return min(rows, max(1, BLOCK_ELEMENTS // max(1, columns)))


@torch.no_grad()
def patch_in_place(weight: Tensor, update: WeightUpdate) -> None:
    """Update a weight in memory, of any shape and device: the blocks and the arithmetic of a file's."""
    matrix = weight.detach().view(weight.shape[0] if weight.dim() else 1, -1)
    step = max(1, block_rows(*matrix.shape))
    for start in range(0, matrix.shape[0], step):
        block = matrix[start : start + step]
        block.copy_(patched(block, update, dtype=weight.dtype, start=start))


def patched_tensors(plan: PatchPlan) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the model's files under its name there, θ + Δθ where the patches change it.

    The values are those that `patch apply` writes. Memory is one tensor and the factors of its update. Raises
    PatchError or RunError where a value is damaged.
    """
    changed = set(plan.names)
    for file in dict.fromkeys(stored.file for stored in plan.model.tensors.values()):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                tensor = opened.get_tensor(name)
                if name in changed:
                    patch_in_place(tensor, load_update(plan.patches, name))
                yield name, tensor


def merge_adapter(model: PreTrainedModel, adapter: CheckedAdapter) -> PreTrainedModel:
    """Add the update to the weights, so that one forward costs what the base costs; return the model.

    θ′ + Δθ in fp32, rounded once (PortLLM, eq. 6): the weights that `patch apply` would write. Tied layers of which a
    LoRA or a trained value concerns one are no longer tied. What is no sum with the weights (DoRA ...) is left to PEFT.
    Raises PatchError where a value is damaged.
    """
    if adapter.patch is None:
        return _merge_with_peft(model, adapter)
    weights = _weights(model)
    if not adapter.patch.names <= weights.keys():
        add_deltas(model, adapter)
        return _merge_with_peft(model, adapter)
    _untie(model, {id(weights[name]) for name in (*adapter.patch.low_rank, *adapter.patch.replaced)})
    patch = adapter.patch.oriented(lambda name: isinstance(model.get_submodule(name.removesuffix(".weight")), Conv1D))
    _add(_weights(model), patch, patch.names)
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
