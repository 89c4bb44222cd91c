"""What an ensemble sees in images: the most probable classes of each, and what the anchor alone would say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ensembler.errors import ImageError
from ensembler.vision.images import ImageSource, open_image
from ensembler.vision.loader import ahead
from ensembler.vision.modeling import EnsembleForImageClassification


@dataclass(frozen=True)
class Candidate:
    """A class and its probability."""

    label: str
    probability: float


@dataclass(frozen=True)
class Classified:
    """An image, its most probable classes, and the anchor's; or the `error` for which it was skipped."""

    name: str
    candidates: tuple[Candidate, ...] = ()
    anchor: Candidate | None = None
    error: str | None = None

    def to_row(self) -> dict[str, Any]:
        """The same for JSON."""
        if self.error is not None:
            return {"image": self.name, "error": self.error}
        return {
            "image": self.name,
            "classes": [vars(candidate) for candidate in self.candidates],
            "anchor": None if self.anchor is None else vars(self.anchor),
        }


@dataclass(frozen=True)
class _Batch:
    names: tuple[str, ...]
    errors: dict[str, str]
    prepared: dict[str, Tensor]


def classify(
    model: EnsembleForImageClassification,
    sources: Sequence[ImageSource],
    *,
    top_k: int = 5,
    batch_size: int = 16,
    strict: bool = False,
) -> Iterator[Classified]:
    """Yield what the ensemble sees in one image after another; the next ones are read while it runs.

    An image that cannot be read has an `error` in place of classes; `strict` raises ImageError for the first one.
    """

    def prepare(batch: Sequence[ImageSource]) -> _Batch:
        errors: dict[str, str] = {}
        prepared = model.prepare(_readable(batch, errors, strict=strict))
        return _Batch(tuple(source.name for source in batch), errors, prepared)

    batches = [sources[start : start + batch_size] for start in range(0, len(sources), batch_size)]
    for batch in ahead(batches, prepare):
        yield from _classified(model, batch, top_k)


def _readable(batch: Sequence[ImageSource], errors: dict[str, str], *, strict: bool) -> Iterator[Any]:
    """The images of a batch, each decoded when it is asked for; why others cannot be read goes into `errors`."""
    for source in batch:
        try:
            image = open_image(source)
        except ImageError as error:
            if strict:
                raise
            errors[source.name] = str(error)
        else:
            yield image


@torch.inference_mode()
def _classified(model: EnsembleForImageClassification, batch: _Batch, top_k: int) -> Iterator[Classified]:
    if batch.prepared:
        logits = model.member_logits(batch.prepared)
        found = iter(_top(model, model.combine(logits), top_k))
        anchors = iter(_top(model, logits[model.rule.anchor].float(), 1))
    for name in batch.names:
        if name in batch.errors:
            yield Classified(name, error=batch.errors[name])
        else:
            yield Classified(name, next(found), next(anchors)[0])


def _top(model: EnsembleForImageClassification, logits: Tensor, top_k: int) -> list[tuple[Candidate, ...]]:
    values, classes = logits.softmax(-1).topk(min(top_k, logits.shape[-1]))
    return [
        tuple(Candidate(model.classes[index], value) for index, value in zip(*row, strict=True))
        for row in zip(classes.tolist(), values.tolist(), strict=True)
    ]
