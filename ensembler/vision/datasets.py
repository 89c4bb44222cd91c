"""Labelled images on disk: folders of classes (class/xxx.png), or what `datasets` wrote by `save_to_disk`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensembler.errors import ImageError
from ensembler.extras import require
from ensembler.sources import one_line
from ensembler.vision.images import SUFFIXES, ImageFile, ImageSource, images_below

TEST = "test"  # the split that is reported, and the one of a folder that has none
SPLITS = {"train": "train", "validation": "validation", "val": "validation", TEST: TEST}  # by the names of folders


@dataclass(frozen=True)
class LabelledImage:
    """An image and the name of its class as the data set has it."""

    source: ImageSource
    label: str


@dataclass(frozen=True)
class LabelledImages:
    """The images of a split in the order of their paths or rows; `num_others`: how many other files lie there."""

    images: tuple[LabelledImage, ...]
    num_others: int = 0


ReadSplit = Callable[[], LabelledImages]


@dataclass(frozen=True)
class _Row:
    """A row of a data set of `datasets`, whose image is kept as bytes or as the path of a file."""

    rows: Any
    index: int
    column: str
    name: str

    def read(self) -> bytes:
        """Return the bytes of the image's file. Raises ImageError."""
        image = self.rows[self.index][self.column]
        if image is None:
            raise ImageError(f"{self.name} is empty")
        if image["bytes"] is not None:
            return bytes(image["bytes"])
        return ImageFile(Path(image["path"]), self.name).read()


def find_splits(folder: Path) -> dict[str, ReadSplit]:
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
        return {TEST: _reader(folder)}
    if unknown:
        raise ImageError(
            f"{folder} has {unknown[0]!r} beside {TEST}; expected train, validation (or val) and test alone, each with "
            "CLASS/xxx.png"
        )
    return {split: _reader(folder / name) for split, name in _named(folder, below, TEST in parted).items()}


def _named(folder: Path, names: list[str], has_test: bool) -> dict[str, str]:
    """What the splits are called here, by what they are. Raises ImageError without a test split, or for two of one."""
    if not has_test:
        raise ImageError(
            f"{folder} has the splits {', '.join(names)}, and no images by class in {TEST}; expected {TEST}, and "
            "perhaps train and validation (or val); or give the folder of one split by itself"
        )
    if {"val", "validation"} <= set(names):
        raise ImageError(f"{folder} has both val and validation; keep one of them")
    return {SPLITS.get(name, name): name for name in names}


def _reader(folder: Path) -> ReadSplit:
    return lambda: _read_classes(folder)


def _read_classes(folder: Path) -> LabelledImages:
    """The images of class/xxx.png; deeper folders belong to their class."""
    found: list[LabelledImage] = []
    num_others = sum(not entry.is_dir() for entry in _entries(folder))
    for entry in _entries(folder):
        if entry.is_dir():
            images, num_others_below = images_below(entry)
            found += [
                LabelledImage(ImageFile(path, path.relative_to(folder).as_posix()), entry.name) for path in images
            ]
            num_others += num_others_below
    if found:
        return LabelledImages(tuple(found), num_others)
    if images_below(folder)[0]:
        raise ImageError(f"{folder} has images without classes; expected class/xxx.png")
    raise ImageError(f"{folder} holds no images; expected class/xxx.png, with files ending in {', '.join(SUFFIXES)}")


def _entries(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _find_rows(folder: Path) -> dict[str, ReadSplit]:
    datasets = require("datasets", "eval")
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # pyarrow and datasets each raise what they like
        raise ImageError(f"{folder} cannot be read as a data set: {one_line(error)}") from error
    splits: Mapping[str, Any] = found if isinstance(found, Mapping) else {TEST: found}
    named = _named(folder, list(splits), TEST in splits)
    return {split: _row_reader(folder, name, splits[name], datasets) for split, name in named.items()}


def _row_reader(folder: Path, split: str, rows: Any, datasets: Any) -> ReadSplit:
    return lambda: LabelledImages(tuple(_rows(folder, split, rows, datasets)))


def _rows(folder: Path, split: str, rows: Any, datasets: Any) -> Iterator[LabelledImage]:
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
    for index, label in enumerate(rows[labels[0]]):
        if label is None or label < 0:
            raise ImageError(f"row {index} of the {split} split of {folder} has no label")
        yield LabelledImage(_Row(raw, index, images[0], f"row {index}"), names[label])
