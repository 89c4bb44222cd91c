"""A sweep over images: each point is the ensemble at that point, and rows, choice and report are those of texts."""

from __future__ import annotations

import json
import random
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

from PIL import Image
from sweep_cases import read_rows, start
from vision_cases import CLASSES, random_images, save_clip, save_convnext, save_dinov2, save_images, save_vit

from ensembler import EnsembleForImageClassification
from ensembler.config import IMAGES, EnsembleConfig
from ensembler.engine.grid import Grid, make_grid
from ensembler.errors import ClassesError, ConfigError, ImageError
from ensembler.evaluation.backends import BackendChoice
from ensembler.evaluation.provenance import versions
from ensembler.evaluation.sweep import SweepOptions
from ensembler.vision.images import open_image
from ensembler.vision.preflight import check_images
from ensembler.vision.sweep import ImageSweep
from ensembler.vision.tasks import load_image_task

ALPHAS = tuple(round(0.1 * index, 1) for index in range(16))
RULES = ("base-change", "eft")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ensembler.vision.zero_shot.cache_folder", lambda: tmp_path / "heads")


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
    roles = ("source_ft", "source_pt", "target_pt")
    folders = {role: make(tmp_path / role, seed + i) for i, (role, make) in enumerate(zip(roles, save, strict=True))}
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


def make_sweep(members: dict[str, str], pictures: Path, **changes: Any) -> ImageSweep:
    checked = check_images(EnsembleConfig(task=IMAGES, members=dict(members)))
    settings = {"rules": RULES, "alphas": (0.0, 0.5, 1.0), "validation": "validation", "batch_size": 5, **changes}
    options = SweepOptions(**settings)
    return ImageSweep(checked, [load_image_task(pictures, checked.classes, validation=options.validation)], options)


def test_rows_say_what_the_ensemble_answers_at_each_point(
    members: dict[str, str], pictures: Path, tmp_path: Path, run: Any
) -> None:
    flags = [part for role, path in members.items() for part in (f"--{role.replace('_', '-')}", path)]
    assert run("create", tmp_path / "ensemble", "--task", "image-classification", *flags).code == 0
    command = [
        "sweep",
        tmp_path / "ensemble",
        "--images",
        pictures,
        "--rules",
        "base-change,eft",
        "--alphas",
        "0,0.5,1.2",
    ]
    done = run(*command, "--validation", "validation", "--batch-size", 5, "--output", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    rows = read_rows(tmp_path / "out")
    grid = {(row["rule"], row["alpha"]) for row in rows}
    assert grid == {(rule, alpha) for rule in RULES for alpha in (0.0, 0.5, 1.0, 1.2)}
    assert len(rows) == (14 + 28) * 8
    paths = sorted((pictures / "test").rglob("*.png"))
    for rule, alpha in sorted(grid):
        model = EnsembleForImageClassification.from_members(rule=rule, alpha=alpha, members=members)
        at = [row for row in rows if "/test/" in row["id"] and (row["rule"], row["alpha"]) == (rule, alpha)]
        assert [row["id"] for row in at] == [f"pictures/test/{index}" for index in range(28)]
        for begin in range(0, 28, 5):
            images = [Image.open(path).convert("RGB") for path in paths[begin : begin + 5]]
            log_probs = model(model.prepare(images)).logits.log_softmax(-1)
            for row, path, values in zip(at[begin : begin + 5], paths[begin : begin + 5], log_probs, strict=True):
                right = CLASSES.index(path.parent.name)
                top = values.topk(5).indices.tolist()
                assert row["values"] == {
                    "acc": float(top[0] == right),
                    "acc_top5": float(right in top),
                    "log_prob": values[right].item(),
                }
                assert row["predictions"] == {"": CLASSES[top[0]]}
                assert row["answers"] == [[CLASSES[i] for i in top], [values[right].item(), top[0] == right]]
    (task,) = json.loads(done.out)["tasks"]
    chosen = {choice["rule"]: choice["alpha"] for choice in task["choices"]}
    for rule in RULES:
        accuracies = {
            alpha: sum(
                row["values"]["acc"]
                for row in rows
                if "/validation/" in row["id"] and (row["rule"], row["alpha"]) == (rule, alpha)
            )
            for alpha in (0.0, 0.5, 1.2)
        }
        assert chosen[rule] == max(accuracies, key=lambda alpha: (accuracies[alpha], -alpha))
    assert {method["label"] for method in task["methods"]} >= {"source FT", "target PT", "base-change α = 1"}
    assert {each["comparison"]["test"] for each in task["differences"]} == {"exact McNemar"}
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert len(re.findall(r'src="data:image/png;base64,', page)) > 2
    assert "0 examples in each prompt" not in page
    assert "28 test examples; 14 validation examples. Version 1 of the task, metric acc." in page


def test_an_interrupted_sweep_goes_on_to_the_same_rows(
    members: dict[str, str], pictures: Path, tmp_path: Path, run: Any
) -> None:
    flags = [part for role, path in members.items() for part in (f"--{role.replace('_', '-')}", path)]
    assert run("create", tmp_path / "ensemble", "--task", "image-classification", *flags).code == 0
    command = ["sweep", tmp_path / "ensemble", "--images", pictures, "--alphas", "0,1", "--batch-size", 4]
    assert run(*command, "--output", tmp_path / "whole").code == 0
    assert run(*command, "--output", tmp_path / "part").code == 0
    lines = (tmp_path / "part" / "rows.jsonl").read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "part" / "rows.jsonl").write_text("".join(lines[:21]) + lines[21][:30])
    done = run(*command, "--output", tmp_path / "part")
    assert done.code == 0
    assert "28 examples at 3 points, 7 are done" in done.err
    assert read_rows(tmp_path / "part") == read_rows(tmp_path / "whole")
    other = run(*command[:-1], 5, "--output", tmp_path / "part")
    assert other.code == 2
    assert "batch size is 4 there and 5 here" in other.error


