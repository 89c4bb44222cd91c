"""Measure a patch, and how it lies to the model it is carried to: Table 1 of PortLLM for any model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ensembler.errors import ConfigError, PatchError
from ensembler.patch.changes import DTYPES, finite, load_factors, read_tensor
from ensembler.patch.formats import Patch, read_patch
from ensembler.patch.headers import StoredTensor, listed, model_tensors
from ensembler.patch.norms import Dense, Factors, Update, difference, size_of_matrix
from ensembler.patch.plan import Part, make_plan, other_base
from ensembler.patch.report import ModuleReport, PatchReport


def inspect_patch(
    patch: Path,
    *,
    model: Path | None = None,
    base: Path | None = None,
    other: Path | None = None,
    allow_pickle: bool = False,
    advance: Callable[[int], None] | None = None,
) -> PatchReport:
    """Measure a patch Δθ_i: alone, on a `model` θ′, against θ′ - θ of a `base` θ, and against `other`, Δθ′_i.

    PortLLM, section 3.3 and Table 1. Norms of LoRAs come from their factors; of a model, one tensor at a time is read.
    Raises PatchError or MemberError where the files do not fit each other, ConfigError for a base without a model.
    """
    if base is not None and model is None:
        raise ConfigError("a base needs a model: θ′ - θ is taken between the two; give the model with --to")
    mine = _read(patch, model, allow_pickle)
    theirs = None if other is None else _read(other, model, allow_pickle)
    warnings: tuple[str, ...] = ()
    updated: dict[str, StoredTensor] = {}
    old: dict[str, StoredTensor] = {}
    if model is not None:
        updated = model_tensors(model)
    if base is not None:
        make_plan([Part(patch)], base, allow_pickle=allow_pickle)
        old = model_tensors(base)
        said = other_base(mine, base, old)
        warnings = () if said is None else (said,)
    names = [name for name in [*mine.low_rank, *mine.full] if name not in mine.replaced]
    if not names:
        raise PatchError(f"{patch} only replaces {listed(mine.replaced)}; there is no delta to measure")
    if theirs is not None:
        alone = sorted(set(names) ^ {*theirs.low_rank, *theirs.full})
        if alone:
            raise PatchError(f"{patch} and {other} change different tensors: {listed(alone)}; give two of one kind")
    modules = []
    for name in names:
        modules.append(_measure(name, mine, theirs, updated.get(name), old.get(name)))
        if advance is not None:
            advance(1)
    return PatchReport(tuple(modules), mine.notes, warnings)


def _read(patch: Path, model: Path | None, allow_pickle: bool) -> Patch:
    """Read a patch; raise PatchError unless it fits the model."""
    if model is None:
        return read_patch(patch, allow_pickle=allow_pickle)
    return make_plan([Part(patch)], model, allow_pickle=allow_pickle).parts[0][0]


def _measure(
    name: str, mine: Patch, theirs: Patch | None, updated: StoredTensor | None, old: StoredTensor | None
) -> ModuleReport:
    update = _load(mine, name)
    shape = mine.low_rank[name].shape if name in mine.low_rank else mine.full[name].shape
    values: dict[str, Any] = {}
    if theirs is not None:
        values["residual"] = difference(_load(theirs, name), update).size()
    if updated is not None:
        weight = finite(read_tensor(updated).float(), updated)
        if old is not None:
            change = weight - finite(read_tensor(old).float(), old)
            values["update"] = float(change.double().norm())
            values["inner"] = update.inner(change)
            del change
        total = update.added_to(weight)
        values["patched"] = size_of_matrix(total)
        values["rounding"] = _rounding(total, DTYPES[updated.dtype])
    return ModuleReport(name, shape, update.rank, update.size(), **values)


def _load(patch: Patch, name: str) -> Update:
    if name in patch.low_rank:
        left, right = load_factors(patch.low_rank[name])
        return Factors(left, right)
    return Dense(finite(read_tensor(patch.full[name]).float(), patch.full[name]))


def _rounding(total: Tensor, dtype: torch.dtype) -> float:
    return float((total.to(dtype).float() - total).double().norm())
