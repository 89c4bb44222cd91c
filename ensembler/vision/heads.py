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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
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
        features = unit_length(features.float()) if self.normalize else features.float()
        logits: Tensor = nn.functional.linear(features, self.weight, self.bias)
        return logits


def unit_length(features: Tensor) -> Tensor:
    """Return features (rows, F) of length 1, as dual encoders compare them."""
    unit: Tensor = features / features.norm(dim=-1, keepdim=True)
    return unit


def read_info(role: str, path: Path) -> HeadInfo:
    """Return what the header of a head's file says; raise MemberError unless it is one."""
    with naming(role):
        if not path.is_file():
            raise MemberError(f"there is no head {path}; give a safetensors file with weight (classes, features)")
        header = safetensors_header(path)
        shape = header.get("weight", {}).get("shape", [])
        if len(shape) != 2:
            raise MemberError(f"{path} has no matrix 'weight'; expected (classes, features), and perhaps a 'bias'")
        unknown = sorted(set(header) - {"weight", "bias"})
        if unknown or ("bias" in header and header["bias"]["shape"] != shape[:1]):
            fault = f"holds {unknown[0]!r}" if unknown else f"has a bias of shape {header['bias']['shape']}"
            raise MemberError(f"{path} {fault}; expected weight (classes, features) and bias (classes,) alone")
        with _opened(path) as file:
            said = file.metadata() or {}
        classes = _read_classes(path, said.get("classes"), shape[0])
        known = {None: None, "true": True, "false": False}
        normalize = said.get("normalize")
        if normalize not in known:
            raise MemberError(f"{path} says normalize {normalize!r}; expected 'true' or 'false' in its metadata")
        return HeadInfo(shape[0], classes, known[normalize])


def _read_classes(path: Path, said: str | None, num: int) -> tuple[str, ...] | None:
    if said is None:
        return None
    try:
        classes = tuple(json.loads(said))
    except (ValueError, TypeError):
        classes = ()
    if len(classes) != num or not all(isinstance(name, str) for name in classes):
        raise MemberError(f"{path} says classes that are not {num} names; expected a JSON list in its metadata")
    return classes


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise MemberError(f"the head {path} cannot be read: {one_line(error)}") from error


def load_head(role: str, path: Path, *, normalize: bool) -> Head:
    """Return the head in a file, in float32. Raises MemberError."""
    with naming(role), _opened(path) as file:
        # Copied, since a product with weights that are not aligned in memory, as in a file, rounds otherwise.
        tensors = {name: file.get_tensor(name).to(torch.float32, copy=True) for name in file.keys()}  # noqa: SIM118
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