def test_processes_share_the_images(members: dict[str, str], pictures: Path, tmp_path: Path, run: Any) -> None:
    flags = [part for role, path in members.items() for part in (f"--{role.replace('_', '-')}", path)]
    images = ["--task", "image-classification", "--classes", tmp_path / "classes.txt"]
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    assert run("create", tmp_path / "ensemble", *images, *flags).code == 0
    command = ["sweep", tmp_path / "ensemble", "--images", pictures, "--alphas", "0,1", "--batch-size", 4]
    assert run(*command, "--output", tmp_path / "one").code == 0
    process = start(*command, "--output", tmp_path / "two", ranks=2, HF_HOME=str(tmp_path / "hf"))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert read_rows(tmp_path / "two") == read_rows(tmp_path / "one")


def test_an_image_that_changed_is_another_run(members: dict[str, str], pictures: Path) -> None:
    before = make_sweep(members, pictures).settings
    assert make_sweep(members, pictures).settings == before
    random_images(1, 99)[0].save(pictures / "test" / "cat" / "002.png")
    assert make_sweep(members, pictures).settings != before


def test_broken_images_are_left_out_with_a_count_or_end_it(
    members: dict[str, str], pictures: Path, tmp_path: Path, run: Any
) -> None:
    for name in ("cat/001.png", "owl/003.png"):
        (pictures / "test" / name).write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    flags = [part for role, path in members.items() for part in (f"--{role.replace('_', '-')}", path)]
    assert run("create", tmp_path / "ensemble", "--task", "image-classification", *flags).code == 0
    command = ["sweep", tmp_path / "ensemble", "--images", pictures, "--alphas", "0,1", "--output", tmp_path / "out"]
    strict = run(*command, "--strict")
    assert strict.code == 2
    assert strict.error.startswith("Error: cat/001.png is ")
    done = run(*command, "--validation", "validation")
    assert done.code == 0
    assert "skipped: cat/001.png is " in done.err
    assert "2 images cannot be read and are left out" in done.err
    assert "26 test examples; 14 validation examples; 2 images that cannot be read left out" in done.out
    ids = {row["id"] for row in read_rows(tmp_path / "out")}
    assert len(ids) == 26 + 14
    task = json.loads((tmp_path / "out" / "summary.json").read_text())["task settings"]["pictures"]
    assert [said.split(" ")[0] for said in task["skipped"]["test"]] == ["cat/001.png", "owl/003.png"]


