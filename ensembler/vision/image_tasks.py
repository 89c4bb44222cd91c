"""Labelled images on disk: folders of classes (class/xxx.png), or what `datasets` wrote by `save_to_disk`."""

from __future__ import annotations

import hashlib
import math
import os
import random
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ensembler.errors import ClassesError, ConfigError, ImageError
from ensembler.evaluation.documents import Answer, Document, Metric, from_json, to_json
from ensembler.evaluation.lm_eval_settings import check_limit
from ensembler.evaluation.statistics import metric_interval
from ensembler.extras import require
from ensembler.files import one_line
from ensembler.vision.heads import quoted
from ensembler.vision.images import SUFFIXES, ImageSource, ahead, decode, images_below, read_file

TEST = "test"  # the split that is reported, and the one of a folder that has none
SPLITS = {"train": "train", "validation": "validation", "val": "validation", TEST: TEST}  # by the names of folders
TOP = 5  # classes of an answer

Split = tuple[list[ImageSource], int]
"""The images of a split in the order of their paths or rows, and the number of other files there."""


def find_splits(folder: Path) -> dict[str, Callable[[], Split]]:
    """Return the splits of a data set by name; none is read before it is called.

    A folder has `test` and perhaps `train` and `validation` (or `val`) below it; one without any of them is all test.
    Raises ImageError for another layout, and when a split is read that has no image, or none of a class.
    """
    if not folder.is_dir():
        raise ImageError(f"there is no folder {folder}; give one with class/xxx.png, or one of `datasets`")
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _find_rows(folder)
    below = [entry.name for entry in _entries(folder) if entry.is_dir()]
    splits = [name for name in below if name in SPLITS and any(each.is_dir() for each in _entries(folder / name))]
    unknown = [name for name in below if name not in SPLITS]
    if TEST not in splits and (unknown or not splits):  # a class may be called `train`
        return {TEST: partial(_read_classes, folder)}
    if unknown:
        raise ImageError(
            f"{folder} has {unknown[0]!r} beside {TEST}; expected train, validation (or val) and test alone, each with "
            "CLASS/xxx.png"
        )
    _check_splits(folder, below, has_test=TEST in splits)
    return {SPLITS[name]: partial(_read_classes, folder / name) for name in below}


def _check_splits(folder: Path, names: Sequence[str], *, has_test: bool) -> None:
    """Raise ImageError without a test split, or where there are two for validation."""
    if not has_test:
        raise ImageError(
            f"{folder} has the splits {', '.join(names)}, and no images by class in {TEST}; expected {TEST}, and "
            "perhaps train and validation (or val); or give the folder of one split by itself"
        )
    if {"val", "validation"} <= set(names):
        raise ImageError(f"{folder} has both val and validation; keep one of them")


def _read_classes(folder: Path) -> Split:
    """Return the images of class/xxx.png; deeper folders belong to their class."""
    entries = _entries(folder)
    below = {entry.name: images_below(entry) for entry in entries if entry.is_dir()}
    images = [
        ImageSource.of_file(path, path.relative_to(folder).as_posix(), label)
        for label, (paths, _) in below.items()
        for path in paths
    ]
    if images:
        return images, len(entries) - len(below) + sum(num for _, num in below.values())
    if images_below(folder)[0]:
        raise ImageError(f"{folder} has images without classes; expected class/xxx.png")
    raise ImageError(f"{folder} holds no images; expected class/xxx.png, with files ending in {', '.join(SUFFIXES)}")


def _entries(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _find_rows(folder: Path) -> dict[str, Callable[[], Split]]:
    datasets = require("datasets", "eval")
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # pyarrow and datasets each raise what they like
        raise ImageError(f"{folder} cannot be read as a data set: {one_line(error)}") from error
    splits: Mapping[str, Any] = found if isinstance(found, Mapping) else {TEST: found}
    _check_splits(folder, list(splits), has_test=TEST in splits)
    return {
        SPLITS.get(name, name): partial(_read_rows, f"the {name} split of {folder}", rows)
        for name, rows in splits.items()
    }


def _read_rows(split: str, rows: Any) -> Split:
    """Return the images of a split, which is called `split` in errors."""
    datasets = require("datasets", "eval")
    images = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    labels = [name for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(images) != 1 or len(labels) != 1:
        raise ImageError(
            f"{split} has {len(images)} columns of images and {len(labels)} of class labels; expected one of each"
        )
    if not len(rows):
        raise ImageError(f"{split} is empty")
    names = rows.features[labels[0]].names
    raw = rows.cast_column(images[0], datasets.Image(decode=False))
    found = []
    for index, label in enumerate(rows[labels[0]]):
        if label is None or label < 0:
            raise ImageError(f"row {index} of {split} has no label")
        found.append(ImageSource(f"row {index}", partial(_read_row, raw, index, images[0]), names[label]))
    return found, 0


def _read_row(rows: Any, index: int, column: str) -> bytes:
    """Return the bytes of an image's file, which a row holds or has the path of."""
    image = rows[index][column]
    if image is None:
        raise ImageError(f"row {index} is empty")
    return bytes(image["bytes"]) if image["bytes"] is not None else read_file(Path(image["path"]), f"row {index}")


@dataclass(frozen=True, eq=False)
class ImageTask:
    """Labelled images of the splits that are used: a document for each that can be read.

    `images`: the documents by split; `skipped`: the faults of images that cannot be read, by split; `num_others`: the
    number of files that are no images.
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
        """Return the description of the test split as JSON: other splits may be used to choose α."""
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
    aliases: Mapping[str, str | list[str]] | None = None,
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
        numbers = list(range(len(found)))
        if limit is not None:  # the first images would be of the first classes alone
            random.Random(seed).shuffle(numbers)
            numbers = sorted(numbers[: math.ceil(len(found) * limit) if limit < 1 else int(limit)])
        drawn = [found[number] for number in numbers]
        labels = _class_names(folder, {image.label for image in drawn}, classes, aliases or {})
        images[split], skipped[split] = [], []
        for number, image in zip(numbers, ahead(drawn, _check), strict=True):
            if isinstance(image, ImageSource):
                label = labels[image.label]
                content = {"image": image.name, "label": label}
                images[split].append(Document(task, split, number, content, image.name, (image,), gold=label))
            elif strict:
                raise ImageError(f"{image}; mend it, or add --skip-bad") from image
            else:
                skipped[split].append(str(image))
    return ImageTask(task, tuple(classes), images, skipped, num_others, limit)


def _check(image: ImageSource) -> ImageSource | ImageError:
    """Return the image with the hash of its file, or the error where it cannot be read."""
    try:
        content = image.read()
        decode(content, image.name)
    except ImageError as error:
        return error
    return replace(image, digest=hashlib.sha256(content).hexdigest())


def _class_names(
    folder: Path, labels: Set[str], classes: Sequence[str], aliases: Mapping[str, str | list[str]]
) -> dict[str, str]:
    """Return the ensemble's classes by the labels of images. Raises ClassesError."""
    found = {}
    for label in sorted(labels):
        name = aliases.get(label, label)
        if isinstance(name, list) and label not in name:
            raise ClassesError(f"{folder} has images of {label!r}, which may be {quoted(name)}; rename its folder")
        found[label] = label if isinstance(name, list) else name
    unknown = [label for label, name in found.items() if name not in classes]
    if unknown:
        raise ClassesError(
            f"{folder} has images of {quoted(unknown)}, which the ensemble lacks (its classes: {quoted(classes)}); "
            "rename the folders, or give --aliases to ensembler create"
        )
    return found
