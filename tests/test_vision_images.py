"""Images of any mode within limits, data sets on disk, and work that is done ahead."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("PIL")

from PIL import Image
from vision_cases import CLASSES, random_images, save_images

from ensembler.errors import ImageError
from ensembler.vision import images
from ensembler.vision.datasets import read_splits
from ensembler.vision.images import ImageFile, decode, find_images
from ensembler.vision.loader import ahead

RAMP = np.arange(64 * 64).reshape(64, 64)


def encoded(image: Any, kind: str = "png", **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def pixels(content: bytes) -> np.ndarray:
    image = decode(content, "x")
    assert image.mode == "RGB"
    return np.asarray(image)


def test_greyscale_is_three_equal_channels() -> None:
    grey = (RAMP % 256).astype(np.uint8)
    found = pixels(encoded(Image.fromarray(grey)))
    assert all((found[..., channel] == grey).all() for channel in range(3))


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_16_bits_become_8_and_not_white(kind: str) -> None:
    deep = (RAMP * 16).astype(np.uint16)
    found = pixels(encoded(Image.fromarray(deep), kind))
    assert (found[..., 0] == np.rint(deep / 257)).all()
    assert found.max() == 255
    assert found.min() == 0
    assert 120 < found.mean() < 135


def test_transparency_is_dropped() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    assert (pixels(encoded(Image.fromarray(colours, "RGBA"))) == colours[..., :3]).all()
    grey = np.random.default_rng(1).integers(0, 256, (20, 30, 2), dtype=np.uint8)
    assert (pixels(encoded(Image.fromarray(grey, "LA")))[..., 2] == grey[..., 0]).all()


@pytest.mark.parametrize("mode", ["1", "P", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(mode: str) -> None:
    image = random_images(1)[0].convert(mode)
    kind = "tiff" if mode in ("CMYK", "YCbCr") else "png"
    assert (pixels(encoded(image, kind)) == np.asarray(image.convert("RGB"))).all()


def test_of_several_frames_the_first_counts() -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    content = encoded(frames[0], "gif", save_all=True, append_images=frames[1:])
    assert tuple(pixels(content)[0, 0]) == (255, 0, 0)


def test_what_is_beyond_the_limits_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    decode(encoded(Image.new("RGB", (40, 25))), "fits")
    wide, long = (encoded(Image.new("RGB", size)) for size in ((40, 26), (404, 2)))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("it was decoded"))
    with pytest.raises(ImageError, match=r"^wide has 40 × 26 pixels; at most 1,000 are read"):
        decode(wide, "wide")
    with pytest.raises(ImageError, match=r"^long has 404 × 2 pixels; sides may differ by a factor of 100"):
        decode(long, "long")


def test_a_picture_of_billions_of_pixels_costs_nothing() -> None:
    """A header alone can claim them."""
    content = encoded(Image.new("1", (8, 8)), "bmp")
    claimed = bytearray(content)
    claimed[18:22] = claimed[22:26] = (60_000).to_bytes(4, "little")
    with pytest.raises(ImageError, match=r"^bomb (is too large|has 60,000 × 60,000 pixels)"):
        decode(bytes(claimed), "bomb")


def test_a_large_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(encoded(Image.new("RGB", (20, 20))))
    monkeypatch.setattr(images, "MAX_BYTES", 10)
    with pytest.raises(ImageError, match=r"^a.png has [\d,]+ bytes; at most 10 are read"):
        ImageFile(tmp_path / "a.png", "a.png").read()


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif"])
def test_damaged_files_are_named_wherever_they_end(kind: str) -> None:
    content = encoded(random_images(1)[0], kind)
    for end in (0, 3, len(content) // 4, len(content) // 2, len(content) - 60):
        with pytest.raises(ImageError, match=r"^b\.x (is damaged|is no image)"):
            decode(content[:end], "b.x")


def test_random_bytes_are_no_image() -> None:
    generator = np.random.default_rng(0)
    for start in (b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM", b"II*\x00", b"RIFF    WEBP"):
        for _ in range(20):
            with pytest.raises(ImageError):
                decode(start + generator.bytes(200), "noise")


def test_pixels_that_are_no_8_or_16_bits_are_refused() -> None:
    with pytest.raises(ImageError, match="floating-point"):
        decode(encoded(Image.fromarray(RAMP.astype(np.float32)), "tiff"), "x")
    with pytest.raises(ImageError, match="pixels from 0 to 409500; expected 8 or 16"):
        decode(encoded(Image.fromarray((RAMP * 100).astype(np.int32)), "tiff"), "x")


def test_images_are_found_by_name_and_below_folders(tmp_path: Path) -> None:
    save_images(tmp_path / "set", 2, classes=("a", "b"))
    (tmp_path / "set" / "notes.txt").write_text("no image")
    (tmp_path / "set" / ".hidden").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "set" / ".hidden" / "x.png")
    found = find_images([tmp_path / "set" / "b" / "001.png", tmp_path / "set"])
    assert [source.path.relative_to(tmp_path / "set").as_posix() for source in found] == [
        "b/001.png",
        *(f"{name}/{number:03}.png" for name in "ab" for number in (0, 1)),
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match=r"empty holds no images; expected files ending in .bmp"):
        find_images([tmp_path / "empty"])
    with pytest.raises(ImageError, match=r"there is no file or folder .*nothing.png"):
        find_images([tmp_path / "nothing.png"])


def test_class_folders_with_and_without_splits(tmp_path: Path) -> None:
    save_images(tmp_path / "plain", 2)
    found = read_splits(tmp_path / "plain")
    assert list(found) == ["test"]
    assert [(one.label, one.source.name) for one in found["test"]][:3] == [
        ("bee", "bee/000.png"),
        ("bee", "bee/001.png"),
        ("cat", "cat/000.png"),
    ]
    for split, per_class in (("validation", 1), ("test", 3)):
        save_images(tmp_path / "parted" / split, per_class)
    parted = read_splits(tmp_path / "parted")
    assert {split: len(images) for split, images in parted.items()} == {"validation": 7, "test": 21}


def test_a_folder_of_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "fine": datasets.ClassLabel(names=list(CLASSES))})
    pictures = random_images(5)
    rows = datasets.Dataset.from_dict({"img": pictures, "fine": [0, 3, 3, 1, 6]}, features=features)
    datasets.DatasetDict({"test": rows, "validation": rows.select([0])}).save_to_disk(tmp_path / "set")
    found = read_splits(tmp_path / "set")
    assert [one.label for one in found["test"]] == ["cat", "bee", "bee", "dog", "pig"]
    for one, picture in zip(found["test"], pictures, strict=True):
        assert (np.asarray(decode(one.source.read(), "x")) == np.asarray(picture)).all()
    assert len(found["validation"]) == 1
    rows.save_to_disk(tmp_path / "one")
    assert [one.source.name for one in read_splits(tmp_path / "one")["test"]][-1] == "row 4"
    rows.remove_columns("fine").save_to_disk(tmp_path / "bare")
    with pytest.raises(ImageError, match="has 1 columns of images and 0 of class labels"):
        read_splits(tmp_path / "bare")


def test_folders_without_images_or_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="there is no folder"):
        read_splits(tmp_path / "nothing")
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    with pytest.raises(ImageError, match=r"empty holds no images; expected class/xxx.png"):
        read_splits(tmp_path / "empty")
    Image.new("RGB", (20, 20)).save(tmp_path / "empty" / "x.png")
    with pytest.raises(ImageError, match="has images without classes"):
        read_splits(tmp_path / "empty")


# -- work ahead -------------------------------------------------------------------------------------------------------


def test_work_ahead_keeps_the_order_and_its_bound() -> None:
    begun: list[int] = []
    lock = threading.Lock()

    def work(item: int) -> int:
        with lock:
            begun.append(item)
        return item * item

    for taken, result in enumerate(ahead(range(50), work, num_workers=3, num_ahead=2)):
        assert result == taken * taken
        assert len(begun) <= taken + 6
    assert sorted(begun) == list(range(50))
    assert list(ahead([], work)) == []


def test_an_error_comes_in_its_place_and_ends_the_work() -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 4:
            raise ImageError("four")
        return item

    results = ahead(range(100), work, num_workers=2, num_ahead=1)
    assert [next(results) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ImageError, match="four"):
        next(results)
    assert max(begun) < 10
