"""LoRA factors by the headers of their files, and the parts of them that belong to parts of a tensor. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from ensembler.patch.boxes import Box, Shape
from ensembler.safetensors_files import StoredTensor

T = TypeVar("T")


@dataclass(frozen=True)
class LowRank:
    """Δ = scale · B A, with A (r, in) and B (out, r) on disk; `transposed`: the weight lies as (in, out).

    An embedding's weight (tokens, width) is the transposed case too, with A (r, tokens) and B (width, r).
    A stack of E matrices has A (E · r, in), one matrix after the other, and B (out, r · E), whose columns are those of
    all matrices in turn (PEFT's `target_parameters`). `is_parameter`: PEFT names the module that holds the tensor, and
    not the tensor itself.
    """

    a: StoredTensor
    b: StoredTensor
    scale: float
    transposed: bool
    num_matrices: int = 1
    is_parameter: bool = False

    @property
    def is_embedding(self) -> bool:
        return "lora_embedding" in self.a.name

    @property
    def shape(self) -> Shape:
        """Shape of the weight that this is added to."""
        rows, columns = self.b.shape[0], self.a.shape[1]
        matrix = (columns, rows) if self.transposed else (rows, columns)
        return matrix if self.num_matrices == 1 else (self.num_matrices, *matrix)

    def is_zero(self) -> bool:
        """Return whether Δ is zero, as it is before training, from the bytes of the factors."""
        return self.b.is_zero() or self.a.is_zero()


class Held:
    """The last values that were loaded: a stack of factors serves many tensors, which come one after the other."""

    def __init__(self, most: int = 4) -> None:
        self._most = most
        self._values: tuple[tuple[object, Any], ...] = ()

    def get(self, key: object, load: Callable[[], T]) -> T:
        """Return the value of this very object, loaded if it is not held. Two threads may load it at the same time."""
        for held, value in self._values:
            if held is key:
                found: T = value
                return found
        loaded = load()
        self._values = ((key, loaded), *self._values)[: self._most]
        return loaded


@dataclass(frozen=True)
class Piece:
    """The part `source` of a LoRA's Δ, in one of its matrices, which is added to `target`, in one matrix of a tensor.

    `turned`: its rows are columns there.
    """

    factors: LowRank
    source: Box
    target: Box
    turned: bool = False

    def transposed(self) -> Piece:
        """Return the piece for the tensor with its last two axes exchanged."""
        return Piece(self.factors, self.source, self.target.transposed(), not self.turned)


@dataclass(frozen=True)
class Pieces:
    """Pieces of LoRAs that are added to a tensor of this shape, with the last axes as they lie on disk."""

    shape: Shape
    pieces: tuple[Piece, ...]

    @classmethod
    def whole(cls, factors: LowRank) -> Pieces:
        """Return a LoRA of a stack of matrices as pieces, one for each."""
        box = Box.whole(factors.shape)
        boxes = [Box(range(number, number + 1), box.rows, box.columns) for number in box.matrices]
        return cls(factors.shape, tuple(Piece(factors, box, box) for box in boxes))

    def transposed(self) -> Pieces:
        """Return the pieces for the tensor with its last two axes exchanged."""
        shape = (*self.shape[:-2], self.shape[-1], self.shape[-2])
        return Pieces(shape, tuple(piece.transposed() for piece in self.pieces))

    def is_zero(self) -> bool:
        """Return whether all of the pieces are zero."""
        return all(
            factors.is_zero() for factors in {id(piece.factors): piece.factors for piece in self.pieces}.values()
        )
