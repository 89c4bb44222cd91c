"""Curves of a sweep in Weights & Biases and TensorBoard, by stand-ins for their libraries."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from helpers.sweep_cases import data_flags, save_ensemble, write_questions

WANDB = """
calls = []

class Run:
    summary = {}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        calls.append(("finish", self.summary))

    def define_metric(self, name, step_metric):
        calls.append(("define_metric", name, step_metric))

    def log(self, values):
        calls.append(("log", values))

def init(**settings):
    calls.append(("init", settings))
    return Run()
"""


@pytest.fixture
def logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The calls of the two libraries, in their order."""
    (tmp_path / "fakes" / "tensorboard").mkdir(parents=True)
    (tmp_path / "fakes" / "tensorboard" / "__init__.py").write_text("")
    (tmp_path / "fakes" / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path / "fakes")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    import wandb

    calls: list[tuple[Any, ...]] = wandb.calls

    class Writer:
        def __init__(self, folder: str) -> None:
            calls.append(("open", folder))

        def __enter__(self) -> Writer:
            return self

        def __exit__(self, *error: object) -> None:
            calls.append(("close",))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            calls.append(("add", name, value, step))

    board = ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    return calls


def test_the_curve_is_logged_where_it_is_asked_for(
    logged: list[tuple[Any, ...]], tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = [*save_ensemble(tmp_path / "members").flags, *data_flags(write_questions(tmp_path / "q.jsonl", 30))]
    command = ["sweep", *flags, "--alpha", "0,0.5,1", "--validation", 10]
    assert run(*command, "--log", "wandb", "--log", "tensorboard").code == 0
    summary = json.loads(Path("sweep/summary.json").read_text())
    (task,) = summary["tasks"]
    expected = {}
    for point in task["curve"]:
        for name, value in (
            ("test", point["test"]["estimate"]),
            ("test low", point["test"]["low"]),
            ("test high", point["test"]["high"]),
            ("validation", point["validation"]),
        ):
            expected[f"q/acc/base-change/{name}", point["alpha"]] = value
    assert len(expected) == 12
    by_kind: dict[str, list[Any]] = {}
    for kind, *content in logged:
        by_kind.setdefault(kind, []).append(content)
    assert list(by_kind) == ["init", "define_metric", "log", "finish", "open", "add", "close"]
    assert by_kind["init"] == [
        [{"project": "ensembler", "name": "sweep", "dir": "sweep", "config": summary["settings"]}]
    ]
    assert by_kind["define_metric"] == [["*", "alpha"]]
    found = {}
    for (values,) in by_kind["log"]:
        alpha = values.pop("alpha")
        ((name, value),) = values.items()
        found[name, alpha] = value
    assert found == expected
    (chosen,) = [method["alpha"] for method in task["methods"] if method["chosen_by"]]
    assert by_kind["finish"] == [[{"q/base-change/chosen alpha": chosen}]]
    assert by_kind["open"] == [["sweep/tensorboard"]]
    assert {(name, step / 1000): value for name, value, step in by_kind["add"]} == expected
    logged.clear()
    assert run(*command).code == 0
    assert logged == []


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_library_that_is_missing_is_told_before_anything_is_run(
    name: str, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ensembler.evaluation.results_export.find_spec", lambda name: None)
    done = run("sweep", "demo", "--log", name, "--output", tmp_path / "out")
    assert done.code == 2
    assert done.error == (
        f"Error: --log {name} needs its library, which is not installed; install it with: pip install {name}"
    )
    assert not (tmp_path / "out").exists()
