"""Images as a task, and what answers them: each point of a grid is the ensemble at that point."""

from __future__ import annotations

import json
import math
import random
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("scipy")

from helpers.vision_cases import (
    CLASSES,
    random_images,
    save_clip,
    save_convnext,
    save_dinov2,
    save_images,
    save_vit,
    with_other_classifier,
)
from PIL import Image

from ensembler import EnsembleForImageClassification
from ensembler.config import IMAGES, EnsembleConfig
from ensembler.engine.grid import Grid, make_grid
from ensembler.errors import ClassesError, ConfigError, ImageError
from ensembler.evaluation.documents import Answer, split_documents
from ensembler.evaluation.provenance import versions
from ensembler.vision.answers import ImageAnswerer, describe_images
from ensembler.vision.image_preflight import check_images
from ensembler.vision.image_tasks import ImageTask, load_image_task

ALPHAS = tuple(round(0.1 * index, 1) for index in range(16))
RULES = ("base-change", "eft")
ROLES = ("source_ft", "source_pt", "target_pt")


@pytest.fixture
def members(tmp_path: Path) -> dict[str, str]:
    return {
        "source_ft": str(save_vit(tmp_path / "ft", 1)),
        "source_pt": str(save_convnext(tmp_path / "pt", 2)),
        "target_pt": str(save_clip(tmp_path / "target", 3)),
    }


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """14 for validation, 28 for test."""
    save_images(tmp_path / "pictures" / "validation", 2, seed=1)
    save_images(tmp_path / "pictures" / "test", 4, seed=2)
    return tmp_path / "pictures"


