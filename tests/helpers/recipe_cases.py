"""Cases for the tests of recipes: tiny models of every role, a task, and a recipe of them that is right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.adapter_cases import save_adapter, save_base
from helpers.task_cases import write_tasks
from helpers.tiny import make_model, make_tokenizer

from ensembler.errors import EnsemblerError
from ensembler.evaluation.benchmark import Bench
from ensembler.evaluation.recipe_file import read_recipe
from ensembler.vision.answers import KINDS, ImageExperiment, ImageModels

Content = dict[str, Any]
Change = Callable[[Content], object]


def save_roles(folder: Path) -> Path:
    """Models of every role in `folder`, and some that do not fit them; the tasks of `task_cases` in folder/tasks."""
    for seed, name in enumerate(("source_ft", "source_pt", "target_pt", "direct"), start=1):
        save_base(folder / name, seed=seed)
    save_adapter(folder / "source_pt", folder / "patch")
    save_base(folder / "wider", hidden_size=24)
    save_adapter(folder / "wider", folder / "wider_patch")
    make_model().save_pretrained(folder / "swapped")
    make_tokenizer(swapped=True).save_pretrained(folder / "swapped")
    write_tasks(folder / "tasks")
    return folder


def good(folder: Path) -> Content:
    """A recipe of all methods, to be spoilt."""
    models = {role: str(folder / role) for role in ("source_ft", "source_pt", "target_pt", "patch", "direct")}
    return {
        "models": models,
        "tasks": [str(folder / "tasks" / "pairs.yaml")],
        "validation": "train",
        "alphas": "0.5:1:0.5",
        "published": {"tiny_pairs": {"patch": {"acc": 50.0, "f1": 0.5}, "direct": 75}},
        "published_costs": {"patch": {"peak_device_bytes": 10**9}},
        "source": "a paper, table 7",
        "speed": {"rounds": 2},
    }


def spoilt(content: Content, change: Change) -> Content:
    """A copy that `change` has edited."""
    copied = copy.deepcopy(content)
    change(copied)
    return copied


def write_recipe(path: Path, content: Content) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False), "utf-8")
    return path


def plan(path: Path) -> Bench:
    """What `bench --dry-run` does before it prints."""
    return Bench(read_recipe(path, KINDS), models={ImageExperiment: ImageModels()})


def refusal(path: Path, read: Callable[[Path], object] = plan) -> str:
    """The one line with which a dry run, or what reads the file, refuses a recipe."""
    with pytest.raises(EnsemblerError) as found:
        read(path)
    assert found.value.exit_code == 2
    assert "\n" not in str(found.value)
    return str(found.value)
