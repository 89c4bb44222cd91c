"""Classify images: the most probable classes of each, and the anchor's own answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ensembler.errors import ImageError
from ensembler.vision.images import ImageSource, open_image
from ensembler.vision.loader import ahead
from ensembler.vision.modeling import EnsembleForImageClassification


def classify(
    model: EnsembleForImageClassification,
    sources: Sequence[ImageSource],
    *,
    top_k: int = 5,
    batch_size: int = 16,
    strict: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yield what the ensemble sees in one image after another, as JSON; the next ones are read while it runs.

    `image`: its name; `classes`: the most probable ones, each with `label` and `probability`; `anchor`: the anchor's
    first. An image that cannot be read has an `error` in place of these; `strict` raises ImageError for the first one.
    """

    def prepare(batch: Sequence[ImageSource]) -> tuple[Sequence[ImageSource], dict[str, str], dict[str, Tensor]]:
        errors: dict[str, str] = {}
        return batch, errors, model.prepare(_readable(batch, errors, strict=strict))

    batches = [sources[start : start + batch_size] for start in range(0, len(sources), batch_size)]
    for batch, errors, prepared in ahead(batches, prepare):
        seen = iter(_see(model, prepared, top_k) if prepared else ())
        for source in batch:
            said = {"error": errors[source.name]} if source.name in errors else next(seen)
            yield {"image": source.name, **said}


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
def _see(model: EnsembleForImageClassification, prepared: dict[str, Tensor], top_k: int) -> list[dict[str, Any]]:
    """The most probable classes of each image, and the anchor's first."""
    logits = model.member_logits(prepared)
    found = _top(model, model.combine(logits), top_k)
    anchors = _top(model, logits[model.rule.anchor].float(), 1)
    return [{"classes": classes, "anchor": first} for classes, (first,) in zip(found, anchors, strict=True)]


def _top(model: EnsembleForImageClassification, logits: Tensor, top_k: int) -> list[list[dict[str, Any]]]:
    values, classes = logits.softmax(-1).topk(min(top_k, logits.shape[-1]))
    return [
        [{"label": model.classes[index], "probability": value} for index, value in zip(*row, strict=True)]
        for row in zip(classes.tolist(), values.tolist(), strict=True)
    ]
