"""Benchmarks of image classifiers: a recipe run whole, and those of base-change's table 2 and of the digits."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("PIL")
pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

from recipe_cases import refusal
from sweep_cases import read_rows
from vision_cases import CLASSES, save_clip, save_head, save_images, save_vit, with_other_classifier

from ensembler.evaluation.bench.bench import Bench
from ensembler.evaluation.bench.recipe_file import read_recipe

RECIPES = Path(__file__).parent.parent / "examples" / "recipes"
TABLE = ("cifar100", "svhn", "resisc45", "sun397", "dtd", "cars")
Figures = dict[str, dict[str, dict[str, float]]]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ensembler.vision.zero_shot.cache_folder", lambda: tmp_path / "heads")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A tuned head on a ViT, and a CLIP used zero-shot."""
    save_vit(tmp_path / "source_pt", 1)
    with_other_classifier(tmp_path / "source_pt", tmp_path / "source_ft", 4)
    save_clip(tmp_path / "target_pt", 2)
    save_images(tmp_path / "animals" / "validation", 2, seed=1)
    save_images(tmp_path / "animals" / "test", 3, seed=2)
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    content = {
        "images": {"classes": "classes.txt"},
        "models": {role: role for role in ("source_ft", "source_pt", "target_pt")},
        "tasks": ["animals"],
        "validation": "validation",
        "alphas": "0.5,1,1.5",
        "methods": ["source_ft", "source_pt", "target_pt", "eft", "base-change"],
        "published": {"animals": {"source_ft": 88.66, "base-change": 88.82}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return tmp_path / "recipe.yaml"


def test_a_recipe_of_image_classifiers_runs_whole(recipe: Path, tmp_path: Path, run: Any) -> None:
    plan = run("bench", recipe, "--dry-run")
    assert plan.code == 0, plan.err
    assert "animals (acc): 21 test examples, alpha chosen of 3 on 14 others" in plan.out
    done = run("bench", recipe, "--output", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    (task,) = json.loads(done.out)["tasks"]
    rows = read_rows(tmp_path / "out" / "runs" / "recipe.ensemble")
    assert {method["method"] for method in task["methods"]} == {
        "source_ft",
        "source_pt",
        "target_pt",
        "eft",
        "base-change",
    }
    for method in task["methods"]:
        point = {"source_ft": ("base-change", 0.0), "target_pt": ("eft", 0.0)}.get(method["method"])
        point = point or (method["method"], method["alpha"])
        found = [row["values"]["acc"] for row in rows if "/test/" in row["id"] and (row["rule"], row["alpha"]) == point]
        if method["method"] != "source_pt":  # which is a run of its own
            assert method["test"]["estimate"] == pytest.approx(sum(found) / 21)
    assert {each["comparison"]["test"] for each in task["differences"]} == {"exact McNemar"}
    again = run("bench", recipe, "--output", tmp_path / "out", "--json")
    assert json.loads(again.out)["tasks"] == json.loads(done.out)["tasks"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": {"clases": "x"}}, "images: unknown key 'clases'; did you mean classes?"),
        ({"speed": {"rounds": 2}}, "speed is measured of texts alone; leave it out"),
        ({"tasks": ["nothing"]}, "there is no folder nothing; give one with class/xxx.png"),
        ({"images": {"classes": "none.txt"}}, "none.txt cannot be read"),
        ({"published": {"cars": {"eft": 3}}}, "published figures of a task that is not run, 'cars'"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_told_in_one_line(change: dict[str, Any], words: str, recipe: Path) -> None:
    content = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**content, **change}))
    assert words in refusal(recipe)


# -- the recipes of the repository ------------------------------------------------------------------------------------


def figures() -> Figures:
    """The published figures of table 2 by pair of models, data set and method."""
    found: Figures = {}
    for experiment in read_recipe(RECIPES / "basechange_table2.yaml").experiments:
        pair, _, data = experiment.name.partition(".")
        ((name, by_method),) = experiment.published.items()
        assert name == data
        found.setdefault(pair, {})[data] = {method: float(figure) for method, figure in by_method.items()}  # type: ignore[arg-type]
    return found


def test_table_2_says_what_the_paper_s_text_says() -> None:
    found = figures()
    assert len(found) == 6
    assert all(tuple(of) == TABLE for of in found.values())
    for of in found.values():
        assert all(each["base-change"] > each["target_pt"] for each in of.values())  # "consistently outperforms"
        assert of["sun397"]["eft"] < of["sun397"]["source_ft"] - 9  # "significantly degrades the accuracy on SUN397"
        assert of["sun397"]["base-change"] > of["sun397"]["source_ft"]  # "keeps or slightly improves"
        assert of["cars"]["eft"] > of["cars"]["base-change"]  # "Cars are still suited to EFT"
    assert len({of["cifar100"]["source_ft"] for of in found.values()}) == 2  # one for each source
    arrows = {pair: [each["base-change"] > each["source_ft"] for each in of.values()] for pair, of in found.items()}
    assert arrows["b16_laion-2b"] == [True, True, True, True, False, True]
    assert arrows["l14_laion-2b"] == [False, False, True, True, True, False]
    assert found["l14_laion-2b"]["dtd"]["target_pt"] == found["l14_datacomp-1b"]["dtd"]["target_pt"]  # as it is printed


def test_table_2_is_planned_whole_on_stand_ins(tmp_path: Path) -> None:
    recipe = read_recipe(RECIPES / "basechange_table2.yaml")
    clip = save_clip(tmp_path / "clip", 1)
    save_head(clip / "head.safetensors", 12)
    here = tmp_path / "basechange"
    names = {member.model for experiment in recipe.experiments for member in experiment.models.values()}
    for name in names:
        assert name.startswith("./basechange/")
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(clip)
    assert len(names) == 12 + 6
    for kind in ("data", "classes", "templates"):
        (here / kind).mkdir()
    for data in TABLE:
        (here / "classes" / f"{data}.json").write_text(json.dumps({name: f"{name} x" for name in CLASSES}))
        (here / "templates" / f"{data}.txt").write_text("a photo of a {}\nart of a {}\n")
        for part, num in (("validation", 1), ("test", 2)):
            save_images(here / "data" / data / part, num, seed=num)
    planned = Bench(read_recipe(RECIPES / "basechange_table2.yaml"))
    ensembles = [each for each in planned.runs if each.instead_of is None]
    assert [each.name for each in ensembles] == [f"{experiment.name}.ensemble" for experiment in recipe.experiments]
    for each in ensembles:
        (task,) = each.sweep.tasks
        assert (len(task.parts.validation), len(task.parts.test)) == (7, 14)
        assert each.checked.config.templates == ["a photo of a {}", "art of a {}"]
        assert {role: files.kind for role, files in each.checked.files.items()} == {  # type: ignore[attr-defined]
            "source_ft": "head",
            "source_pt": "zero-shot",
            "target_pt": "zero-shot",
        }


def test_the_recipes_tell_their_source_and_what_to_bring() -> None:
    header = (RECIPES / "basechange_table2.yaml").read_text("utf-8").split("\nname:")[0].replace("\n# ", " ")
    assert "Source: Chijiwa et al." in header
    for folder in ("./basechange/clip-MODEL-DATA", "./basechange/DATASET-MODEL", "./basechange/data/DATASET"):
        assert folder in header
    assert all(re.search(rf"\b{data}\b", header) for data in TABLE)
    digits = read_recipe(RECIPES / "digits.yaml")
    assert len(digits.experiments) == 12
    assert all(experiment.validation == "validation" for experiment in digits.experiments)


# -- the digits -------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parent.parent
DIGITS = ROOT / "benchmarks" / "results" / "bench" / "digits"


def test_the_tables_of_the_digits_are_those_of_the_committed_results() -> None:
    command = [sys.executable, ROOT / "benchmarks" / "digits_tables.py"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(lines) > 30
    page = (ROOT / "docs" / "vision.md").read_text("utf-8").splitlines()
    assert [line for line in lines if line not in page] == []


def test_the_committed_rows_give_the_committed_accuracies() -> None:
    """Recomputed from the rows alone, choice of alpha on validation images included."""
    tasks = json.loads((DIGITS / "summary.json").read_text("utf-8"))["tasks"]
    assert len(tasks) == 12
    for task in tasks:
        content = (DIGITS / "runs" / f"{task['experiment']}.ensemble.rows.jsonl.gz").read_bytes()
        right: dict[tuple[str, str, float], list[float]] = {}
        for row in map(json.loads, gzip.decompress(content).decode().splitlines()):
            right.setdefault((row["id"].split("/")[1], row["rule"], row["alpha"]), []).append(row["values"]["acc"])
        accuracy = {key: sum(values) / len(values) for key, values in right.items()}
        methods = {one["method"]: one for one in task["methods"]}
        for rule in ("base-change", "eft"):
            alphas = [round(0.1 * k, 1) for k in range(1, 16)]
            best = max(alphas, key=lambda alpha: (accuracy["validation", rule, alpha], -alpha))
            assert methods[rule]["alpha"] == best
            assert methods[rule]["test"]["estimate"] == pytest.approx(accuracy["test", rule, best])
        assert methods["source_ft"]["test"]["estimate"] == pytest.approx(accuracy["test", "base-change", 0.0])
        assert methods["target_pt"]["test"]["estimate"] == pytest.approx(accuracy["test", "eft", 0.0])
        assert {len(values) for key, values in right.items() if key[0] == "test"} == {747}


def test_the_digits_are_parted_and_changed_alike_in_every_order(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(ROOT / "examples")
    import make_digits_models as digits
    import numpy as np

    images, _, parts = digits.load_parts()
    assert sorted(np.concatenate(list(parts.values()))) == list(range(1797))
    assert {name: len(indices) for name, indices in parts.items()} == digits.PARTS
    for name, change in digits.TASKS.items():
        some = parts["test"][:20]
        shifted = digits.changed(images, some, name, change)
        assert shifted.dtype == np.uint8
        assert shifted.shape == (20, 8, 8)
        assert (shifted != images[some]).any(axis=(1, 2)).all()
        assert (digits.changed(images, some[::-1], name, change)[::-1] == shifted).all()
