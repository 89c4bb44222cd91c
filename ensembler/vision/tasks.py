"""Labelled images as a task of a sweep: which class is it? Accuracy, top-5 accuracy, log-prob of the right class."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensembler.class_names import some
from ensembler.errors import ClassesError, ConfigError, ImageError
from ensembler.evaluation.examples import Answer, Continuation, Example, Measurement, Metric, Request
from ensembler.evaluation.metric_values import from_json, to_json
from ensembler.evaluation.statistics import metric_interval
from ensembler.evaluation.task_loading import check_counts
from ensembler.vision.classes import known_as
from ensembler.vision.datasets import SPLITS, TEST, LabelledImage, find_splits
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
    """Labelled images of the splits that are used, of which those that can be read are asked about.

    `skipped`: why others cannot be read, by split and in their order; `num_others`: how many files are no images.
    """

    name: str
    classes: tuple[str, ...]
    images: Mapping[str, Sequence[KnownImage]]
    skipped: Mapping[str, Sequence[str]]
    num_others: int = 0
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
        """The number of images that can be read, of each split that is used."""
        return {split: len(images) for split, images in self.images.items()}

    @property
    def default_split(self) -> str:
        """The split that is reported."""
        return TEST

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
        split = SPLITS.get(split or TEST, split or TEST)
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
    validation: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    strict: bool = False,
) -> ImageTask:
    """Return the task of a folder of images: every image that is used is read and decoded once, to know which can be.

    `classes`: those of the ensemble. `validation`: another split that is used, beside test; a number of images is of
    test. `limit`: only so many images of each split, drawn with `seed`: a smaller limit draws some of the same. Raises
    ConfigError for a split that is not there, ImageError (with `strict` for the first image that cannot be read), or
    ClassesError for a class that the ensemble lacks.
    """
    check_counts(None, limit)
    name = Path(os.path.abspath(folder)).name  # of a link itself: data/cars may lead to store/3f8a
    splits = find_splits(folder)
    others = () if validation is None or validation.isdecimal() else (validation,)
    found: dict[str, list[KnownImage]] = {}
    skipped: dict[str, list[str]] = {}
    num_others = 0
    for split in dict.fromkeys((TEST, *others)):
        split = _split(name, split, splits)
        labelled = splits[split]()
        num_others += labelled.num_others
        drawn = _draw(labelled.images, limit, seed)
        _check_classes(folder, [image for _, image in drawn], classes, aliases)
        found[split], skipped[split] = [], []
        for index, image, digest, error in ahead(drawn, _try):
            if error is None:
                label = known_as([image.label], aliases)[0]
                found[split].append(KnownImage(image, label, index, digest))
            elif strict:
                raise error
            else:
                skipped[split].append(str(error))
    return ImageTask(name, tuple(classes), found, skipped, num_others, limit)


def _split(task: str, split: str, splits: Iterable[str]) -> str:
    """What a split is called here. Raises ConfigError."""
    known = SPLITS.get(split, split)
    if known not in splits:
        raise ConfigError(f"{task} has no split {split!r}; it has {', '.join(splits)}")
    return known


def _draw(images: Sequence[LabelledImage], limit: int | None, seed: int) -> list[tuple[int, LabelledImage]]:
    """Images with their places in the split, in their order. The first of them would be of the first classes alone."""
    places = list(range(len(images)))
    if limit is not None:
        random.Random(seed).shuffle(places)
    return [(place, images[place]) for place in sorted(places[:limit])]


def _try(placed: tuple[int, LabelledImage]) -> tuple[int, LabelledImage, str, ImageError | None]:
    index, image = placed
    try:
        content = image.source.read()
        decode(content, image.source.name)
    except ImageError as error:
        return index, image, "", error
    return index, image, hashlib.sha256(content).hexdigest(), None


def _check_classes(
    folder: Path, images: Sequence[LabelledImage], classes: Sequence[str], aliases: Mapping[str, str] | None
) -> None:
    labels = sorted({image.label for image in images})
    unknown = [name for name, label in zip(labels, known_as(labels, aliases), strict=True) if label not in classes]
    if unknown:
        raise ClassesError(
            f"{folder} has images of {some(unknown)}, which the ensemble lacks (its classes: {some(classes)}); rename "
            "the folders, or give --aliases to ensembler create"
        )
