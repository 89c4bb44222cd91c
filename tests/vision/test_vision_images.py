"""Images of any mode within limits, data sets on disk, and work that is done ahead."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("PIL")

from helpers.vision_cases import CLASSES, random_images, save_images
from PIL import ExifTags, Image, ImageOps

from ensembler.errors import ConfigError, ImageError
from ensembler.vision import images
from ensembler.vision.image_tasks import find_splits, load_image_task
from ensembler.vision.images import ImageSource, ahead, decode, find_images

RAMP = np.arange(64 * 64).reshape(64, 64)


def read_splits(folder: Path) -> dict[str, list[ImageSource]]:
    return {split: read()[0] for split, read in find_splits(folder).items()}


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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_as_their_exif_says(orientation: int) -> None:
    """As in the loaders of transformers and datasets."""
    image = random_images(1)[0]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    content = encoded(image, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert (pixels(content) == np.asarray(expected)).all()
    assert (pixels(content).shape == np.asarray(image).shape) == (orientation < 5)


def test_pixels_of_32_bits_that_hold_8_are_not_black() -> None:
    values = (RAMP % 256).astype(np.int32)
    assert (pixels(encoded(Image.fromarray(values), "tiff"))[..., 0] == values).all()
    with pytest.raises(ImageError, match="pixels from 0 to 256; expected 8 or 16"):
        decode(encoded(Image.fromarray(values + (RAMP == 255)), "tiff"), "x")


def test_a_pgm_of_16_bits_is_one_of_8() -> None:
    """Pillow opens it with pixels of 32 bits."""
    deep = (RAMP * 16).astype(">u2")
    content = b"P5 64 64 65535\n" + deep.tobytes()
    assert (pixels(content)[..., 0] == np.rint(deep / 257)).all()


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
        ImageSource.of_file(tmp_path / "a.png", "a.png").read()


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
    found, num_others = find_images([tmp_path / "set" / "b" / "001.png", tmp_path / "set"])
    assert num_others == 1
    assert [Path(source.name).relative_to(tmp_path / "set").as_posix() for source in found] == [
        "b/001.png",
        *(f"{name}/{number:03}.png" for name in "ab" for number in (0, 1)),
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match=r"empty holds no images; expected files ending in .bmp"):
        find_images([tmp_path / "empty"])
    with pytest.raises(ImageError, match=r"there is no file or folder .*nothing.png"):
        find_images([tmp_path / "nothing.png"])


def test_links_that_lead_nowhere_and_other_endings_of_jpegs_are_images(tmp_path: Path) -> None:
    for name in ("a.jfif", "b.jpe"):
        Image.new("RGB", (20, 20)).save(tmp_path / name, "jpeg")
    (tmp_path / "c.png").symlink_to(tmp_path / "gone.png")
    found, _ = find_images([tmp_path])
    assert [Path(source.name).name for source in found] == ["a.jfif", "b.jpe", "c.png"]
    with pytest.raises(ImageError, match=r"c\.png cannot be read: No such file"):
        found[2].read()


def test_class_folders_with_and_without_splits(tmp_path: Path) -> None:
    save_images(tmp_path / "plain", 2)
    found = read_splits(tmp_path / "plain")
    assert list(found) == ["test"]
    assert [(one.label, one.name) for one in found["test"]][:3] == [
        ("bee", "bee/000.png"),
        ("bee", "bee/001.png"),
        ("cat", "cat/000.png"),
    ]
    for split, per_class in (("validation", 1), ("test", 3)):
        save_images(tmp_path / "parted" / split, per_class)
    parted = read_splits(tmp_path / "parted")
    assert {split: len(images) for split, images in parted.items()} == {"validation": 7, "test": 21}


def test_val_is_validation_and_splits_are_read_when_they_are_used(tmp_path: Path) -> None:
    for split in ("val", "test"):
        save_images(tmp_path / "set" / split, 1, classes=("a", "b"))
    (tmp_path / "set" / "test" / "notes.txt").write_text("no image")
    (tmp_path / "set" / "train" / "a").mkdir(parents=True)
    splits = find_splits(tmp_path / "set")
    assert set(splits) == {"train", "validation", "test"}
    for name, expected in (("validation", (2, 0)), ("test", (2, 1))):
        found, num_others = splits[name]()
        assert (len(found), num_others) == expected
    with pytest.raises(ImageError, match="train holds no images"):
        splits["train"]()
    (tmp_path / "set" / "validation").mkdir()
    with pytest.raises(ImageError, match="set has both val and validation; keep one of them"):
        find_splits(tmp_path / "set")


def test_layouts_that_are_no_splits_are_told(tmp_path: Path) -> None:
    for split in ("train", "val"):
        save_images(tmp_path / "set" / split, 1, classes=("a", "b"))
    with pytest.raises(ImageError, match="set has the splits train, val, and no images by class in test; exp"):
        find_splits(tmp_path / "set")
    save_images(tmp_path / "set" / "test", 1, classes=("a", "b"))
    save_images(tmp_path / "set" / "extra", 1, classes=("a", "b"))
    with pytest.raises(ImageError, match=r"set has 'extra' beside test; expected train, validation \(or val\) and"):
        find_splits(tmp_path / "set")
    vehicles = tmp_path / "vehicles"
    save_images(vehicles, 1, classes=("train", "tram"))
    assert [one.label for one in read_splits(vehicles)["test"]] == ["train", "tram"]


def test_a_limit_draws_from_all_classes(tmp_path: Path) -> None:
    folder = save_images(tmp_path / "set", 10)
    classes = {}
    for limit in (7, 14):
        task = load_image_task(folder, CLASSES, limit=limit, seed=1)
        drawn = [image.index for image in task.images["test"]]
        assert len(drawn) == limit
        assert drawn == sorted(set(drawn))
        classes[limit] = {(image.index, image.gold) for image in task.images["test"]}
        assert all(sorted(CLASSES)[index // 10] == label for index, label in classes[limit])
    assert classes[7] < classes[14]
    assert len({label for _, label in classes[14]}) > 4  # of the first 14 it would be 2
    assert {image.index for image in load_image_task(folder, CLASSES, limit=7, seed=2).images["test"]} != {
        index for index, _ in classes[7]
    }
    assert [image.index for image in load_image_task(folder, CLASSES, limit=0.1, seed=1).images["test"]] == sorted(
        index for index, _ in classes[7]
    )
    with pytest.raises(ConfigError, match="a limit of 0 documents"):
        load_image_task(folder, CLASSES, limit=0)


def test_splits_that_are_not_used_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split, per_class in (("train", 5), ("validation", 1), ("test", 2)):
        save_images(tmp_path / "set" / split, per_class, classes=("a", "b"))
    save_images(tmp_path / "set" / "train", 1, classes=("unknown",))
    decoded: list[str] = []
    monkeypatch.setattr("ensembler.vision.image_tasks.decode", lambda content, name: decoded.append(name))
    assert load_image_task(tmp_path / "set", ("a", "b")).splits == {"test": 4}
    assert len(decoded) == 4
    assert load_image_task(tmp_path / "set", ("a", "b"), validation="3").splits == {"test": 4}
    assert load_image_task(tmp_path / "set", ("a", "b"), validation="validation").splits == {"validation": 2, "test": 4}
    assert len(decoded) == 4 + 4 + 6
    with pytest.raises(ConfigError, match="set has no split 'dev'; it has test, train, validation"):
        load_image_task(tmp_path / "set", ("a", "b"), validation="dev")


def test_a_task_is_called_as_its_link_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_images(tmp_path / "store" / "3f8a", 1, classes=("a", "b"))
    (tmp_path / "cars").symlink_to(tmp_path / "store" / "3f8a")
    assert load_image_task(tmp_path / "cars", ("a", "b")).name == "cars"
    monkeypatch.chdir(tmp_path / "store" / "3f8a")
    assert load_image_task(Path(), ("a", "b")).name == "3f8a"


def test_a_folder_of_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "fine": datasets.ClassLabel(names=list(CLASSES))})
    pictures = random_images(5)
    rows = datasets.Dataset.from_dict({"img": pictures, "fine": [0, 3, 3, 1, 6]}, features=features)
    datasets.DatasetDict({"test": rows, "validation": rows.select([0])}).save_to_disk(tmp_path / "set")
    found = read_splits(tmp_path / "set")
    assert [one.label for one in found["test"]] == ["cat", "bee", "bee", "dog", "pig"]
    for one, picture in zip(found["test"], pictures, strict=True):
        assert (np.asarray(decode(one.read(), "x")) == np.asarray(picture)).all()
    assert len(found["validation"]) == 1
    rows.save_to_disk(tmp_path / "one")
    assert [one.name for one in read_splits(tmp_path / "one")["test"]][-1] == "row 4"
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
