"""What an ensemble is, told from its files: members, weights at α, vocabulary, parameters, bytes. Loads no weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from ensembler.members import MemberFiles
from ensembler.preflight import CheckedEnsemble
from ensembler.sources import is_local
from ensembler.weights import safetensors_header, weight_files

_TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}


@dataclass(frozen=True)
class MemberSummary:
    """One member. `parameters` counts stored tensors (tied weights once), `num_bytes` what they take once loaded.

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
class EnsembleSummary:
    """An ensemble: its rule at α, its vocabulary contract and its members, the anchor first."""

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
    )


def _member(files: MemberFiles, width: int, weight: float) -> MemberSummary:
    tensors = _tensors(files.config.model, files.config.revision)
    stored = Counter[str]()
    for tensor in tensors.values():
        stored[_TORCH_NAMES.get(tensor["dtype"], tensor["dtype"])] += prod(tensor["shape"])
    dtype = files.config.dtype
    if dtype == "auto":  # as transformers decides: the model's config, and then the weights file
        in_file = stored.most_common(1)[0][0] if stored else "float32"
        dtype = str(files.model_config.dtype or in_file).removeprefix("torch.")
    parameters = sum(stored.values()) or None
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


def _tensors(model: str, revision: str | None) -> Mapping[str, Any]:
    """The tensors in a model's headers; empty where it is not on this machine."""
    folder = Path(model) if is_local(model) else _cached(model, revision)
    if folder is None:
        return {}
    return {name: tensor for file in weight_files(folder) for name, tensor in safetensors_header(file).items()}


def _cached(model: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, OSError):
        return None
