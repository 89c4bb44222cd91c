"""The interface of transports, which turn the update of each tensor into one for another base, and their names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from ensembler.errors import ConfigError, PatchError, nearest
from ensembler.files import file_digest
from ensembler.patch.addition import WeightUpdate, block_rows, patched
from ensembler.patch.patch_plan import PatchPlan
from ensembler.safetensors_files import listed

if TYPE_CHECKING:
    from ensembler.patch.model_layout import ModelLayout

Progress = Callable[[int, str], AbstractContextManager[Callable[[int], None]]]
"""Opens a progress bar of so many steps with a label, and yields the function that advances it."""


@contextmanager
def silent(total: int, label: str) -> Iterator[Callable[[int], None]]:
    """Yield a function that shows no progress."""
    yield lambda steps: None


@dataclass(frozen=True)
class Example:
    """A text as token ids: a prompt, and the answer behind it where it has one. `source` names its line."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    source: str


@dataclass(frozen=True)
class Calibration:
    """Examples or texts in a file; `encode` returns them as token ids of a tokenizer, and raises PromptError."""

    file: Path
    num_rows: int
    encode: Callable[[Any], list[Example]]

    @property
    def said(self) -> str:
        """The name of the file and its hash."""
        return f"{self.file.name}, SHA-256 {file_digest(self.file)}"


@dataclass(frozen=True)
class Sources:
    """Inputs of a transport beside the patch and the new base; each transport says which it needs.

    `old`: the folder of the base that the patch was made for. `new`: that of a base of another shape. `data`: labelled
    examples or texts (`ensembler.evaluation.calibration` reads them).
    """

    old: Path | None = None
    new: Path | None = None
    data: Calibration | None = None


class Transport(ABC):
    """Turn the updates of a plan's tensors into others: `check` and `prepare` once, then `apply` for each tensor.

    `apply` is called from several threads. Values that stand instead of a weight are no update, and stay.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()  # fields of `Sources`

    @classmethod
    @abstractmethod
    def check(cls, plan: PatchPlan, sources: Sources) -> None:
        """Check from headers alone that the plan's patches can be carried; raise InputError where they cannot."""

    @classmethod
    @abstractmethod
    def prepare(cls, plan: PatchPlan, sources: Sources, progress: Progress = silent) -> Self:
        """Return the transport of a plan that was checked. Raises InputError."""

    @abstractmethod
    def apply(self, name: str, update: WeightUpdate) -> WeightUpdate:
        """Return the update of one tensor for the new base."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for people and the model card, a line each."""
        return ()


def transports() -> Mapping[str, type[Transport]]:
    """Return the transports that keep every tensor's shape, and so are part of `patch apply`, by name."""
    from ensembler.patch.transports.add import Add
    from ensembler.patch.transports.orthogonal import Orthogonal
    from ensembler.patch.transports.sign_mask import SignMask

    return {kind.name: kind for kind in (Add, Orthogonal, SignMask)}


_OPTIONS = {"old": ("--from", "the base that the patch was made for"), "data": ("--data", "a file of JSON lines")}


def find_transport(name: str, sources: Sources) -> type[Transport]:
    """Return a transport by name; raise ConfigError for an unknown one, and for sources that it lacks or does not use.

    These are told by the options of the command line.
    """
    known = transports()
    if name == "procrustes":
        raise ConfigError("--transport procrustes makes a LoRA of the new base; use: ensembler patch transport")
    if name not in known:
        raise ConfigError(f"unknown transport {name!r}{nearest(name, [*known])}")
    for field, (option, meaning) in _OPTIONS.items():
        is_given, is_needed = getattr(sources, field) is not None, field in known[name].needs
        if is_needed and not is_given:
            raise ConfigError(f"--transport {name} needs {meaning}; give {option}")
        if is_given and not is_needed:
            raise ConfigError(f"{option} was given, which --transport {name} does not use; leave one of them out")
    return known[name]


def carried(plan: PatchPlan, name: str, sources: Sources, progress: Progress = silent) -> PatchPlan:
    """Return the plan with its updates carried by the transport of this name. Raises InputError."""
    kind = find_transport(name, sources)
    kind.check(plan, sources)
    return replace(plan, transport=kind.prepare(plan, sources, progress))


def check_plain(plan: PatchPlan, name: str) -> None:
    """Raise PatchError where weights that change are quantised: a transport has no plain values of them."""
    quantized = [each for each in plan.names if each in plan.quantized]
    if quantized:
        raise PatchError(
            f"{plan.model.folder} is quantised ({listed(quantized)}), and transport {name} needs plain weights; give "
            "the model before that, or use --transport add"
        )


def delta_rows(update: WeightUpdate, rows: int, columns: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, rows of Δ in fp32) of an update, block by block. Raises what `patched` raises."""
    step = max(1, block_rows(rows, columns))
    for start in range(0, rows if columns else 0, step):
        zeros = torch.zeros(min(step, rows - start), columns)
        yield start, patched(zeros, update, dtype=torch.float32, start=start)


def loaded_names(layout: ModelLayout) -> dict[str, str]:
    """Return the names in the loaded model of tensors on disk that are loaded as they are."""
    return {disk: name for name, disk in layout.stored.items()}
