"""Make the models and images of a small vision experiment: scikit-learn's digits in the roles of base-change's table 2.

    python examples/make_digits_models.py OUT        (a few minutes on one core)

    OUT/data/TASK/{validation,test}/DIGIT/NUMBER.png   the images of a task: noisy, rotated, inverted, occluded
    OUT/source_pt                        source PT: a small ViT, pre-trained on few clean images
    OUT/{same_size,larger,larger_few}    target PTs: the small ViT on all images for pre-training, a larger one on all,
                                         a larger one on the few that source PT has seen
    OUT/source_ft_TASK                   source FT: source PT fine-tuned on images of the task

The 1,797 images (8 × 8 pixels, 17 grey levels) are split at random once: 600 for pre-training, 150 of them the few,
150 for fine-tuning, 300 for the choice of α, 747 for the test; no image is in two splits. A finished folder is not made
again. The benchmark is run in OUT:

    cd OUT && ensembler bench .../examples/recipes/digits.yaml --output bench
"""

from __future__ import annotations

import argparse
import contextlib
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

SEED = 0
SPLITS = {"few": 150, "more": 450, "tune": 150, "validation": 300, "test": 747}
SIZES = {"small": (32, 2, 2), "large": (64, 4, 4)}  # width, layers, heads
STEPS = {"pretrain": 3000, "tune": 1000}
RATE = 1e-3
BATCH = 32

Grey = NDArray[np.uint8]  # (images, 8, 8)
Shift = Callable[[Grey, np.random.Generator], Grey]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out.resolve()
    torch.set_num_threads(1)
    images, labels, splits = load_splits()
    few, everything = splits["few"], np.concatenate([splits["few"], splits["more"]])
    for name, size, indices in (
        ("source_pt", "small", few),
        ("same_size", "small", everything),
        ("larger", "large", everything),
        ("larger_few", "large", few),
    ):
        pretrain(out / name, size, images[indices], labels[indices])
    for task, shift in TASKS.items():
        for split in ("validation", "test"):
            write_images(
                out / "data" / task / split, shifted(images, splits[split], task, shift), labels[splits[split]]
            )
        tune(
            out / f"source_ft_{task}",
            out / "source_pt",
            shifted(images, splits["tune"], task, shift),
            labels[splits["tune"]],
        )


def load_splits() -> tuple[Grey, NDArray[np.int64], dict[str, NDArray[np.int64]]]:
    """The images with 8 bits, their labels, and the indices of every split."""
    digits = load_digits()
    images = np.rint(digits.images / 16 * 255).astype(np.uint8)
    order = np.random.default_rng(SEED).permutation(len(images))
    ends = np.cumsum(list(SPLITS.values()))[:-1]
    return images, digits.target.astype(np.int64), dict(zip(SPLITS, np.split(order, ends), strict=True))


# -- the tasks: each a shift of the images ----------------------------------------------------------------------------


def noisy(images: Grey, generator: np.random.Generator) -> Grey:
    """Normal noise of 50 grey levels of 256."""
    return np.clip(images + generator.normal(0, 50, images.shape), 0, 255).astype(np.uint8)


def rotated(images: Grey, generator: np.random.Generator) -> Grey:
    """By 20 to 45 degrees to either side."""
    angles = generator.uniform(20, 45, len(images)) * generator.choice((-1, 1), len(images))
    turned = [
        np.asarray(Image.fromarray(image).rotate(float(angle), Image.Resampling.BILINEAR))
        for image, angle in zip(images, angles, strict=True)
    ]
    return np.stack(turned)


def inverted(images: Grey, generator: np.random.Generator) -> Grey:
    """Dark on light."""
    return 255 - images


def occluded(images: Grey, generator: np.random.Generator) -> Grey:
    """A grey square of 3 × 3 pixels somewhere."""
    covered = images.copy()
    for image, (top, left) in zip(covered, generator.integers(0, 6, (len(images), 2)), strict=True):
        image[top : top + 3, left : left + 3] = 128
    return covered


TASKS: dict[str, Shift] = {"noisy": noisy, "rotated": rotated, "inverted": inverted, "occluded": occluded}


def shifted(images: Grey, indices: NDArray[np.int64], task: str, shift: Shift) -> Grey:
    """The images of a split as a task has them: an image is shifted alike in whatever order it comes."""
    return np.concatenate([shift(images[[i]], np.random.default_rng([zlib.crc32(task.encode()), i])) for i in indices])


def write_images(folder: Path, images: Grey, labels: NDArray[np.int64]) -> None:
    if folder.exists():
        return
    partial = folder.with_name(f"{folder.name}.partial")
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        (partial / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(partial / str(label) / f"{number:04}.png")
    partial.rename(folder)


# -- training ---------------------------------------------------------------------------------------------------------


def pixel_values(images: Grey) -> Tensor:
    """(images, 3, 8, 8), as the processor beside the models makes them."""
    return (torch.from_numpy(images).float() / 255 - 0.5).div(0.5).unsqueeze(1).repeat(1, 3, 1, 1)


def new_model(size: str) -> ViTForImageClassification:
    width, layers, heads = SIZES[size]
    names = [str(digit) for digit in range(10)]
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * width,
        initializer_range=0.1,  # the default, 0.02, is for a width of 768
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    return ViTForImageClassification(config)


@contextlib.contextmanager
def finished(folder: Path) -> Iterator[Path | None]:
    """Yield a folder to write to, which becomes `folder` when all is there; None where it is there already."""
    if folder.exists():
        yield None
        return
    partial = folder.with_name(f"{folder.name}.partial")
    yield partial
    partial.rename(folder)
    print(f"made {folder.name}")


def pretrain(folder: Path, size: str, images: Grey, labels: NDArray[np.int64]) -> None:
    with finished(folder) as partial:
        if partial is not None:
            torch.manual_seed(SEED)
            save(train(new_model(size), images, labels, "pretrain"), partial)


def tune(folder: Path, base: Path, images: Grey, labels: NDArray[np.int64]) -> None:
    with finished(folder) as partial:
        if partial is not None:
            torch.manual_seed(SEED)
            save(train(ViTForImageClassification.from_pretrained(base), images, labels, "tune"), partial)


def train(
    model: ViTForImageClassification, images: Grey, labels: NDArray[np.int64], kind: str
) -> ViTForImageClassification:
    """AdamW with a rate that falls in a cosine; images are moved by up to one pixel to each side."""
    generator = torch.Generator().manual_seed(SEED)
    values, targets = pixel_values(images), torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS[kind])
    model.train()
    for _ in range(STEPS[kind]):
        rows = torch.randperm(len(values), generator=generator)[:BATCH]
        down, right = torch.randint(-1, 2, (2,), generator=generator).tolist()
        loss = model(moved(values[rows], down, right), labels=targets[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def moved(values: Tensor, down: int, right: int) -> Tensor:
    """The images (rows, 3, 8, 8) moved by whole pixels, their edge repeated."""
    padded = torch.nn.functional.pad(values, (1, 1, 1, 1), mode="replicate")
    return padded[..., 1 - down : 9 - down, 1 - right : 9 - right]


def save(model: ViTForImageClassification, folder: Path) -> None:
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)


if __name__ == "__main__":
    main()
