"""Describe an ensemble from its files: members, weights at α, vocabulary, parameters, bytes. Loads no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ensembler.config import MemberConfig
from ensembler.engine.members import MemberFiles, group_members
from ensembler.files import CHAT_TEMPLATE, is_local
from ensembler.planning.member_sizes import loaded_bytes, member_dtype, predicted_bytes, stored_parameters
from ensembler.planning.sizes import DTYPE_BYTES
from ensembler.preflight import CheckedEnsemble
from ensembler.safetensors_files import fingerprint, stored_tensors, weight_files
from ensembler.vocab import end_ids


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
    """One copy of weights: its bytes as predicted (None: they cannot be) and as in memory (None: not loaded)."""

    roles: tuple[str, ...]
    quantization: str | None
    predicted_bytes: int | None
    actual_bytes: int | None = None


@dataclass(frozen=True)
class EndToken:
    """A token that ends a text. `token` is None where the anchor has no tokenizer."""

    id: int
    token: str | None


@dataclass(frozen=True)
class EnsembleSummary:
    """An ensemble: its rule at α, vocabulary contract, members (the anchor first) and their copies of weights.

    `ends` are the tokens at which texts end, `notes` are differences between the members, `warnings` likely mistakes;
    each of these is one sentence.
    """

    rule: str
    formula: str
    paper: str
    alpha: float
    anchor: str
    vocabulary: str
    shared: int
    outside: str
    ends: tuple[EndToken, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    members: tuple[MemberSummary, ...]
    copies: tuple[CopySummary, ...]

    def with_actual(self, models: Mapping[str, nn.Module]) -> EnsembleSummary:
        """Return the same with the bytes of loaded members, by role."""
        copies = (replace(c, actual_bytes=loaded_bytes(models[role] for role in c.roles)) for c in self.copies)
        return replace(self, copies=tuple(copies))

    def to_dict(self) -> dict[str, Any]:
        """Return a mapping for JSON."""
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
        ends=_ends(checked),
        notes=(*contract.notes, *adapter_notes(checked)),
        warnings=role_warnings(checked),
        members=tuple(_member(checked.files[role], contract.widths[role], weights[role]) for role in rule.roles),
        copies=tuple(_copy(group) for group in group_members(checked.files)),
    )


def _ends(checked: CheckedEnsemble) -> tuple[EndToken, ...]:
    """Return the ends that the ensemble can write."""
    contract, config = checked.contract, checked.config
    most = contract.shared if config.outside == "mask" else contract.widths[config.get_rule().anchor]
    ends = [] if checked.generation_config is None else end_ids(checked.generation_config)
    tokenizer = checked.tokenizer
    return tuple(
        EndToken(end, None if tokenizer is None else tokenizer.convert_ids_to_tokens(end)) for end in ends if end < most
    )


def adapter_notes(checked: CheckedEnsemble) -> tuple[str, ...]:
    """Return a sentence for each adapter of another base, and for each chat template that is not used."""
    anchor = checked.config.get_rule().anchor
    adapters = {role: member.adapter for role, member in checked.files.items() if member.adapter is not None}
    templates = [role for role, one in adapters.items() if role != anchor and (one.folder / CHAT_TEMPLATE).is_file()]
    return (
        *(note for one in adapters.values() for note in one.notes),
        *(
            f"the chat template beside the adapter of {role} is not used: chats are those of {anchor}"
            for role in templates
        ),
    )


def role_warnings(checked: CheckedEnsemble) -> tuple[str, ...]:
    """Return a sentence where source_ft and source_pt look swapped, or source_pt is another member's model."""
    if not {"source_ft", "source_pt"} <= checked.files.keys():
        return ()
    fine_tuned, base = (checked.files[role].config for role in ("source_ft", "source_pt"))
    if base.adapter is not None and fine_tuned.adapter is None:
        return (
            f"source_pt has an adapter ({base.adapter}) and source_ft has none; if the adapter is the fine-tuning, "
            "give these two the other way round",
        )
    if _are_same(fine_tuned, base):
        return (
            f"source_ft ({fine_tuned.model}) and source_pt ({base.model}) have the same weights, so no fine-tuning is "
            "carried over; give the fine-tuned model as source_ft",
        )
    target = checked.files["target_pt"].config if "target_pt" in checked.files else None
    if target is not None and _are_same(target, base):
        return (
            f"source_pt ({base.model}) and target_pt ({target.model}) have the same weights, so there is no change of "
            "base; give the old base model as source_pt and the new one as target_pt",
        )
    return ()


def _are_same(one: MemberConfig, two: MemberConfig) -> bool:
    """Return whether two members have one name, or files of one fingerprint, and the same adapter and head."""
    if (one.adapter, one.head) != (two.adapter, two.head):
        return False
    if (one.model, one.revision) == (two.model, two.revision):
        return True
    if not (is_local(one.model) and is_local(two.model)):
        return False
    files = (weight_files(Path(member.model)) for member in (one, two))
    first, second = (fingerprint(tensor for file in each for tensor in stored_tensors(file).values()) for each in files)
    return first == second


def _copy(group: tuple[MemberFiles, ...]) -> CopySummary:
    method = group[0].config.quantization
    quantization = None if method is None else str(method)
    return CopySummary(tuple(member.role for member in group), quantization, predicted_bytes(group))


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
        num_bytes=None if parameters is None else parameters * DTYPE_BYTES.get(dtype, 4),
    )