@pytest.mark.parametrize("seed", range(10))
def test_every_point_of_a_grid_is_the_ensemble_at_that_point_bit_for_bit(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    save = [draw.choice((save_vit, save_convnext, save_dinov2)) for _ in range(3)]
    folders = {role: make(tmp_path / role, seed + i) for i, (role, make) in enumerate(zip(ROLES, save, strict=True))}
    images = random_images(draw.randint(1, 9), seed)
    model = EnsembleForImageClassification.from_members(members=folders)
    prepared = model.prepare(images)
    grid = make_grid(RULES, ALPHAS)
    with torch.inference_mode():
        logits = model.member_logits(prepared)
        found = Grid.of(grid, model.rule, model.contract, "mask").combine(logits)
        for index, point in enumerate(grid):
            one = EnsembleForImageClassification.from_members(rule=point.rule, alpha=point.alpha, members=folders)
            assert torch.equal(found[index], one(prepared).logits), point
        assert torch.equal(found[0], logits["source_ft"])
        assert torch.equal(found[len(ALPHAS)], logits["target_pt"])


def answerer_of(members: dict[str, Any]) -> ImageAnswerer:
    return ImageAnswerer(check_images(EnsembleConfig(task=IMAGES, members=dict(members))))


def load(pictures: Path, **settings: Any) -> ImageTask:
    return load_image_task(pictures, CLASSES, **settings)


@pytest.mark.parametrize("seed", range(4))
def test_answers_are_those_of_the_ensemble_at_each_point_bit_for_bit(
    seed: int, members: dict[str, str], pictures: Path, tmp_path: Path
) -> None:
    draw = random.Random(seed)
    if seed % 2:  # two classifiers that share their backbone
        members["source_pt"] = str(with_other_classifier(Path(members["source_ft"]), tmp_path / "other", 5))
    task, answerer = load(pictures, limit=draw.randint(5, 28)), answerer_of(members)
    documents = task.documents()
    size = draw.randint(1, 6)
    batches = [documents[start : start + size] for start in range(0, len(documents), size)]
    points = make_grid(RULES, draw.sample(ALPHAS, 3))
    with answerer.open():
        answered = list(answerer.answer(batches, points))
    assert [len(batch) for batch in answered] == [len(batch) for batch in batches]
    for index, point in enumerate(points):
        model = EnsembleForImageClassification.from_members(rule=point.rule, alpha=point.alpha, members=members)
        for batch, answers in zip(batches, answered, strict=True):
            images = [Image.open(pictures / "test" / one.content["image"]).convert("RGB") for one in batch]
            with torch.inference_mode():
                log_probs = model(model.prepare(images)).logits.log_softmax(-1)
            for document, by_point, values in zip(batch, answers, log_probs, strict=True):
                right = CLASSES.index(str(document.gold))
                top = values.topk(5).indices.tolist()
                assert by_point[index] == [[CLASSES[i] for i in top], [values[right].item(), top[0] == right]]
                read_again = json.loads(json.dumps(by_point[index]))
                assert read_again == by_point[index]
                assert task.measure(document, read_again) == (
                    {
                        "acc": float(top[0] == right),
                        "acc_top5": float(right in top),
                        "log_prob": values[right].item(),
                    },
                    {"": CLASSES[top[0]]},
                )


def test_documents_tell_their_image_and_are_told_apart_by_its_file(members: dict[str, str], pictures: Path) -> None:
    (pictures / "test" / "owl" / "copy.png").write_bytes((pictures / "test" / "owl" / "000.png").read_bytes())
    task, answerer = load(pictures), answerer_of(members)
    documents = task.documents()
    assert [document.name for document in documents] == [f"pictures/test/{index}" for index in range(29)]
    paths = sorted((pictures / "test").rglob("*.png"))
    for document, path in zip(documents, paths, strict=True):
        name = path.relative_to(pictures / "test").as_posix()
        assert document.content == {"image": name, "label": path.parent.name}
        assert (document.prompt, document.gold, document.choices) == (name, path.parent.name, ())
    assert len({task.identity(document) for document in documents}) == 28
    assert [answerer.encode(document).length for document in documents] == [0] * 29
    assert len({answerer.encode(document).digest for document in documents}) == 28
    assert task.splits == {"test": 29}


def test_the_members_end_with_the_block(members: dict[str, str], pictures: Path) -> None:
    task, answerer = load(pictures, limit=2), answerer_of(members)
    points = make_grid(("eft",), (0.5,))
    with pytest.raises(ImageError, match="stop"), answerer.open():
        raise ImageError("stop")
    with pytest.raises(AttributeError):
        next(answerer.answer([task.documents()], points))
    with answerer.open():
        first = list(answerer.answer([task.documents()], points))
    with answerer.open():
        assert list(answerer.answer([task.documents()], points)) == first


def test_what_answers_depend_on_is_json(members: dict[str, str], pictures: Path) -> None:
    answerer = answerer_of(members)
    described = answerer.describe()
    assert described.keys() == {"versions", "ensemble", "backend"}
    assert described["ensemble"] == describe_images(answerer.checked)
    assert described["backend"] == {"name": "transformers"}
    assert described["versions"] == {**versions(), "pillow": version("pillow")}
    assert "pillow" not in versions()
    assert json.loads(json.dumps(described)) == described
    task = load(pictures, validation="validation", limit=5)
    found = task.describe()
    assert json.loads(json.dumps(found)) == found
    assert (found["limit"], found["num_images"], found["skipped"]) == (5, 5, [])
    assert found == load(pictures, limit=5).describe(), "another split may choose from the same rows"


def test_documents_are_the_same_wherever_their_folder_is(pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures, tmp_path / "elsewhere" / pictures.name)
    here, there = (
        repr([document.requests for document in load(folder).documents()])
        for folder in (pictures, tmp_path / "elsewhere" / pictures.name)
    )
    assert here == there
    (tmp_path / "elsewhere" / pictures.name / "test" / "owl" / "000.png").write_bytes(
        (pictures / "test" / "cat" / "000.png").read_bytes()
    )
    changed = load(tmp_path / "elsewhere" / pictures.name).documents()
    assert here != repr([document.requests for document in changed])


def test_metrics_are_means_with_their_standard_error(pictures: Path) -> None:
    task = load(pictures)
    assert [metric.key for metric in task.metrics] == ["acc", "acc_top5", "log_prob"]
    (document, *_) = task.documents()
    answer: Answer = [["cat", "dog"], [-math.inf, document.gold == "cat"]]
    values, _ = task.measure(document, answer)
    assert values["log_prob"] == {"float": "-inf"}
    assert task.aggregate("log_prob", [values["log_prob"], -1.0]) == -math.inf
    assert task.aggregate("acc", [1.0, 0.0, 0.0, 1.0]) == 0.5
    assert task.standard_error("acc", [1.0, 0.0, 0.0, 1.0]) == pytest.approx(math.sqrt(1 / 3) / 2)
    assert task.standard_error("acc", [1.0]) is None


def test_of_few_classes_there_is_no_top_5(tmp_path: Path) -> None:
    folder = save_images(tmp_path / "few", 1, classes=("a", "b"))
    task = load_image_task(folder, ("a", "b"))
    assert [metric.key for metric in task.metrics] == ["acc", "log_prob"]
    (document, _) = task.documents()
    assert task.measure(document, [["a", "b"], [-0.1, True]]) == ({"acc": 1.0, "log_prob": -0.1}, {"": "a"})


def test_broken_images_are_left_out_with_a_count_or_end_it(pictures: Path) -> None:
    assert load(pictures).notes == ()
    for name in ("cat/001.png", "owl/003.png"):
        (pictures / "test" / name).write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(ImageError, match=r"^cat/001.png is "):
        load(pictures, strict=True)
    task = load(pictures, validation="validation")
    assert task.splits == {"test": 26, "validation": 14}
    assert task.notes == ("2 images that cannot be read left out",)
    said = task.describe()["skipped"]
    assert [reason.split(" ")[0] for reason in said] == ["cat/001.png", "owl/003.png"]
    names = [document.index for document in task.documents()]
    places = [path.relative_to(pictures / "test").as_posix() for path in sorted((pictures / "test").rglob("*.png"))]
    assert [places[index] for index in names] == [one.content["image"] for one in task.documents()]


def test_an_image_of_the_test_set_does_not_choose(pictures: Path) -> None:
    copied = pictures / "validation" / "cat" / "copy.png"
    copied.write_bytes((pictures / "test" / "dog" / "001.png").read_bytes())
    parts = split_documents(load(pictures, validation="validation"), "validation")
    assert [document.content["image"] for document in parts["repeated"]] == ["cat/copy.png"]
    assert (len(parts["validation"]), len(parts["test"])) == (14, 28)


def test_validation_images_can_be_drawn_from_one_folder(pictures: Path) -> None:
    parts = split_documents(load(pictures / "test", validation="8"), "8")
    assert (len(parts["validation"]), len(parts["test"])) == (8, 20)


def test_thumbnails_are_small_pictures(members: dict[str, str], pictures: Path) -> None:
    answerer, task = answerer_of(members), load(pictures)
    Image.new("RGB", (900, 300)).save(pictures / "test" / "cat" / "000.png")
    for document in task.documents()[:20]:
        thumbnail = answerer.thumbnail(document)
        assert thumbnail.startswith("data:image/png;base64,")
        assert len(thumbnail) < 60_000


def test_what_cannot_be_a_task_is_refused(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pictures has no split 'train'; it has test, validation"):
        load(pictures, validation="train")
    with pytest.raises(ConfigError, match="pictures has no split 'validation'; it has test"):
        load(pictures).documents("val")
    (pictures / "test" / "cat").rename(pictures / "test" / "tiger")
    with pytest.raises(ClassesError, match=r"images of 'tiger', which the ensemble lacks \(its classes: 'cat', 'dog'"):
        load(pictures)
    assert load(pictures, aliases={"tiger": "cat"}).documents()[-1].gold == "cat"
    with pytest.raises(ClassesError, match=r"images of 'tiger', which may be 'cat', 'dog'; rename its folder"):
        load(pictures, aliases={"tiger": ["cat", "dog"]})
    assert load(pictures / "test" / "..", aliases={"owl": ["owl", "dog"], "tiger": "cat"}).documents()[-1].gold == "cat"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="holds no images"):
        load(tmp_path / "empty")
    (tmp_path / "broken" / "cat").mkdir(parents=True)
    (tmp_path / "broken" / "cat" / "x.png").write_bytes(b"")
    with pytest.raises(ImageError, match="no image in the test split of broken can be read"):
        load(tmp_path / "broken").documents()
