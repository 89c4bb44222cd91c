"""Labelled images as a task of a sweep: which class is it? Accuracy, top-5 accuracy, log-prob of the right class."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensembler.errors import ClassesError, ConfigError, ImageError
from ensembler.evaluation.examples import Answer, Continuation, Example, Measurement, Metric, Request
from ensembler.evaluation.metric_values import from_json, to_json
from ensembler.evaluation.statistics import metric_interval
from ensembler.vision.classes import known_as
from ensembler.vision.datasets import LabelledImage, read_splits
from ensembler.vision.images import decode
from ensembler.vision.loader import ahead

TOP = 5
_VERSION = "1"  # of the metrics


@dataclass(frozen=True)
class KnownImage:
    """An image that can be read: its class, its place in its split, and the hash of its file."""

    image: LabelledImage
    label: str
    index: int
    digest: str


@dataclass(frozen=True, eq=False)
class ImageTask:
    """Labelled images by split, of which those that can be read are asked about.

    `skipped`: why others cannot be read, by split and in their order.
    """

    name: str
    classes: tuple[str, ...]
    images: Mapping[str, Sequence[KnownImage]]
    skipped: Mapping[str, Sequence[str]]
    limit: int | None = None

    @property
    def version(self) -> str:
        """The version of the metrics."""
        return _VERSION

    @property
    def num_fewshot(self) -> None:
        """There is no prompt."""
        return

    @property
    def splits(self) -> dict[str, int]:
        """The number of images of each split that can be read."""
        return {split: len(images) for split, images in self.images.items()}

    @property
    def default_split(self) -> str:
        """The split that is reported."""
        return "test" if "test" in self.images else "validation"

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Accuracy, top-5 accuracy where there are more classes, and the mean log-prob of the right class in nats."""
        keys = ["acc", *(["acc_top5"] if len(self.classes) > TOP else []), "log_prob"]
        return tuple(Metric(key, key, "", True, True) for key in keys)

    def choose_metric(self, key: str | None = None) -> Metric:
        """Return the metric of a key, or accuracy; raise ConfigError if unknown."""
        known = {metric.key: metric for metric in self.metrics}
        if key is not None and key not in known:
            raise ConfigError(f"images have no metric {key!r}; they have {', '.join(known)}")
        return known[key or "acc"]

    def describe(self) -> dict[str, Any]:
        """Return what was evaluated, for a summary."""
        skipped = {split: list(reasons) for split, reasons in self.skipped.items() if reasons}
        found = {"name": self.name, "version": self.version, "limit": self.limit, "splits": self.splits}
        return {**found, "config": {"classes": list(self.classes)}, "skipped": skipped}

    def examples(self, split: str | None = None) -> list[Example]:
        """Return the images of a split. Raises ConfigError."""
        split = split or self.default_split
        if split not in self.images:
            raise ConfigError(f"{self.name} has no split {split!r}; it has {', '.join(self.images)}")
        if not self.images[split]:
            raise ImageError(f"no image in the {split} split of {self.name} can be read")
        return [self._example(split, image) for image in self.images[split]]

    def _example(self, split: str, image: KnownImage) -> Example:
        name = image.image.source.name
        return Example(
            f"{self.name}/{split}/{image.index}",
            {"image": name, "label": image.label},
            (Continuation(name, image.label),),
            (),
            image.label,
            (image,),
        )

    def bare_requests(self, example: Example) -> tuple[Request, ...]:
        """Return the hash of the image's file: equal ones are of equal images."""
        return (Continuation(example.source[0].digest, ""),)

    def measure(self, example: Example, answers: Sequence[Answer]) -> Measurement:
        """Return the metrics of [the most probable classes, (log-prob of the right one, whether it is first)]."""
        top, scored = answers
        if not isinstance(top, list) or not isinstance(scored, tuple):
            raise TypeError(f"{example.id} was not answered by classes and a log-prob")
        log_prob, is_first = scored
        values: dict[str, Any] = {"acc": float(is_first)}
        if len(self.classes) > TOP:
            values["acc_top5"] = float(example.gold in top)
        values["log_prob"] = to_json(log_prob, example.id)
        return Measurement(values, {"": top[0]})

    def aggregate(self, key: str, values: Sequence[Any]) -> float:
        """Return the mean of the values of a metric."""
        numbers = [float(value) for value in from_json(list(values))]
        return sum(numbers) / len(numbers)

    def standard_error(self, key: str, values: Sequence[Any], *, num_resamples: int = 0) -> float | None:
        """Return s / √n of a mean."""
        return metric_interval(from_json(list(values))).standard_error if len(values) > 1 else None


def load_image_task(
    folder: Path,
    classes: Sequence[str],
    *,
    aliases: Mapping[str, str] | None = None,
    limit: int | None = None,
    strict: bool = False,
) -> ImageTask:
    """Return the task of a folder of images; every image is read and decoded once, to know which can be.

    `classes`: those of the ensemble. `limit`: only the first images of each split. Raises ImageError (with `strict` for
    the first image that cannot be read), or ClassesError for a class that the ensemble lacks.
    """
    found: dict[str, list[KnownImage]] = {}
    skipped: dict[str, list[str]] = {}
    for split, images in read_splits(folder).items():
        images = images[:limit]
        _check_classes(folder, images, classes, aliases)
        found[split], skipped[split] = [], []
        for index, (image, digest, error) in enumerate(ahead(images, _try)):
            if error is None:
                label = known_as([image.label], aliases)[0]
                found[split].append(KnownImage(image, label, index, digest))
            elif strict:
                raise error
            else:
                skipped[split].append(str(error))
    return ImageTask(folder.resolve().name, tuple(classes), found, skipped, limit)


def _try(image: LabelledImage) -> tuple[LabelledImage, str, ImageError | None]:
    try:
        content = image.source.read()
        decode(content, image.source.name)
    except ImageError as error:
        return image, "", error
    return image, hashlib.sha256(content).hexdigest(), None


def _check_classes(
    folder: Path, images: Sequence[LabelledImage], classes: Sequence[str], aliases: Mapping[str, str] | None
) -> None:
    labels = sorted({image.label for image in images})
    unknown = [name for name, label in zip(labels, known_as(labels, aliases), strict=True) if label not in classes]
    if unknown:
        more = f" and {len(unknown) - 3:,} more" if len(unknown) > 3 else ""
        raise ClassesError(
            f"{folder} has images of {', '.join(map(repr, unknown[:3]))}{more}, which the ensemble lacks (its classes: "
            f"{', '.join(map(repr, classes[:3]))} ...); rename the folders, or give --aliases to ensembler create"
        )
