"""The α sweep over images: all points of a grid from one pass, the next images being read while the members run."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ensembler.engine.grid import Grid, GridPoint
from ensembler.errors import ConfigError
from ensembler.evaluation.answering import Answered
from ensembler.evaluation.examples import Answer, Example
from ensembler.evaluation.provenance import versions
from ensembler.evaluation.sweep import Sweep, SweepOptions
from ensembler.evaluation.sweep_tasks import SweepTask, by_split
from ensembler.evaluation.swept_task import SweptTask
from ensembler.serving.choice import TRANSFORMERS
from ensembler.vision.images import open_image
from ensembler.vision.loader import ahead
from ensembler.vision.modeling import EnsembleForImageClassification
from ensembler.vision.preflight import CheckedImages
from ensembler.vision.provenance import describe_images
from ensembler.vision.tasks import TOP

_THUMBNAIL = (96, 96)
_SMALL = 48  # pixels; images below are shown larger, with their pixels to be seen


@dataclass(frozen=True)
class ImageChunk:
    """Images that are run together. What a chunk holds, and so its rounding, depends on no earlier run."""

    examples: tuple[Example, ...]
    num_truncated: int = 0

    def ids(self) -> dict[str, object]:
        """Return the hash of each image's file, by the example's id."""
        return {example.id: example.source[0].digest for example in self.examples}

    def prepare(self, model: EnsembleForImageClassification) -> dict[str, Tensor]:
        """Return the images as every member wants them."""
        return model.prepare(open_image(example.source[0].image.source) for example in self.examples)

    @torch.inference_mode()
    def answer_prepared(
        self, model: EnsembleForImageClassification, prepared: dict[str, Tensor], grid: Sequence[GridPoint]
    ) -> list[Answered]:
        """Return [the most probable classes, (log-prob of the right one, whether it is first)] at every point."""
        targets = torch.tensor([model.classes.index(str(example.gold)) for example in self.examples])
        points = Grid.of(grid, model.rule, model.contract, model.config.outside).on(model.device)
        logits = model.member_logits(prepared)
        combined = points.combine({role: values.to(model.device) for role, values in logits.items()})
        by_point = _answers(model, combined.cpu(), targets)
        return [
            Answered(example, tuple(by_point[index][row] for index in range(len(grid))))
            for row, example in enumerate(self.examples)
        ]


def _answers(model: EnsembleForImageClassification, combined: Tensor, targets: Tensor) -> list[list[list[Answer]]]:
    """Of combined logits (K, rows, C), the answers by point and row."""
    log_probs = combined.log_softmax(-1)
    of_right = log_probs.gather(-1, targets.expand(combined.shape[0], -1).unsqueeze(-1)).squeeze(-1)
    # Stable: of equal logits the first class is the answer, as for argmax.
    top = combined.sort(dim=-1, descending=True, stable=True).indices[..., :TOP]
    first = top[..., 0] == targets
    return [
        [
            [[model.classes[index] for index in classes], (log_prob, is_first)]
            for classes, log_prob, is_first in zip(*rows, strict=True)
        ]
        for rows in zip(top.tolist(), of_right.tolist(), first.tolist(), strict=True)
    ]


class ImageSweep(Sweep):
    """A sweep over labelled images, planned: every image was read once, nothing is loaded."""

    has_pictures: ClassVar[bool] = True

    def __init__(self, checked: CheckedImages, tasks: Sequence[SweptTask], options: SweepOptions) -> None:
        if options.by_perplexity:
            raise ConfigError("images have no prompts whose likelihood could choose alpha; give --validation")
        if options.backend.name != TRANSFORMERS:
            raise ConfigError(f"images are not run by {options.backend.name}; leave --backend out")
        self._images = checked
        super().__init__(checked, tasks, options)
        self._by_id = {example.id: example for chunk in self.chunks for example in chunk.examples}

    def _chunks(self, task: SweepTask) -> Iterator[ImageChunk]:
        size = self.options.batch_size
        for examples in by_split(task):
            for start in range(0, len(examples), size):
                yield ImageChunk(tuple(examples[start : start + size]))

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All that rows depend on, as JSON: those of a sweep over texts, and what only image classifiers have."""
        return {**super().settings, "versions": versions("pillow"), "ensemble": describe_images(self._images)}

    def num_skipped(self, task: SweepTask) -> int:
        """How many images of a task's splits that are used cannot be read."""
        used = {example.id.split("/")[-2] for examples in by_split(task) for example in examples}
        skipped = task.task.describe()["skipped"]
        return sum(len(skipped.get(split, ())) for split in used)

    def thumbnail(self, name: str) -> str | None:
        """Return a small picture of an image as a data URI."""
        image = open_image(self._by_id[name].source[0].image.source)
        if max(image.size) < _SMALL:
            factor = _SMALL // max(image.size) + 1
            image = image.resize((factor * image.width, factor * image.height), 0)  # nearest
        image.thumbnail(_THUMBNAIL)
        buffer = io.BytesIO()
        image.save(buffer, "png")
        return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"

    def open(self) -> AbstractContextManager[Any]:
        """Load the members."""
        return nullcontext(EnsembleForImageClassification.from_checked(self._images))

    def _answer(self, backend: Any, chunks: Sequence[Any]) -> Iterator[list[Answered]]:
        """Answer one chunk after another; the images of the next ones are prepared while the members run."""
        prepared = ahead(chunks, lambda chunk: (chunk, chunk.prepare(backend)))
        for chunk, values in prepared:
            yield chunk.answer_prepared(backend, values, self.grid)
