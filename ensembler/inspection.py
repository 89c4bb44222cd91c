"""What an ensemble is, told from its files: members, weights at α, vocabulary, parameters, bytes. Loads no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from ensembler.engine.members import MemberFiles, group_members
from ensembler.errors import MemberError
from ensembler.planning.measuring import loaded_bytes, measure_group, member_dtype, stored_parameters
from ensembler.preflight import CheckedEnsemble

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}


@dataclass(frozen=True)
class MemberSummary:
    """One member. `parameters` counts stored tensors (tied weights once), `num_bytes` what they take unquantised.

    Both are None where the weights are on the hub and not in the local cache.
    """

    role: str
    model: str
    adapter: str | None
    family: str
    weight: float
    dtype: str
    device: str
    context: int | None
    width: int
    parameters: int | None
    num_bytes: int | None


@dataclass(frozen=True)
class CopySummary:
    """One copy of weights and the members that it serves: bytes as predicted from its config (None: they cannot be),
    and as they are in memory (None: not loaded).
    """

    roles: tuple[str, ...]
    quantization: str | None
    predicted_bytes: int | None
    actual_bytes: int | None = None


@dataclass(frozen=True)
class EnsembleSummary:
    """An ensemble: its rule at α, vocabulary contract, members (the anchor first) and their copies of weights."""

    rule: str
    formula: str
    paper: str
    alpha: float
    anchor: str
    vocabulary: str
    shared: int
    outside: str
    notes: tuple[str, ...]
    members: tuple[MemberSummary, ...]
    copies: tuple[CopySummary, ...]

    def with_actual(self, models: Mapping[str, nn.Module]) -> EnsembleSummary:
        """The same with the bytes of loaded members, by role."""
        copies = (replace(c, actual_bytes=loaded_bytes(models[role] for role in c.roles)) for c in self.copies)
        return replace(self, copies=tuple(copies))

    def to_dict(self) -> dict[str, Any]:
        """The same as a mapping for JSON."""
        return asdict(self)


def summarise(checked: CheckedEnsemble) -> EnsembleSummary:
    """Return the summary of a checked ensemble."""
    config, contract = checked.config, checked.contract
    rule = config.get_rule()
    weights = rule.weights(config.alpha)
    return EnsembleSummary(
        rule=rule.name,
        formula=rule.formula,
        paper=rule.paper,
        alpha=config.alpha,
        anchor=rule.anchor,
        vocabulary=contract.kind,
        shared=contract.shared,
        outside=config.outside,
        notes=contract.notes,
        members=tuple(_member(checked.files[role], contract.widths[role], weights[role]) for role in rule.roles),
        copies=tuple(_copy(group, rule.anchor) for group in group_members(checked.files)),
    )


def _copy(group: tuple[MemberFiles, ...], anchor: str) -> CopySummary:
    config = group[0].config
    try:
        predicted = measure_group(group, anchor).weight_bytes(config.quantization, spread=config.device_map is not None)
    except MemberError:  # a summary is of use without it
        predicted = None
    quantization = None if config.quantization is None else str(config.quantization)
    return CopySummary(tuple(member.role for member in group), quantization, predicted)


def _member(files: MemberFiles, width: int, weight: float) -> MemberSummary:
    dtype = member_dtype(files)
    parameters = sum(stored_parameters(files.config.model, files.config.revision).values()) or None
    return MemberSummary(
        role=files.role,
        model=files.config.model,
        adapter=files.config.adapter,
        family=type(files.model_config).__name__.removesuffix("Config"),
        weight=weight,
        dtype=dtype,
        device=files.config.device,
        context=files.context,
        width=width,
        parameters=parameters,
        num_bytes=None if parameters is None else parameters * _BYTES.get(dtype, 4),
    )