def test_an_image_of_the_test_set_does_not_choose(members: dict[str, str], pictures: Path) -> None:
    copied = pictures / "validation" / "cat" / "copy.png"
    copied.write_bytes((pictures / "test" / "dog" / "001.png").read_bytes())
    (task,) = make_sweep(members, pictures).tasks
    assert [example.doc["image"] for example in task.parts.repeated] == ["cat/copy.png"]
    assert len(task.parts.validation) == 14


def test_validation_images_can_be_drawn_from_one_folder(members: dict[str, str], pictures: Path) -> None:
    (task,) = make_sweep(members, pictures / "test", validation="8").tasks
    assert (len(task.parts.validation), len(task.parts.test)) == (8, 20)


def test_thumbnails_are_small_pictures(members: dict[str, str], pictures: Path) -> None:
    sweep = make_sweep(members, pictures)
    Image.new("RGB", (900, 300)).save(pictures / "test" / "cat" / "000.png")
    for name in sweep.ids[:20]:
        thumbnail = sweep.thumbnail(name)
        assert thumbnail is not None
        assert thumbnail.startswith("data:image/png;base64,")
        assert len(thumbnail) < 60_000
    assert open_image(sweep.chunks[0].examples[0].source[0].image.source).mode == "RGB"


def test_what_cannot_be_swept_is_refused(members: dict[str, str], pictures: Path, tmp_path: Path, run: Any) -> None:
    with pytest.raises(ConfigError, match="images have no prompts whose likelihood could choose alpha"):
        make_sweep(members, pictures, select="perplexity", validation=None)
    with pytest.raises(ConfigError, match="images are not run by vllm; leave --backend out"):
        make_sweep(members, pictures, backend=BackendChoice("vllm"))
    with pytest.raises(ConfigError, match="images have no metric 'f1'; they have acc, acc_top5, log_prob"):
        make_sweep(members, pictures, metric="f1")
    with pytest.raises(ConfigError, match="pictures has no split 'train'; it has test, validation"):
        make_sweep(members, pictures, validation="train")
    (pictures / "test" / "cat").rename(pictures / "test" / "tiger")
    with pytest.raises(ClassesError, match=r"images of 'tiger', which the ensemble lacks \(its classes: 'cat', 'dog'"):
        make_sweep(members, pictures)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="holds no images"):
        make_sweep(members, tmp_path / "empty")
    done = run("sweep", "demo", "--images", pictures)
    assert done.code == 2
    assert "is an ensemble of language models, which see no images" in done.error
    done = run("sweep", "demo", "--images", pictures, "--task", "sst2")
    assert (done.code, done.error) == (2, "Error: --task and --images were both given; give one of them")


def test_the_versions_of_a_sweep_over_images_name_pillow(members: dict[str, str], pictures: Path) -> None:
    assert make_sweep(members, pictures).settings["versions"]["pillow"] == version("pillow")
    assert "pillow" not in versions()


def test_a_limited_sweep_is_of_its_seed_s_images(
    members: dict[str, str], pictures: Path, tmp_path: Path, run: Any
) -> None:
    flags = [part for role, path in members.items() for part in (f"--{role.replace('_', '-')}", path)]
    assert run("create", tmp_path / "ensemble", "--task", "image-classification", *flags).code == 0
    (pictures / "test" / "notes.txt").write_text("no image")
    (pictures / "test" / "cat" / "gone.jpg").symlink_to(pictures / "gone.jpg")
    command = ["sweep", tmp_path / "ensemble", "--images", pictures, "--alphas", "0,1", "--validation", "val"]
    done = run(*command, "--output", tmp_path / "all")
    assert done.code == 0, done.err
    assert done.err.splitlines()[:3] == [
        "skipped: cat/gone.jpg cannot be read: No such file or directory",
        "1 images cannot be read and are left out",
        "1 files that are no images, or of no class, are left out",
    ]
    done = run(*command, "--limit", 5, "--seed", 3, "--output", tmp_path / "some")
    assert done.code == 0, done.err
    found = {row["id"] for row in read_rows(tmp_path / "some")}
    places = list(range(29))
    random.Random(3).shuffle(places)
    assert {name for name in found if "/test/" in name} <= {f"pictures/test/{place}" for place in places[:5]}
    assert len([name for name in found if "/validation/" in name]) == 5
