"""Tasks that run what a model wrote: on the flag alone, by lm-eval's own path, their pass@k as lm-eval has it."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import Run

pytest.importorskip("lm_eval")

from helpers.task_cases import evaluate, figures, figures_of, recorded, write_rows
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from ensembler.errors import ConfigError
from ensembler.evaluation.documents import choose_metric
from ensembler.evaluation.task_loading import load_tasks

EXAMPLE = Path(__file__).parents[2] / "examples" / "tasks" / "humaneval_pass10.yaml"
PROBLEMS = [
    {"prompt": "def twice(x):\n", "entry_point": "twice", "test": "def check(f):\n    assert f(2) == 4\n"},
    {"prompt": "def same(x):\n", "entry_point": "same", "test": "def check(f):\n    assert f(2) == 2\n"},
]
OWN = """
import math
from pathlib import Path

Path(__file__).with_name("imported").touch()

def build(resps, docs):
    return [[doc["prompt"] + text for text in texts] for texts, doc in zip(resps, docs)]

def passes(program):
    try:
        exec(program, {})
    except BaseException:
        return False
    return True

def pass_at_k(references, predictions, k):
    (reference,), (programs,) = references, predictions
    n, c = len(programs), sum(passes(f"{program}\\n{reference}") for program in programs)
    return {f"pass@{each}": 1 - math.comb(n - c, each) / math.comb(n, each) for each in k}
"""
TASK = """
task: tiny_code
unsafe_code: true
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{test}}\\ncheck({{entry_point}})"
repeats: 3
generation_kwargs: {until: ["\\ndef"], max_gen_toks: 8, do_sample: true, temperature: 0.8}
filter_list:
  - name: create_test
    filter: [{function: custom, filter_fn: !function own.build}]
metric_list:
  - {metric: !function own.pass_at_k, aggregation: mean, higher_is_better: true, k: [1, 2]}
"""
SAMPLES = ["    return 2 * x\n", "    return x\n", "    return (\n"]


class Writer(LM):
    """Writes the same programs for every problem."""

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return [SAMPLES[number % 3] for number in range(len(requests))]

    def loglikelihood(self, requests: list[Any]) -> Any: ...

    def loglikelihood_rolling(self, requests: list[Any]) -> Any: ...


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_rows(tmp_path / "rows.jsonl", PROBLEMS)
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "code.yaml").write_text(TASK)
    return tmp_path


def test_nothing_is_imported_before_the_flag(folder: Path, run: Run) -> None:
    assert "add --confirm-run-unsafe-code" in run("sweep", "demo", "--task", folder / "code.yaml").error
    for name, include_path in ((str(folder / "code.yaml"), None), ("tiny_code", folder)):
        with pytest.raises(ConfigError, match=r"runs code that the model wrote, .* add --confirm-run-unsafe-code$"):
            load_tasks([name], include_path=include_path)
    assert not (folder / "imported").exists()
    load_tasks([str(folder / "code.yaml")], confirm_run_unsafe_code=True)
    assert (folder / "imported").exists()


def test_pass_at_k_is_what_lm_eval_finds(folder: Path) -> None:
    (task,) = load_tasks([str(folder / "code.yaml")], confirm_run_unsafe_code=True)
    assert [metric.key for metric in task.metrics] == ["pass@1", "pass@2"]
    assert choose_metric(task, "pass@2").is_mean
    assert choose_metric(task, "pass@2").higher_is_better
    results = evaluate(
        Writer(),
        tasks=[task.task],
        task_manager=TaskManager(include_defaults=False),
        confirm_run_unsafe_code=True,
    )
    answers = recorded(results, task)
    assert answers == {0: [SAMPLES], 1: [SAMPLES]}
    found = figures(task, task.documents(), answers)
    assert found == figures_of(results, task) == {"pass@1": pytest.approx(1 / 3), "pass@2": pytest.approx(2 / 3)}
    assert task.aggregate("pass@2", [1.0, 0.0]) == 0.5  # of rows alone, by a run that has measured none itself
    assert task.standard_error("pass@2", [1.0, 0.0]) is not None


class CodeEval:
    """Stands for the metric that `evaluate` takes from the hub; it runs programs where the user allows it."""

    def compute(self, references: list[str], predictions: list[list[str]], k: list[int]) -> Any:
        if os.environ.get("HF_ALLOW_CODE_EVAL") != "1":
            raise ValueError('####\n!!!WARNING!!!\n####\nset the environment variable HF_ALLOW_CODE_EVAL="1"')
        counts = [(len(texts), sum("2 * x" in text for text in texts)) for texts in predictions]
        return {
            f"pass@{each}": sum(1 - math.comb(n - c, each) / math.comb(n, each) for n, c in counts) for each in k
        }, {}


def test_the_example_is_lm_evals_humaneval(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluate.load", lambda name: CodeEval())
    monkeypatch.delitem(sys.modules, "lm_eval.tasks.humaneval.utils", raising=False)
    (folder / "data" / "humaneval").mkdir(parents=True)
    write_rows(folder / "data" / "humaneval" / "HumanEval.jsonl", PROBLEMS)
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match="add --confirm-run-unsafe-code"):
        load_tasks([str(EXAMPLE)])
    assert "lm_eval.tasks.humaneval.utils" not in sys.modules
    with pytest.raises(ConfigError, match=r"allow it: HF_ALLOW_CODE_EVAL=1$"):
        load_tasks([str(EXAMPLE)], confirm_run_unsafe_code=True)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    (task,) = load_tasks([str(EXAMPLE)], confirm_run_unsafe_code=True)
    assert [metric.key for metric in task.metrics] == ["pass@10"]
    first, _ = task.documents()
    (request,) = first.requests
    assert request.repeats == 20
    assert request.args[1] == {
        "until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"],
        "max_gen_toks": 512,
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.95,
    }
    values, predictions = task.measure(first, [[SAMPLES[0], *SAMPLES[1:] * 9, SAMPLES[0]]])
    assert values == {"pass@10": pytest.approx(1 - math.comb(18, 10) / math.comb(20, 10))}
    assert predictions["create_test"].startswith("['def twice(x):\\n    return 2 * x")
