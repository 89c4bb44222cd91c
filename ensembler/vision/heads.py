"""A linear head over the features of a vision tower: a safetensors file, whether trained or made from texts.

weight      (classes, features)
bias        (classes,), optional
metadata    "classes": a JSON list of labels in the order of the rows, optional; "normalize": "true" where the head
            was made for features of length 1 (default: true for dual encoders, whose features are compared by
            their angles, false for other towers)
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ensembler.errors import MemberError
from ensembler.sources import one_line
from ensembler.weights import naming, safetensors_header


@dataclass(frozen=True)
class HeadInfo:
    """What the header of a head's file says: `classes` and `normalize` are None where it says nothing of them."""

    num_classes: int
    num_features: int
    classes: tuple[str, ...] | None
    normalize: bool | None


class Head(nn.Module):
    """logits = W f + b, with f / ‖f‖ in place of f where `normalize`; features (rows, F), logits (rows, C)."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, normalize: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.normalize = normalize

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (rows, C) in float32, whatever the dtype of the features."""
        features = features.float()
        features = unit_length(features) if self.normalize else features
        logits: Tensor = nn.functional.linear(features, self.weight, self.bias)
        return logits


def unit_length(features: Tensor) -> Tensor:
    """Return features (rows, F) of length 1, as dual encoders compare them."""
    unit: Tensor = features / features.norm(dim=-1, keepdim=True)
    return unit


def read_info(role: str, path: Path) -> HeadInfo:
    """Return what the header of a head's file says; raise MemberError unless it is one."""
    if not path.is_file():
        raise MemberError(f"{role}: there is no head {path}; give a safetensors file with weight (classes, features)")
    with naming(role):
        header = safetensors_header(path)
    shape = header.get("weight", {}).get("shape", [])
    if len(shape) != 2:
        raise MemberError(f"{role}: {path} has no matrix 'weight'; expected (classes, features), and perhaps a 'bias'")
    unknown = sorted(set(header) - {"weight", "bias"})
    if unknown or ("bias" in header and header["bias"]["shape"] != shape[:1]):
        what = f"holds {unknown[0]!r}" if unknown else f"has a bias of shape {header['bias']['shape']}"
        raise MemberError(f"{role}: {path} {what}; expected weight (classes, features) and bias (classes,) alone")
    try:
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
    except SafetensorError as error:
        raise MemberError(f"{role}: the head {path} cannot be read: {one_line(error)}") from error
    classes = _classes(role, path, said.get("classes"), shape[0])
    return HeadInfo(shape[0], shape[1], classes, _normalize(role, path, said.get("normalize")))


def _normalize(role: str, path: Path, said: str | None) -> bool | None:
    known = {None: None, "true": True, "false": False}
    if said not in known:
        raise MemberError(f"{role}: {path} says normalize {said!r}; expected 'true' or 'false' in its metadata")
    return known[said]


def _classes(role: str, path: Path, said: str | None, num: int) -> tuple[str, ...] | None:
    if said is None:
        return None
    try:
        classes = tuple(json.loads(said))
    except (ValueError, TypeError):
        classes = ()
    if len(classes) != num or not all(isinstance(name, str) for name in classes):
        raise MemberError(f"{role}: {path} says classes that are not {num} names; expected a JSON list in its metadata")
    return classes


def load_head(role: str, path: Path, *, normalize: bool) -> Head:
    """Return the head in a file, in float32. Raises MemberError."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise MemberError(f"{role}: the head {path} cannot be read: {one_line(error)}") from error
    return Head(tensors["weight"], tensors.get("bias"), normalize=normalize)


def save_head(head: Head, classes: Sequence[str], path: Path) -> None:
    """Write a head's file in one rename; two processes that make the same may both do so.

    Raises OSError or SafetensorError; nothing half-written is left then.
    """
    tensors = {"weight": head.weight.detach().contiguous()}
    if head.bias is not None:
        tensors["bias"] = head.bias.detach().contiguous()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    metadata = {"classes": json.dumps(list(classes)), "normalize": str(head.normalize).lower()}
    try:
        save_file(tensors, partial, metadata=metadata)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
