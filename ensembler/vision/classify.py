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
        if self.anchor is None:
            return {"image": self.name, "error": self.error}
        classes = [vars(candidate) for candidate in self.candidates]
        return {"image": self.name, "classes": classes, "anchor": vars(self.anchor)}


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

    def prepare(batch: Sequence[ImageSource]) -> tuple[Sequence[ImageSource], dict[str, str], dict[str, Tensor]]:
        errors: dict[str, str] = {}
        return batch, errors, model.prepare(_readable(batch, errors, strict=strict))

    batches = [sources[start : start + batch_size] for start in range(0, len(sources), batch_size)]
    for batch, errors, prepared in ahead(batches, prepare):
        seen = _see(model, prepared, top_k) if prepared else iter(())
        for source in batch:
            if source.name in errors:
                yield Classified(source.name, error=errors[source.name])
            else:
                yield Classified(source.name, *next(seen))


def _readable(batch: Sequence[ImageSource], errors: dict[str, str], *, strict: bool) -> Iterator[Any]:
    """The images of a batch, each decoded when it is asked for; why others cannot be read goes into `errors`."""
    for source in batch:
        try:
            yield open_image(source)
        except ImageError as error:
            if strict:
                raise
            errors[source.name] = str(error)


@torch.inference_mode()
def _see(
    model: EnsembleForImageClassification, prepared: dict[str, Tensor], top_k: int
) -> Iterator[tuple[tuple[Candidate, ...], Candidate]]:
    """The most probable classes of each image, and the anchor's first."""
    logits = model.member_logits(prepared)
    anchors = _top(model, logits[model.rule.anchor].float(), 1)
    found = _top(model, model.combine(logits), top_k)
    return zip(found, (first for (first,) in anchors), strict=True)


def _top(model: EnsembleForImageClassification, logits: Tensor, top_k: int) -> list[tuple[Candidate, ...]]:
    values, classes = logits.softmax(-1).topk(min(top_k, logits.shape[-1]))
    return [
        tuple(Candidate(model.classes[index], value) for index, value in zip(*row, strict=True))
        for row in zip(classes.tolist(), values.tolist(), strict=True)
    ]
