"""Labelled images as a task: which class is it? Accuracy, top-5 accuracy, log-prob of the right class."""

from __future__ import annotations

import hashlib
import math
import os
import random
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ensembler.class_names import some
from ensembler.errors import ClassesError, ConfigError, ImageError
from ensembler.evaluation.documents import Answer, Document, Metric
from ensembler.evaluation.metric_values import from_json, to_json
from ensembler.evaluation.prompt_settings import check_limit
from ensembler.evaluation.statistics import metric_interval
from ensembler.vision.datasets import SPLITS, TEST, find_splits
from ensembler.vision.images import ImageSource, decode
from ensembler.vision.loader import ahead

TOP = 5  # classes of an answer


@dataclass(frozen=True, eq=False)
class ImageTask:
    """Labelled images of the splits that are used: a document for each that can be read. Implements `Task`.

    `images`: the documents by split; `skipped`: why others cannot be read, by split and in their order; `num_others`:
    how many files are no images.
    """

    name: str
    classes: tuple[str, ...]
    images: Mapping[str, list[Document]]
    skipped: Mapping[str, list[str]]
    num_others: int = 0
    limit: float | None = None
    version = "1"  # of the metrics
    default_split = TEST

    @property
    def splits(self) -> dict[str, int]:
        """The number of images that can be read, of each split that is used."""
        return {split: len(images) for split, images in self.images.items()}

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Accuracy, top-5 accuracy where there are more classes, and the mean log-prob of the right class in nats."""
        keys = ["acc", *(["acc_top5"] if len(self.classes) > TOP else []), "log_prob"]
        return tuple(Metric(key, key, "", True, True) for key in keys)

    @property
    def notes(self) -> tuple[str, ...]:
        """The number of images that were left out."""
        num_skipped = sum(map(len, self.skipped.values()))
        return (f"{num_skipped:,} images that cannot be read left out",) if num_skipped else ()

    def describe(self) -> dict[str, Any]:
        """Return what is reported, as JSON: images of another split may choose α later."""
        found = {"name": self.name, "version": self.version, "limit": self.limit, "num_images": self.splits[TEST]}
        return {**found, "config": {"classes": list(self.classes)}, "skipped": self.skipped[TEST]}

    def documents(self, split: str | None = None) -> list[Document]:
        """Return the images of a split. Raises ConfigError, or ImageError where none of them can be read."""
        split = SPLITS.get(split or TEST, split or TEST)
        if split not in self.images:
            raise ConfigError(f"{self.name} has no split {split!r}; it has {', '.join(self.images)}")
        if not self.images[split]:
            raise ImageError(f"no image in the {split} split of {self.name} can be read")
        return self.images[split]

    def identity(self, document: Document) -> str:
        """Return the hash of the image's file."""
        return str(document.requests[0].digest)

    def measure(self, document: Document, answers: Answer) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the values by metric, and the class that was answered.

        `answers`: [the most probable classes, [log-prob of the right one, is it the first]].
        """
        top, (log_prob, is_first) = answers
        values = {"acc": float(is_first), "acc_top5": float(document.gold in top)}
        values["log_prob"] = to_json(log_prob, document.name)
        return {metric.key: values[metric.key] for metric in self.metrics}, {"": top[0]}

    def aggregate(self, key: str, values: Sequence[Any]) -> float:
        """Return the mean of the values of a metric."""
        return float(sum(from_json(list(values)))) / len(values)

    def standard_error(self, key: str, values: Sequence[Any]) -> float | None:
        """Return s / √n of a mean; None of fewer than two values."""
        return metric_interval(from_json(list(values))).standard_error if len(values) > 1 else None


def load_image_task(
    folder: Path,
    classes: Sequence[str],
    *,
    aliases: Mapping[str, str] | None = None,
    validation: str | None = None,
    limit: float | None = None,
    seed: int = 0,
    strict: bool = False,
) -> ImageTask:
    """Return the task of a folder of images: every image that is used is read and decoded once, to know which can be.

    `classes`: those of the ensemble. `validation`: another split that is used, beside test; a number of images is of
    test. `limit`: only so many images of each split, below 1 a share of them, drawn with `seed`: a smaller limit draws
    some of the same. Raises ConfigError for a split that is not there, ImageError (with `strict` for the first image
    that cannot be read), or ClassesError for a class that the ensemble lacks.
    """
    check_limit(limit)
    task = Path(os.path.abspath(folder)).name  # of a link itself: data/cars may lead to store/3f8a
    splits = find_splits(folder)
    images: dict[str, list[Document]] = {}
    skipped: dict[str, list[str]] = {}
    num_others = 0
    wanted = [TEST] if validation is None or validation.isdecimal() else [TEST, validation]
    for given in dict.fromkeys(wanted):
        split = SPLITS.get(given, given)
        if split not in splits:
            raise ConfigError(f"{task} has no split {given!r}; it has {', '.join(splits)}")
        found, others = splits[split]()
        num_others += others
        places = list(range(len(found)))
        if limit is not None:  # the first images would be of the first classes alone
            random.Random(seed).shuffle(places)
            places = sorted(places[: math.ceil(len(found) * limit) if limit < 1 else int(limit)])
        drawn = [found[place] for place in places]
        names = _class_names(folder, {image.label for image in drawn}, classes, aliases or {})
        images[split], skipped[split] = [], []
        for place, image in zip(places, ahead(drawn, _check), strict=True):
            if isinstance(image, ImageSource):
                label = names[image.label]
                content = {"image": image.name, "label": label}
                images[split].append(Document(task, split, place, content, image.name, (image,), gold=label))
            elif strict:
                raise image
            else:
                skipped[split].append(str(image))
    return ImageTask(task, tuple(classes), images, skipped, num_others, limit)


def _check(image: ImageSource) -> ImageSource | ImageError:
    """The image with the hash of its file, or why it cannot be read."""
    try:
        content = image.read()
        decode(content, image.name)
    except ImageError as error:
        return error
    return replace(image, digest=hashlib.sha256(content).hexdigest())


def _class_names(folder: Path, labels: Set[str], classes: Sequence[str], aliases: Mapping[str, str]) -> dict[str, str]:
    """The ensemble's classes by the labels of images. Raises ClassesError."""
    found = {label: aliases.get(label, label) for label in sorted(labels)}
    unknown = [label for label, name in found.items() if name not in classes]
    if unknown:
        raise ClassesError(
            f"{folder} has images of {some(unknown)}, which the ensemble lacks (its classes: {some(classes)}); rename "
            "the folders, or give --aliases to ensembler create"
        )
    return found
