"""Labelled images on disk: folders of classes (class/xxx.png), or what `datasets` wrote by `save_to_disk`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ensembler.errors import ImageError
from ensembler.extras import require
from ensembler.sources import one_line
from ensembler.vision.images import SUFFIXES, ImageSource, image_file, images_below, read_file

TEST = "test"  # the split that is reported, and the one of a folder that has none
SPLITS = {"train": "train", "validation": "validation", "val": "validation", TEST: TEST}  # by the names of folders


Split = tuple[list[ImageSource], int]
"""The images of a split in the order of their paths or rows, and the number of other files there."""


def find_splits(folder: Path) -> dict[str, Callable[[], Split]]:
    """Return the splits of a data set by name; none is read before it is called.

    A folder has `test` and perhaps `train` and `validation` (or `val`) below it; one without any of them is all test.
    Raises ImageError for another layout. What reads a split does so where it has no image, or none of a class.
    """
    if not folder.is_dir():
        raise ImageError(f"there is no folder {folder}; give one with class/xxx.png, or one of `datasets`")
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _find_rows(folder)
    below = [entry.name for entry in _entries(folder) if entry.is_dir()]
    parted = [name for name in below if name in SPLITS and any(each.is_dir() for each in _entries(folder / name))]
    unknown = [name for name in below if name not in SPLITS]
    if TEST not in parted and (unknown or not parted):  # a class may be called `train`
        return {TEST: partial(_read_classes, folder)}
    if unknown:
        raise ImageError(
            f"{folder} has {unknown[0]!r} beside {TEST}; expected train, validation (or val) and test alone, each with "
            "CLASS/xxx.png"
        )
    return _by_name(folder, below, TEST in parted, lambda name: _read_classes(folder / name))


def _by_name(
    folder: Path, names: list[str], has_test: bool, read: Callable[[str], Split]
) -> dict[str, Callable[[], Split]]:
    """Splits by what they are, whatever they are called. Raises ImageError without a test split, or for two of one."""
    if not has_test:
        raise ImageError(
            f"{folder} has the splits {', '.join(names)}, and no images by class in {TEST}; expected {TEST}, and "
            "perhaps train and validation (or val); or give the folder of one split by itself"
        )
    if {"val", "validation"} <= set(names):
        raise ImageError(f"{folder} has both val and validation; keep one of them")
    return {SPLITS.get(name, name): partial(read, name) for name in names}


def _read_classes(folder: Path) -> Split:
    """The images of class/xxx.png; deeper folders belong to their class."""
    entries = _entries(folder)
    below = {entry.name: images_below(entry) for entry in entries if entry.is_dir()}
    images = [
        image_file(path, path.relative_to(folder).as_posix(), label)
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
    return _by_name(folder, list(splits), TEST in splits, lambda name: _read_rows(folder, name, splits[name]))


def _read_rows(folder: Path, split: str, rows: Any) -> Split:
    datasets = require("datasets", "eval")
    images = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    labels = [name for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(images) != 1 or len(labels) != 1:
        raise ImageError(
            f"the {split} split of {folder} has {len(images)} columns of images and {len(labels)} of class labels; "
            "expected one of each"
        )
    if not len(rows):
        raise ImageError(f"the {split} split of {folder} is empty")
    names = rows.features[labels[0]].names
    raw = rows.cast_column(images[0], datasets.Image(decode=False))
    found = []
    for index, label in enumerate(rows[labels[0]]):
        if label is None or label < 0:
            raise ImageError(f"row {index} of the {split} split of {folder} has no label")
        name = f"row {index}"
        found.append(ImageSource(name, partial(_read_row, raw, index, images[0], name), names[label]))
    return found, 0


def _read_row(rows: Any, index: int, column: str, name: str) -> bytes:
    """The bytes of an image's file, which a row holds or has the path of."""
    image = rows[index][column]
    if image is None:
        raise ImageError(f"{name} is empty")
    return read_file(Path(image["path"]), name) if image["bytes"] is None else bytes(image["bytes"])
