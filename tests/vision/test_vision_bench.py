"""Benchmarks of image classifiers: a recipe run whole, and those of base-change's table 2 and of the digits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("PIL")
pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

from helpers.recipe_cases import plan, refusal
from helpers.sweep_cases import read_rows
from helpers.vision_cases import CLASSES, save_clip, save_head, save_images, save_vit, with_other_classifier

from ensembler.evaluation.recipe_file import read_recipe
from ensembler.evaluation.results_file import open_results
from ensembler.vision.answers import KINDS

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
TABLE = ("cifar100", "svhn", "resisc45", "sun397", "dtd", "cars")
Figures = dict[str, dict[str, dict[str, float]]]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    rows = read_rows(tmp_path / "out", "recipe.ensemble")
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


def test_the_page_shows_images_that_alpha_changed_and_the_paper_s_alpha(recipe: Path, tmp_path: Path, run: Any) -> None:
    content = yaml.safe_load(recipe.read_text())
    content["published_alphas"] = {"animals": {"eft": 0.7}}
    content["alpha"] = {"base-change": 3.0}
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    done = run("bench", recipe, "--output", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    (task,) = json.loads(done.out)["tasks"]
    eft = next(method for method in task["methods"] if method["method"] == "eft")
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert f"{eft['alpha']:g} (validation); published 0.7" in re.sub(r"<[^>]+>", "", page)
    rows = [row for row in read_rows(tmp_path / "out", "recipe.ensemble") if "/test/" in row["id"]]
    answers = {(row["id"], row["rule"], row["alpha"]): row["predictions"][""] for row in rows}
    for rule, alpha in (("base-change", 3.0), ("eft", eft["alpha"])):
        of = {name for name, its_rule, its_alpha in answers if (its_rule, its_alpha) == (rule, alpha)}
        num = sum(answers[name, rule, alpha] != answers[name, rule, 0.0] for name in of)
        assert num > 0
        assert f"α changed {num} of 21 answers" in page
    assert page.count("α changed ") == 2
    assert len(re.findall(r'src="data:image/png;base64,', page)) > 3


def test_two_folders_of_one_name_are_refused(recipe: Path, tmp_path: Path) -> None:
    save_images(tmp_path / "more" / "animals" / "validation", 1, seed=3)
    save_images(tmp_path / "more" / "animals" / "test", 2, seed=4)
    content = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**content, "tasks": ["animals", "more/animals"]}))
    assert "animals are both called 'animals', and their images would be taken for each other's" in refusal(recipe)
    (tmp_path / "others").symlink_to(tmp_path / "more" / "animals")
    recipe.write_text(yaml.safe_dump({**content, "tasks": ["animals", "others"]}))
    (study,) = plan(recipe).studies
    planned = study.plans[0]
    assert [task.task.name for task in planned.tasks] == ["animals", "others"]
    assert len({document.name for document, _ in planned.documents()}) == 21 + 14 + 14 + 7


def test_images_that_several_experiments_have_are_read_once(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**content, "experiments": [{"name": "a"}, {"name": "b", "batch_size": 4}]}))
    read: list[str] = []
    monkeypatch.setattr("ensembler.vision.image_tasks.decode", lambda content, name: read.append(name))
    assert [study.name for study in plan(recipe).studies] == ["a", "b"]
    assert len(read) == 21 + 14


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": {"clases": "x"}}, "images: unknown key 'clases'; did you mean classes?"),
        ({"speed": {"rounds": 2}}, "speed is measured of texts alone; leave it out"),
        ({"tasks": ["nothing"]}, "there is no folder nothing; give one with class/xxx.png"),
        ({"images": {"classes": "none.txt"}}, "none.txt cannot be read"),
        (
            {"images": None, "speed": False},
            "is an image model (vit); add --task image-classification (in a recipe: images",
        ),
        ({"published_alphas": {"animals": {"source_ft": 1}}}, "unknown method with an alpha 'source_ft'"),
        ({"published_alphas": {"cars": {"eft": 1}}}, "published figures of a task that is not run, 'cars'"),
        ({"published": {"cars": {"eft": 3}}}, "published figures of a task that is not run, 'cars'"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_told_in_one_line(change: dict[str, Any], words: str, recipe: Path) -> None:
    content = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**content, **change}))
    assert words in refusal(recipe)


# -- the recipes of the repository ------------------------------------------------------------------------------------


# Table 2 of the paper, typed from its text once more: per cent, and α in brackets. By pair of models: source FT, target
# PT, EFT, base-change; by data set in the order of TABLE.
SOURCE_FT = {
    "b16": "88.66 97.20 95.79 77.84 76.60 89.32",
    "l14": "90.61 97.71 95.95 80.64 81.86 93.69",
}
PRINTED = {
    "b16_laion-2b": (
        "76.83 50.05 68.24 19.15 56.60 88.47",
        "87.60 (0.7) 96.87 (0.8) 95.75 (0.9) 66.58 (0.8) 76.33 (0.5) 91.69 (0.5)",
        "88.82 (0.3) 97.22 (0.1) 95.87 (0.2) 78.02 (0.1) 76.44 (0.4) 89.93 (0.4)",
    ),
    "b16_datacomp-1b": (
        "82.11 62.72 69.14 19.47 57.77 88.86",
        "89.31 (0.5) 96.66 (1.5) 95.71 (0.7) 64.65 (0.8) 77.71 (0.5) 92.29 (0.4)",
        "89.29 (0.6) 97.21 (0.1) 95.81 (0.1) 77.99 (0.1) 76.91 (0.5) 89.90 (0.6)",
    ),
    "b16_l14-laion-400m": (
        "77.7 47.2 70.5 17.8 55.3 88.7",
        "88.00 (0.9) 96.60 (1.4) 95.68 (0.8) 66.69 (1.5) 77.82 (0.8) 93.25 (0.5)",
        "89.33 (0.3) 97.17 (0.4) 96.13 (0.7) 78.08 (0.1) 77.82 (0.5) 92.03 (0.8)",
    ),
    "b16_l14-laion-2b": (
        "77.42 49.54 68.87 18.34 60.48 89.60",
        "87.65 (0.7) 96.20 (1.1) 95.87 (0.8) 68.20 (1.0) 78.56 (0.6) 93.65 (0.4)",
        "89.13 (0.4) 97.21 (0.2) 95.94 (0.2) 78.25 (0.1) 77.13 (0.4) 92.33 (0.8)",
    ),
    "l14_laion-2b": (
        "78.33 52.69 71.21 21.64 61.54 91.51",
        "87.31 (0.5) 94.69 (0.5) 95.48 (0.7) 66.62 (0.8) 82.13 (0.9) 94.43 (0.5)",
        "90.52 (0.1) 97.64 (0.2) 95.97 (0.1) 80.73 (0.1) 82.66 (0.9) 93.53 (0.9)",
    ),
    "l14_datacomp-1b": (
        "78.33 52.69 71.21 21.64 61.54 91.51",
        "91.76 (0.4) 96.02 (1.2) 96.24 (0.5) 65.69 (0.9) 83.51 (0.9) 95.17 (0.5)",
        "91.43 (0.4) 97.70 (0.3) 95.98 (0.1) 80.73 (0.1) 82.82 (1.2) 94.42 (0.7)",
    ),
}


def figures(kind: str) -> Figures:
    """What the recipe has of table 2 by pair of models, data set and method: `published`, or `published_alphas`."""
    found: Figures = {}
    for experiment in read_recipe(RECIPES / "basechange_table2.yaml", KINDS).experiments:
        pair, _, data = experiment.name.partition(".")
        ((name, by_method),) = getattr(experiment, kind).items()
        assert name == data
        found.setdefault(pair, {})[data] = dict(by_method)
    return found


def test_the_figures_of_table_2_are_those_that_are_printed() -> None:
    accuracies: Figures = {}
    alphas: Figures = {}
    for pair, rows in PRINTED.items():
        lines = dict(zip(("source_ft", "target_pt", "eft", "base-change"), (SOURCE_FT[pair[:3]], *rows), strict=True))
        cells = {method: re.findall(r"([\d.]+)(?: \(([\d.]+)\))?", line) for method, line in lines.items()}
        for index, data in enumerate(TABLE):
            of = {method: row[index] for method, row in cells.items()}
            accuracies.setdefault(pair, {})[data] = {method: float(figure) for method, (figure, _) in of.items()}
            alphas.setdefault(pair, {})[data] = {method: float(alpha) for method, (_, alpha) in of.items() if alpha}
        assert all(len(row) == len(TABLE) for row in cells.values())
    assert figures("published") == accuracies
    assert figures("published_alphas") == alphas


def test_table_2_is_planned_whole_on_stand_ins(tmp_path: Path) -> None:
    recipe = read_recipe(RECIPES / "basechange_table2.yaml", KINDS)
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
    planned = plan(RECIPES / "basechange_table2.yaml")
    plans = [each for study in planned.studies for each in study.plans if each.run.instead_of is None]
    assert [each.name for each in plans] == [f"{experiment.name}.ensemble" for experiment in recipe.experiments]
    for each in plans:
        (task,) = each.tasks
        assert (len(task.subsets["validation"]), len(task.subsets["test"])) == (7, 14)
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
    digits = read_recipe(RECIPES / "digits.yaml", KINDS)
    assert len(digits.experiments) == 12
    assert all(experiment.validation == "validation" for experiment in digits.experiments)


# -- the digits -------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]


def test_accuracies_of_the_digits_are_means_over_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recomputed from the rows, choice of alpha on validation images included."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from rows_to_figures import read_figures

    tasks = read_figures("bench/digits")
    assert len(tasks) == 12
    with open_results(ROOT / "benchmarks" / "results" / "bench" / "digits") as results:
        runs = {name: f"{name}.ensemble" for name in tasks}
        rows = {name: (results.values(run, "acc"), results.points(run)) for name, run in runs.items()}
    for name, task in tasks.items():
        values, points = rows[name]
        right: dict[tuple[str, str, float], list[float]] = {}
        for document, of_points in values.items():
            for (rule, alpha), value in zip(points, of_points, strict=True):
                right.setdefault((document.split("/")[1], rule, alpha), []).append(value)
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


def test_the_digits_are_split_and_shifted_alike_in_every_order(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(ROOT / "examples")
    import make_digits_models as digits
    import numpy as np

    images, _, splits = digits.load_splits()
    assert sorted(np.concatenate(list(splits.values()))) == list(range(1797))
    assert {name: len(indices) for name, indices in splits.items()} == digits.SPLITS
    for name, shift in digits.TASKS.items():
        chosen = splits["test"][:20]
        shifted = digits.shifted(images, chosen, name, shift)
        assert shifted.dtype == np.uint8
        assert shifted.shape == (20, 8, 8)
        assert (shifted != images[chosen]).any(axis=(1, 2)).all()
        assert (digits.shifted(images, chosen[::-1], name, shift)[::-1] == shifted).all()
