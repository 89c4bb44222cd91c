"""Sweeps over images on the command line: rows, choice and report are those of texts."""

from __future__ import annotations

import json
import random
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL")
pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

from helpers.sweep_cases import read_rows, start
from helpers.vision_cases import CLASSES, save_clip, save_convnext, save_images, save_vit
from PIL import Image

from ensembler import EnsembleForImageClassification
from ensembler.evaluation.results_file import FILE

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
        "--rule",
        "base-change,eft",
        "--alpha",
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
    chosen = {method["rule"]: method["alpha"] for method in task["methods"] if method["chosen_by"] == "validation"}
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
    assert "examples in each prompt" not in page
    assert "28 test documents; 14 others chose alpha. Version 1 of the task, metric acc." in page


def test_an_interrupted_sweep_goes_on_to_the_same_rows(
    members: dict[str, str], pictures: Path, tmp_path: Path, run: Any
) -> None:
    flags = [part for role, path in members.items() for part in (f"--{role.replace('_', '-')}", path)]
    assert run("create", tmp_path / "ensemble", "--task", "image-classification", *flags).code == 0
    command = ["sweep", tmp_path / "ensemble", "--images", pictures, "--alpha", "0,1", "--batch-size", 4]
    assert run(*command, "--output", tmp_path / "whole").code == 0
    assert run(*command, "--output", tmp_path / "part").code == 0
    with closing(sqlite3.connect(tmp_path / "part" / FILE)) as connection, connection:
        for table in ("answers", "measurements"):
            connection.execute(f"DELETE FROM {table} WHERE document > (SELECT min(id) + 6 FROM documents)")
    done = run(*command, "--output", tmp_path / "part")
    assert done.code == 0
    assert re.search(r"28 examples at 3 points.*, 7 are done", done.err)
    assert read_rows(tmp_path / "part") == read_rows(tmp_path / "whole")
    rows = read_rows(tmp_path / "part")
    done = run(*command, "--validation", "validation", "--output", tmp_path / "part")
    assert done.code == 0, done.err
    assert re.search(r"42 examples at 3 points.*, 28 are done", done.err)
    assert [row["answers"] for row in read_rows(tmp_path / "part") if row["part"] == "test"] == [
        row["answers"] for row in rows
    ]
    other = run(*command[:-1], 5, "--output", tmp_path / "part")
    assert other.code == 2
    assert "--batch-size is 4 there and 5 here" in other.error


def test_processes_share_the_images(members: dict[str, str], pictures: Path, tmp_path: Path, run: Any) -> None:
    flags = [part for role, path in members.items() for part in (f"--{role.replace('_', '-')}", path)]
    images = ["--task", "image-classification", "--classes", tmp_path / "classes.txt"]
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    assert run("create", tmp_path / "ensemble", *images, *flags).code == 0
    command = ["sweep", tmp_path / "ensemble", "--images", pictures, "--alpha", "0,1", "--batch-size", 4]
    assert run(*command, "--output", tmp_path / "one").code == 0
    process = start(*command, "--output", tmp_path / "two", ranks=2, HF_HOME=str(tmp_path / "hf"))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert read_rows(tmp_path / "two") == read_rows(tmp_path / "one")


def test_broken_images_are_left_out_with_a_count_or_end_it(
    members: dict[str, str], pictures: Path, tmp_path: Path, run: Any
) -> None:
    for name in ("cat/001.png", "owl/003.png"):
        (pictures / "test" / name).write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    flags = [part for role, path in members.items() for part in (f"--{role.replace('_', '-')}", path)]
    assert run("create", tmp_path / "ensemble", "--task", "image-classification", *flags).code == 0
    command = ["sweep", tmp_path / "ensemble", "--images", pictures, "--alpha", "0,1", "--output", tmp_path / "out"]
    strict = run(*command)
    assert strict.code == 2
    assert strict.error.startswith("Error: cat/001.png is ")
    done = run(*command, "--validation", "validation", "--skip-bad")
    assert done.code == 0
    assert "skipped: cat/001.png is " in done.err
    assert "2 images cannot be read and are left out" in done.err
    assert "26 test documents; 14 others chose alpha" in done.out
    assert "\n2 images that cannot be read left out\n" in done.out
    ids = {row["id"] for row in read_rows(tmp_path / "out")}
    assert len(ids) == 26 + 14
    task = json.loads((tmp_path / "out" / "summary.json").read_text())["settings"]["tasks"]["pictures"]
    assert [said.split(" ")[0] for said in task["skipped"]] == ["cat/001.png", "owl/003.png"]


def test_what_cannot_be_swept_is_refused(members: dict[str, str], pictures: Path, tmp_path: Path, run: Any) -> None:
    done = run("sweep", "demo", "--images", pictures)
    assert done.code == 2
    assert "is an ensemble of language models, which see no images" in done.error
    for flags, option in ((["--task", "sst2"], "--task"), (["--num-fewshot", 0], "--num-fewshot")):
        done = run("sweep", "demo", "--images", pictures, *flags)
        assert (done.code, done.error) == (2, f"Error: {option} and --images were both given; give one of them")
    flags = [part for role, path in members.items() for part in (f"--{role.replace('_', '-')}", path)]
    assert run("create", tmp_path / "ensemble", "--task", "image-classification", *flags).code == 0
    command = ["sweep", tmp_path / "ensemble", "--images", pictures, "--output", tmp_path / "out"]
    for flags, words in (
        (["--select", "perplexity"], "images have no prompts whose likelihood could choose alpha"),
        (["--backend", "vllm"], "images are not run by vllm; leave --backend out"),
        (["--metric", "f1"], "has no metric 'f1'; it has acc, acc_top5, log_prob"),
    ):
        done = run(*command, *flags)
        assert done.code == 2
        assert words in done.error


def test_a_limited_sweep_is_of_its_seed_s_images(
    members: dict[str, str], pictures: Path, tmp_path: Path, run: Any
) -> None:
    flags = [part for role, path in members.items() for part in (f"--{role.replace('_', '-')}", path)]
    assert run("create", tmp_path / "ensemble", "--task", "image-classification", *flags).code == 0
    (pictures / "test" / "notes.txt").write_text("no image")
    (pictures / "test" / "cat" / "gone.jpg").symlink_to(pictures / "gone.jpg")
    command = ["sweep", tmp_path / "ensemble", "--images", pictures, "--alpha", "0,1", "--validation", "val"]
    command.append("--skip-bad")
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
