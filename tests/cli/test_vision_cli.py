"""`create` and `classify` for image classifiers, and what they refuse, in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("PIL")

from helpers.vision_cases import (
    CLASSES,
    random_images,
    save_clip,
    save_convnext,
    save_dinov2,
    save_head,
    save_images,
    save_vit,
)
from PIL import Image

from ensembler import EnsembleForImageClassification

SHARED = "source_ft and source_pt share one tower, which is run once\n"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ensembler.vision.zero_shot.cache_folder", lambda: tmp_path / "heads")


@pytest.fixture
def ensemble(tmp_path: Path, run: Any) -> Path:
    """A head on a CLIP, the same CLIP zero-shot, and a ConvNeXt."""
    clip = save_clip(tmp_path / "clip", 1)
    head = save_head(tmp_path / "head.safetensors", 12, 4)
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    made = run(
        "create",
        tmp_path / "ensemble",
        "--task",
        "image-classification",
        "--source-ft",
        clip,
        "--source-pt",
        clip,
        "--target-pt",
        save_convnext(tmp_path / "convnext", 2),
        "--head",
        f"source_ft={head}",
        "--classes",
        tmp_path / "classes.txt",
        "--alpha",
        "0.7",
    )
    assert made.code == 0, made.err
    return tmp_path / "ensemble"


def test_create_writes_one_folder(ensemble: Path) -> None:
    content = json.loads((ensemble / "config.json").read_text())
    del content["transformers_version"]
    assert content == {
        "model_type": "ensembler",
        "architectures": ["EnsembleForImageClassification"],
        "task": "image-classification",
        "rule": "base-change",
        "alpha": 0.7,
        "outside": "mask",
        "classes": list(CLASSES),
        "members": {
            "source_ft": {"model": "../clip", "head": "../head.safetensors"},
            "target_pt": {"model": "../convnext"},
            "source_pt": {"model": "../clip"},
        },
    }
    assert [path.name for path in ensemble.iterdir()] == ["config.json"]


def test_classify_tells_what_the_ensemble_sees(ensemble: Path, tmp_path: Path, run: Any) -> None:
    folder = save_images(tmp_path / "photos", 2)
    done = run("classify", ensemble, folder, "--top-k", 3, "--json", "--batch-size", 4, "--alpha", "0.9")
    assert (done.code, done.err) == (0, SHARED)
    rows = [json.loads(line) for line in done.out.splitlines()]
    paths = sorted(folder.rglob("*.png"))
    assert [row["image"] for row in rows] == list(map(str, paths))
    model = EnsembleForImageClassification.from_pretrained(ensemble, alpha=0.9)
    for start in range(0, len(paths), 4):
        images = [Image.open(path).convert("RGB") for path in paths[start : start + 4]]
        logits = model(model.prepare(images)).logits.softmax(-1)
        for row, values in zip(rows[start : start + 4], logits, strict=True):
            top = values.topk(3)
            assert [each["label"] for each in row["classes"]] == [CLASSES[i] for i in top.indices]
            assert [each["probability"] for each in row["classes"]] == pytest.approx(top.values.tolist())
    assert {row["anchor"]["label"] for row in rows} != {rows[0]["classes"][0]["label"]}


def test_words_on_the_terminal_say_where_alpha_moved_the_choice(ensemble: Path, tmp_path: Path, run: Any) -> None:
    folder = save_images(tmp_path / "photos", 3)
    done = run("classify", ensemble, folder, "--alpha", "5", "--top-k", 1)
    lines = done.out.splitlines()
    assert lines[0] == str(folder / "bee" / "000.png")
    assert "alpha 5 moves the choice: source_ft alone would say" in done.out
    at_zero = run("classify", ensemble, folder, "--alpha", "0", "--top-k", 1)
    assert len(at_zero.out.splitlines()) == 2 * 21
    assert "moves the choice" not in at_zero.out


def test_a_broken_image_is_named_and_skipped_or_ends_it(ensemble: Path, tmp_path: Path, run: Any) -> None:
    folder = save_images(tmp_path / "photos", 1)
    broken = folder / "cat" / "000.png"
    broken.write_bytes(broken.read_bytes()[:60])
    done = run("classify", ensemble, folder, "--skip-bad")
    assert done.code == 0
    assert done.err.splitlines()[-1] == "1 of 7 images could not be read and were skipped"
    assert done.err.startswith(f"{SHARED}skipped: {broken} is damaged")
    assert len([line for line in done.out.splitlines() if line.endswith(".png")]) == 6
    rows = [json.loads(line) for line in run("classify", ensemble, folder, "--json", "--skip-bad").out.splitlines()]
    assert [row["image"] for row in rows if "error" in row] == [str(broken)]
    strict = run("classify", ensemble, folder, "--batch-size", 1)
    assert strict.code == 2
    assert strict.err.startswith(f"{SHARED}Error: {broken} is damaged")
    assert strict.err.endswith("; mend it, or add --skip-bad\n")
    alone = run("classify", ensemble, broken, "--skip-bad")
    assert alone.code == 1
    assert alone.err.splitlines()[-1] == "Error: no image could be read"


def test_other_modes_and_sizes_are_classified(ensemble: Path, tmp_path: Path, run: Any) -> None:
    image = random_images(1)[0]
    for mode in ("L", "RGBA", "I;16", "1", "P"):
        image.convert("L").convert(mode).save(
            tmp_path / f"{mode.replace(';', '')}.png"
        ) if mode == "I;16" else image.convert(mode).save(tmp_path / f"{mode}.png")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    Image.new("RGB", (4000, 3000)).save(tmp_path / "huge.png")
    names = ["L.png", "RGBA.png", "I16.png", "1.png", "P.png", "dot.png", "huge.png"]
    done = run("classify", ensemble, *(tmp_path / name for name in names), "--top-k", 7, "--json")
    assert (done.code, done.err) == (0, SHARED)
    for line in done.out.splitlines():
        assert sum(each["probability"] for each in json.loads(line)["classes"]) == pytest.approx(1, abs=1e-5)


def test_texts_and_images_refuse_each_other_in_one_line(ensemble: Path, tmp_path: Path, run: Any) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "x.png")
    done = run("classify", "demo", tmp_path / "x.png")
    assert done.code == 2
    assert "is an ensemble of language models, which see no images; use ensembler generate" in done.error
    (tmp_path / "texts.jsonl").write_text('{"text": "x"}\n')
    for command in (
        ["generate", ensemble, "--prompt", "x"],
        ["score", ensemble, "--data", tmp_path / "texts.jsonl"],
        ["inspect", ensemble],
        ["plan", ensemble],
    ):
        done = run(*command)
        assert done.code == 2, command
        words = (
            "is an ensemble of image classifiers, which read no texts; use ensembler classify, or sweep with --images"
        )
        assert done.error == f"Error: {ensemble} {words}"


def test_create_refuses_in_one_line(tmp_path: Path, run: Any) -> None:
    vit = save_vit(tmp_path / "vit", 1)
    other = save_vit(tmp_path / "other", 2, CLASSES[:6])

    def refuse(*options: Any) -> str:
        done = run("create", tmp_path / "out", *options)
        assert done.code == 2
        assert not (tmp_path / "out").exists()
        return str(done.error)

    trio = ["--source-ft", vit, "--source-pt", vit, "--target-pt"]
    images = ["--task", "image-classification"]
    assert "target_pt lacks 'pig': if they are the same classes, give --aliases FILE" in refuse(*images, *trio, other)
    assert "--classes was given without --task image-classification" in refuse(*trio, vit, "--classes", "x")
    assert "nothing.txt cannot be read" in refuse(*images, *trio, vit, "--classes", tmp_path / "nothing.txt")
    (tmp_path / "bad.json").write_text('{"a": 3}')
    assert "has 3 for 'a'; expected a text" in refuse(*images, *trio, vit, "--aliases", tmp_path / "bad.json")
    assert "--copy-members and --auto-place are for language" in refuse(*images, *trio, vit, "--copy-members")
    assert "there is no head" in refuse(*images, *trio, vit, "--head", "target_pt=none.safetensors")


def test_image_models_without_the_task_are_told_what_to_add(tmp_path: Path, run: Any) -> None:
    for name, save in (("vit", save_vit), ("clip", save_clip)):
        model = save(tmp_path / name, 1)
        done = run("create", tmp_path / "out", "--source-ft", model, "--source-pt", model, "--target-pt", model)
        assert done.code == 2
        kind = f"{model} is an image model ({name})"
        assert kind in done.error
        assert done.error.endswith("add --task image-classification (in a recipe: images: {})")
        assert not (tmp_path / "out").exists()


def test_create_says_what_it_takes_for_granted_of_a_head(tmp_path: Path, run: Any) -> None:
    clip, vit = save_clip(tmp_path / "clip", 1), save_dinov2(tmp_path / "dino", 2, head=False)
    heads = {
        "source_ft": save_head(tmp_path / "a.safetensors", 12, classes=None),
        "source_pt": save_head(tmp_path / "b.safetensors", 16),
        "target_pt": save_head(tmp_path / "c.safetensors", 12, normalize="false"),
    }
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    members = {"source_ft": clip, "source_pt": vit, "target_pt": clip}
    flags: list[Any] = ["--task", "image-classification", "--classes", tmp_path / "classes.txt"]
    for role, path in members.items():
        flags += [f"--{role.replace('_', '-')}", path, "--head", f"{role}={heads[role]}"]
    done = run("create", tmp_path / "out", *flags)
    assert done.code == 0, done.err
    scaled = "its head does not say whether features are scaled to length 1 ('normalize' in its metadata); assumed:"
    assert done.err.splitlines()[:-1] == [
        f"source_ft: {scaled} they are, as a dual encoder's",
        "source_ft: its head does not say which classes it has ('classes' in its metadata); assumed: the ensemble's, "
        "in their order",
        f"source_pt: {scaled} they are not",
    ]


def test_other_files_among_images_are_counted(ensemble: Path, tmp_path: Path, run: Any) -> None:
    folder = save_images(tmp_path / "photos", 1)
    (folder / "cat" / "notes.txt").write_text("no image")
    (folder / "cat" / "gone.png").symlink_to(folder / "nothing.png")
    done = run("classify", ensemble, folder, "--skip-bad")
    assert done.code == 0
    first, shared, broken, last = done.err.splitlines()
    assert f"{shared}\n" == SHARED
    assert first == "1 files that are no images, or of no class, are left out"
    assert broken == f"skipped: {folder / 'cat' / 'gone.png'} cannot be read: No such file or directory"
    assert last == "1 of 8 images could not be read and were skipped"


def test_aliases_make_members_agree(tmp_path: Path, run: Any) -> None:
    vit = save_vit(tmp_path / "vit", 1)
    other = save_vit(tmp_path / "other", 2, [f"LABEL_{i}" for i in range(7)])
    (tmp_path / "aliases.json").write_text(json.dumps({f"LABEL_{i}": name for i, name in enumerate(CLASSES)}))
    done = run(
        "create",
        tmp_path / "out",
        "--task",
        "image-classification",
        "--source-ft",
        vit,
        "--source-pt",
        vit,
        "--target-pt",
        other,
        "--aliases",
        tmp_path / "aliases.json",
    )
    assert done.code == 0, done.err
    model = EnsembleForImageClassification.from_pretrained(tmp_path / "out")
    assert model.classes == CLASSES
    assert torch.isfinite(model(model.prepare(random_images(2))).logits).all()


def test_files_with_a_byte_order_mark_and_odd_line_ends(tmp_path: Path, run: Any) -> None:
    """As editors on Windows write them. A line ends at a line feed alone; null is no name."""
    vit = save_vit(tmp_path / "vit", 1)
    trio = ["--source-ft", vit, "--source-pt", vit, "--target-pt", vit, "--task", "image-classification"]
    classes, templates, aliases = (tmp_path / name for name in ("classes.txt", "templates.txt", "aliases.json"))
    odd = ["c\u2028t", "d\x85g", "o\x0bl", *CLASSES[3:]]
    classes.write_bytes(("\ufeff" + "\r\n".join(odd) + "\r\n").encode())
    templates.write_bytes("\ufeffa {}\n\nan {}".encode())
    aliases.write_bytes(("\ufeff" + json.dumps(dict(zip(CLASSES, odd, strict=True)))).encode())
    done = run("create", tmp_path / "out", *trio, "--classes", classes, "--templates", templates, "--aliases", aliases)
    assert done.code == 0, done.err
    config = EnsembleForImageClassification.from_pretrained(tmp_path / "out").config
    assert (config.classes, config.templates) == (odd, ["a {}", "an {}"])
    listed = tmp_path / "classes.json"
    for content in ([*CLASSES[:6], None], {**dict.fromkeys(CLASSES[:6], "x"), CLASSES[6]: None}, None, "cat"):
        listed.write_text(json.dumps(content))
        refused = run("create", tmp_path / "bad", *trio, "--classes", listed)
        assert refused.code == 2
        assert str(listed) in refused.error, refused.error
        assert not (tmp_path / "bad").exists()


def test_without_pillow_the_pip_line_is_told(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vit = save_vit(tmp_path / "vit", 1)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    trio = ["--source-ft", vit, "--source-pt", vit, "--target-pt", vit]
    done = run("create", tmp_path / "out", "--task", "image-classification", *trio)
    assert done.code == 2
    assert "PIL is not installed; install it with: pip install" in done.error
