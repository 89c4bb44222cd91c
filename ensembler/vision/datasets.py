"""Labelled images on disk: folders of classes (class/xxx.png), or what `datasets` wrote by `save_to_disk`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensembler.errors import ImageError
from ensembler.extras import require
from ensembler.sources import one_line
from ensembler.vision.images import SUFFIXES, ImageFile, ImageSource, images_below

SPLITS = ("train", "validation", "test")
_ALONE = "test"  # the split of a folder that has none


@dataclass(frozen=True)
class LabelledImage:
    """An image and the name of its class as the data set has it."""

    source: ImageSource
    label: str


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


def read_splits(folder: Path) -> dict[str, list[LabelledImage]]:
    """Return the images of a data set by split, in the order of their paths or rows.

    A folder with `test` in it has the splits that it has of train, validation and test; any other is all test. Raises
    ImageError where there is no image, or none of a class.
    """
    if not folder.is_dir():
        raise ImageError(f"there is no folder {folder}; give one with class/xxx.png, or one of `datasets`")
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _read_rows(folder)
    has_splits = any(entry.is_dir() for entry in _entries(folder / _ALONE))
    if not has_splits:
        return {_ALONE: _read_classes(folder)}
    return {name: _read_classes(folder / name) for name in SPLITS if (folder / name).is_dir()}


def _read_classes(folder: Path) -> list[LabelledImage]:
    """The images of class/xxx.png; deeper folders belong to their class."""
    classes = [entry for entry in _entries(folder) if entry.is_dir()]
    found = [
        LabelledImage(ImageFile(path, path.relative_to(folder).as_posix()), entry.name)
        for entry in classes
        for path in images_below(entry)
    ]
    if found:
        return found
    if images_below(folder):
        raise ImageError(f"{folder} has images without classes; expected class/xxx.png")
    raise ImageError(f"{folder} holds no images; expected class/xxx.png, with files ending in {', '.join(SUFFIXES)}")


def _entries(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _read_rows(folder: Path) -> dict[str, list[LabelledImage]]:
    datasets = require("datasets", "eval")
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # pyarrow and datasets each raise what they like
        raise ImageError(f"{folder} cannot be read as a data set: {one_line(error)}") from error
    splits: Mapping[str, Any] = found if isinstance(found, Mapping) else {_ALONE: found}
    return {name: list(_rows(folder, name, rows, datasets)) for name, rows in splits.items()}


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
