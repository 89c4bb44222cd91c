"""Read images from files: any mode as RGB, within limits; errors name the image."""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ensembler.errors import ImageError
from ensembler.extras import require
from ensembler.files import one_line

Item = TypeVar("Item")
Result = TypeVar("Result")

NUM_WORKERS = min(4, os.cpu_count() or 1)


def ahead(
    items: Iterable[Item], work: Callable[[Item], Result], *, num_workers: int = NUM_WORKERS, num_ahead: int = 2
) -> Iterator[Result]:
    """Yield work(item) in the order of the items, at most `num_workers` + `num_ahead` of them begun and not yet taken.

    What `work` raises is raised where its result would have been taken; no item behind it is begun then.
    """
    rest = iter(items)
    executor = ThreadPoolExecutor(num_workers)
    try:
        waiting = deque(executor.submit(work, item) for item in islice(rest, num_workers + num_ahead))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(executor.submit(work, item) for item in islice(rest, 1))
            yield result
    finally:
        executor.shutdown(cancel_futures=True)


MAX_PIXELS = 100_000_000  # a picture of a camera has 12 to 60 million; decoded, this is 300 MB
MAX_BYTES = 2**28
MAX_RATIO = 100  # of the sides: a processor scales the shorter one up to its input size, and the other with it
SUFFIXES = (".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class ImageSource:
    """An image to read: its name, for people, and a function that returns the bytes of its file or raises ImageError.

    `label`: the name of its class, as its data set has it. `digest`: the SHA-256 of its file, once that was read.
    """

    name: str
    read: Callable[[], bytes] = field(repr=False)  # which would tell an address, another in every process
    label: str = ""
    digest: str = ""

    @classmethod
    def of_file(cls, path: Path, name: str, label: str = "") -> ImageSource:
        """Return the source of an image in a file; `name` is its path as it was given, or within its folder."""
        return cls(name, partial(read_file, path, name), label)

    def open(self) -> Any:
        """Return the image as Pillow's RGB, decoded. Raises ImageError."""
        return decode(self.read(), self.name)


def read_file(path: Path, name: str) -> bytes:
    """Return the bytes of an image's file. Raises ImageError, which calls it `name`."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ImageError(f"{name} has {size:,} bytes; at most {MAX_BYTES:,} are read")
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"{name} cannot be read: {error.strerror}") from error


def decode(content: bytes, name: str) -> Any:
    """Return the image in the bytes of a file as Pillow's RGB; `name` is for errors.

    It is turned as its EXIF orientation says. Greyscale becomes three equal channels, greyscale of 16 bits becomes 8
    (divided by 257), transparency is dropped, of several frames the first counts: as in the loaders that image
    classifiers are trained with, but for the 16 bits, which these cut off. Raises ImageError for what is no image,
    damaged, or beyond the limits.
    """
    module = require("PIL.Image", "vision")
    try:
        with module.open(io.BytesIO(content)) as image:
            width, height = image.size
            size = f"{name} has {width:,} × {height:,} pixels"
            if width * height > MAX_PIXELS:
                raise ImageError(f"{size}; at most {MAX_PIXELS:,} are read")
            if max(image.size) > MAX_RATIO * min(image.size):
                raise ImageError(f"{size}; sides may differ by a factor of {MAX_RATIO}")
            image.load()
            require("PIL.ImageOps", "vision").exif_transpose(image, in_place=True)
            return _eight_bits(image, name).convert("RGB")
    except ImageError:
        raise
    except module.UnidentifiedImageError as error:
        raise ImageError(f"{name} is no image that Pillow knows") from error
    except module.DecompressionBombError as error:
        raise ImageError(f"{name} is too large: {one_line(error)}") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error ... for damaged files
        raise ImageError(f"{name} is damaged: {one_line(error)}") from error


def _eight_bits(image: Any, name: str) -> Any:
    """Return greyscale of more than 8 bits as 8: Pillow's own conversion would make white of all above 255.

    In mode I, with 32 bits a pixel, 255 is white, except in a PGM, which Pillow spreads over 16 bits.
    """
    if image.mode == "F":
        raise ImageError(f"{name} has floating-point pixels; expected 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    largest, step = (0xFFFF, 257) if image.mode.startswith("I;16") or image.format == "PPM" else (0xFF, 1)
    values = np.asarray(image, dtype=np.int64)
    if values.min() < 0 or values.max() > largest:
        raise ImageError(f"{name} has pixels from {values.min()} to {values.max()}; expected 8 or 16 bits")
    return require("PIL.Image", "vision").fromarray(np.rint(values / step).astype(np.uint8))


def find_images(paths: Iterable[Path]) -> tuple[list[ImageSource], int]:
    """Return the images that `paths` name, in their folders by path, and the number of other files in these folders.

    Raises ImageError.
    """
    sources: list[ImageSource] = []
    num_others = 0
    for path in paths:
        if not path.is_dir() and not path.is_file():
            raise ImageError(f"there is no file or folder {path}")
        images, others = images_below(path) if path.is_dir() else ([path], 0)
        if not images:
            raise ImageError(f"{path} holds no images; expected files ending in {', '.join(SUFFIXES)}")
        sources += [ImageSource.of_file(image, str(image)) for image in images]
        num_others += others
    return sources, num_others


def images_below(folder: Path) -> tuple[list[Path], int]:
    """Return the images in a folder and those below it, by path, and the number of other files there.

    Hidden files are left out. A link that leads nowhere is an image by its name, which then cannot be read.
    """
    files = sorted(
        path
        for path in folder.rglob("*")
        if not path.is_dir() and not any(name.startswith(".") for name in path.relative_to(folder).parts)
    )
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    return images, len(files) - len(images)
