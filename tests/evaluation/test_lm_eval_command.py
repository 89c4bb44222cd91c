"""`--model ensembler` in lm-eval's own runs and command line: the figures of HFLM at that α, and of a sweep there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import Run

pytest.importorskip("lm_eval")

from helpers.sweep_cases import Ensemble, save_ensemble
from helpers.task_cases import evaluate, write_tasks
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from ensembler import EnsembleForCausalLM
from ensembler.demo import demo_folder
from ensembler.engine.grid import GridPoint
from ensembler.errors import ConfigError, MemberError
from ensembler.evaluation.grid_lm import GridLM
from ensembler.folder import write

NAMES = ["tiny_choice", "tiny_last_word", "tiny_text", "tiny_generate"]
DEMO = ["demo_sums", *NAMES]


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Ensemble:
    return save_ensemble(tmp_path_factory.mktemp("members"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tasks in the current folder, where lm-eval looks for their data."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("lm_eval.tasks.TaskManager", manager)
    folder = write_tasks(tmp_path / "tasks")
    monkeypatch.chdir(folder)
    return folder


def manager(**settings: Any) -> TaskManager:
    """A task manager without lm-eval's 14,000 own tasks, which it reads for seconds."""
    return TaskManager(**{**settings, "include_defaults": False})


def by_lm_eval(model: Any, folder: Path, tasks: list[str] | None = None, **settings: Any) -> dict[str, Any]:
    """The figures of lm-eval's run by task and metric."""
    results = evaluate(model, tasks=tasks or NAMES, task_manager=manager(include_path=str(folder)), **settings)
    return numbers(results)


def numbers(results: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{task} {key}": pytest.approx(value, rel=1e-5)
        for task, of_task in results["results"].items()
        for key, value in of_task.items()
        if isinstance(value, float) and "stderr" not in key
    }


def values(found: dict[str, Any]) -> dict[str, float]:
    return {key: value.expected for key, value in found.items()}


def test_a_folder_is_a_model_of_lm_eval(trio: Ensemble, folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "ensemble"
    write(trio.checked.config, place, trio.checked.tokenizer, trio.checked.generation_config)
    half, eft = (
        by_lm_eval(HFLM(pretrained=trio.at(point), tokenizer=trio.checked.tokenizer, device="cpu"), folder)
        for point in (GridPoint("base-change", 0.5), GridPoint("eft", 0.25))
    )
    assert values(half) != values(eft)
    given = f"pretrained={place},alpha=0.5"
    for settings in (
        {"model_args": given},
        {"model_args": given + ",dtype=float32", "device": "cpu", "batch_size": 3},
        {"model_args": given, "batch_size": "auto", "max_batch_size": 4},
        {"model_args": given, "use_cache": str(tmp_path / "answers")},
        {"model_args": given, "use_cache": str(tmp_path / "answers")},  # which are in it now
    ):
        assert values(by_lm_eval("ensembler", folder, **settings)) == half, settings
    assert (
        values(by_lm_eval("ensembler", folder, model_args={"pretrained": str(place), "rule": "eft", "alpha": 0.25}))
        == eft
    )


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            "alphas=0:1:0.1",
            ConfigError,
            r"^alphas were given .*; give alpha=NUMBER, .*: ensembler sweep FOLDER --alpha 0:1:0.1 --task TASK$",
        ),
        ("alfa=1", ConfigError, "^unknown model argument 'alfa'; expected pretrained, alpha, rule, device, dtype"),
        ("alpha=high", ConfigError, "alpha is 'high'; expected a finite number"),
        ("rule=best", ConfigError, "unknown rule 'best'; expected one of base-change"),
        ("think_end_token=x,pretrained=nowhere", ConfigError, "there is no folder nowhere; make one with"),
        ("rule=contrastive", (ConfigError, MemberError), "expert"),
    ],
)
def test_bad_model_arguments(given: str, error: Any, message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        get_model("ensembler").create_from_arg_string(
            f"pretrained=demo,{given}" if "pretrained" not in given else given
        )
    assert "\n" not in str(caught.value)


def test_a_bad_argument_is_one_line_of_the_command(folder: Path, run: Run) -> None:
    result = run(
        *("lm-eval", "run", "--model", "ensembler", "--model_args", "pretrained=demo,alphas=0:1:0.1"),
        *("--tasks", "tiny_choice", "--include_path", folder),
    )
    assert result.code == 2
    assert [line for line in result.err.splitlines() if line.startswith("Error: ")] == [result.err.splitlines()[-1]]
    assert "ensembler sweep FOLDER --alpha 0:1:0.1" in result.err


def test_lm_eval_finds_the_model_by_its_entry_point() -> None:
    (found,) = entry_points(group="lm_eval.models", name="ensembler")
    assert found.value == f"{GridLM.__module__}:{GridLM.__name__}"  # by which lm-eval knows what registered itself
    assert found.load() is GridLM is get_model("ensembler")


def command_line(output: Path) -> list[str]:
    arguments = ["lm-eval", "run", "--model", "ensembler", "--model_args", "pretrained=demo,alpha=0.7", "--limit", "5"]
    return [
        *arguments,
        *("--tasks", ",".join(DEMO)),
        *("--include_path", ".", "--output_path", str(output)),
        "--log_samples",
    ]


def start(folder: Path, output: Path, *launcher: str) -> subprocess.Popen[str]:
    variables = {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "ensembler", *command_line(output)],
        cwd=folder,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_command_in_one_process_and_in_two(folder: Path, tmp_path: Path, run: Run) -> None:
    for file in (demo_folder() / "data").iterdir():
        shutil.copy(file, folder)
    two = start(folder, tmp_path / "two", "-m", "torch.distributed.run", "--nproc-per-node", "2")
    one = run(*command_line(tmp_path / "one"))
    assert one.code == 0, one.err
    model = EnsembleForCausalLM.from_pretrained(demo_folder(), alpha=0.7)
    tokenizer = str(demo_folder())
    expected = by_lm_eval(HFLM(pretrained=model, tokenizer=tokenizer, device="cpu"), folder, DEMO, limit=5)
    once = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", add_bos_token=False)  # else texts begin twice
    expected |= by_lm_eval(once, folder, ["tiny_text"], limit=5)
    swept = run(
        *("sweep", "demo", "--alpha", "0.7", "--limit", "5", "--output", tmp_path / "swept", "--json"),
        *(part for name in DEMO for part in ("--task", name)),
        *("--include-path", folder, "--batch-size", "auto"),
    )
    assert swept.code == 0, swept.err
    for task in json.loads(swept.out)["tasks"]:
        (found,) = (method["test"]["estimate"] for method in task["methods"] if method["method"] == "base-change")
        key, _, filter_name = task["metric"].partition(",")
        (figure,) = (expected[one] for one in expected if one.startswith(f"{task['task']} {key},{filter_name}"))
        assert found == figure
    printed, _ = two.communicate(timeout=300)
    assert two.returncode == 0, printed
    for name in ("one", "two"):
        (path,) = (tmp_path / name).rglob("results_*.json")
        results = json.loads(path.read_text())
        assert values(numbers(results)) == expected
        assert results["config"]["vocabulary"] == "identical"
        (path,) = (tmp_path / name).rglob("samples_tiny_choice_*.jsonl")
        assert sorted(json.loads(line)["doc_id"] for line in path.read_text().splitlines()) == [0, 1, 2, 3, 4]
    assert "rank 1" in printed  # which has documents of its own
