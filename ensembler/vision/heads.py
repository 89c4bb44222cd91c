"""A linear head over the features of a vision tower: a safetensors file, whether trained or made from texts.

weight      (classes, features)
bias        (classes,), optional
metadata    "classes": a JSON list of labels in the order of the rows, optional; "normalize": "true" where the head
            was made for features of length 1 (default: true for dual encoders, whose features are compared by
            their angles, false for other towers)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from ensembler.errors import MemberError
from ensembler.files import write_whole
from ensembler.sources import one_line
from ensembler.weights import safetensors_header

_FLAGS = {None: None, "true": True, "false": False}


@dataclass(frozen=True)
class HeadInfo:
    """The header of a head's file: `classes` and `normalize` are None where it says nothing of them."""

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
        features = features.float()
        if self.normalize:
            features = functional.normalize(features, dim=-1)
        return functional.linear(features, self.weight, self.bias)


def read_info(path: Path) -> HeadInfo:
    """Return what the header of a head's file says; raise MemberError unless it is one."""
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
    if said.get("normalize") not in _FLAGS:
        raise MemberError(f"{path} says normalize {said['normalize']!r}; expected 'true' or 'false' in its metadata")
    try:
        classes = tuple(json.loads(said["classes"])) if "classes" in said else None
    except (ValueError, TypeError):
        classes = ()
    if classes is not None and (len(classes) != shape[0] or not all(isinstance(name, str) for name in classes)):
        raise MemberError(f"{path} says classes that are not {shape[0]} names; expected a JSON list in its metadata")
    return HeadInfo(shape[0], classes, _FLAGS[said.get("normalize")])


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise MemberError(f"the head {path} cannot be read: {one_line(error)}") from error


def load_head(path: Path, *, normalize: bool) -> Head:
    """Return the head in a file, in float32. Raises MemberError."""
    with _opened(path) as file:
        # Copied, since a product with weights that are not aligned in memory, as in a file, rounds otherwise.
        tensors = {name: file.get_tensor(name).to(torch.float32, copy=True) for name in file.keys()}  # noqa: SIM118
    return Head(**tensors, normalize=normalize)


def save_head(head: Head, classes: Sequence[str], path: Path) -> None:
    """Write a head's file in one rename; two processes that make the same may both do so. Raises OutputError."""
    metadata = {"classes": json.dumps(list(classes)), "normalize": str(head.normalize).lower()}
    write_whole(path, save(head.state_dict(), metadata))
