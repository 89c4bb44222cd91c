"""HumanEval: programs are run when allowed, in the sandbox alone, and pass@k is the unbiased estimate."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

import lm_eval.tasks
from task_cases import write_rows

from ensembler.errors import ConfigError, RunError
from ensembler.evaluation import code_tasks
from ensembler.evaluation.code_tasks import build_programs, build_programs_from_chat, estimate, pass_at_k
from ensembler.evaluation.examples import Generation
from ensembler.evaluation.sandbox import Outcome
from ensembler.evaluation.task_loading import load_tasks
from ensembler.evaluation.tasks import EvalTask

EXAMPLE = Path(__file__).parent.parent / "examples" / "tasks" / "humaneval_pass10.yaml"
THEIRS = Path(lm_eval.tasks.__file__).parent / "humaneval"
# HumanEval/0, shortened (MIT, OpenAI), and one of our own.
PROBLEMS = [
    {
        "task_id": "HumanEval/0",
        "prompt": "from typing import List\n\n\n"
        "def has_close_elements(numbers: List[float], threshold: float) -> bool:\n"
        '    """ Check if in given list of numbers, are any two numbers closer to each other than\n'
        '    given threshold.\n    """\n',
        "entry_point": "has_close_elements",
        "test": "\n\ndef check(candidate):\n    assert candidate([1.0, 2.0, 3.9, 4.0, 5.0, 2.2], 0.3) == True\n"
        "    assert candidate([1.0, 2.0, 3.9, 4.0, 5.0, 2.2], 0.05) == False\n",
    },
    {
        "task_id": "own/1",
        "prompt": "def twice(x):\n",
        "entry_point": "twice",
        "test": "def check(candidate):\n    assert candidate(2) == 4\n",
    },
]
RIGHT = "    return any(abs(a - b) < threshold for i, a in enumerate(numbers) for b in numbers[:i])\n"
WRONG = ["    return True\n", "    while True: pass\n", "    return (\n", "    import sys; sys.exit(0)\n"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EvalTask:
    """The example of examples/tasks on two problems."""
    (tmp_path / "data" / "humaneval").mkdir(parents=True)
    write_rows(tmp_path / "data" / "humaneval" / "HumanEval.jsonl", PROBLEMS)
    monkeypatch.chdir(tmp_path)
    (task,) = load_tasks([str(EXAMPLE)], allow_code_execution=True)
    return task


def test_pass_at_10_of_20_samples(example: EvalTask) -> None:
    assert [metric.key for metric in example.metrics] == ["pass@10"]
    assert example.choose_metric().higher_is_better
    assert example.choose_metric().is_mean
    first, second = example.examples()
    (request,) = first.requests
    assert isinstance(request, Generation)
    assert (request.repeats, request.do_sample, request.temperature) == (20, True, 0.8)
    assert (request.max_new_tokens, dict(request.settings)) == (512, {"top_p": 0.95})
    measured = example.measure(first, [[RIGHT, *WRONG * 4, RIGHT, RIGHT, WRONG[0]]])
    expected = 1 - math.comb(17, 10) / math.comb(20, 10)
    assert measured.values == {"pass@10": pytest.approx(expected, abs=1e-12)}
    other = example.measure(second, [["    return 2 * x\n"] * 20])
    assert other.values == {"pass@10": 1.0}
    none = example.measure(second, [["    return x\n"] * 20])
    assert none.values == {"pass@10": 0.0}
    values = [json.loads(json.dumps(dict(one.values)))["pass@10"] for one in (measured, other)]
    assert example.aggregate("pass@10", values) == pytest.approx((expected + 1) / 2)
    assert example.standard_error("pass@10", values) is not None


def test_figures_of_rows_alone(example: EvalTask) -> None:
    """A run that goes on from its rows aggregates what it has not measured itself."""
    assert example.aggregate("pass@10", [1.0, 0.0]) == 0.5


def test_estimate_is_unbiased() -> None:
    """The estimate is the share of all k-subsets that hold a right sample."""
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
                assert estimate(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_equal_programs_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run(program: str) -> Outcome:
        ran.append(program)
        return Outcome("right" in program, "")

    monkeypatch.setattr(code_tasks, "run_program", run)
    found = pass_at_k(["test"], [["right", "wrong", "right", "right"]], [1, 2])
    assert found == {"pass@1": pytest.approx(0.75), "pass@2": pytest.approx(1.0)}
    assert sorted(ran) == ["right\ntest", "wrong\ntest"]
    assert pass_at_k(["test"], [["wrong"]], 1) == {"pass@1": 0.0}


def test_programs_of_samples() -> None:
    docs: list[dict[str, Any]] = [{"prompt": "a:"}, {"prompt": "b:"}]
    assert build_programs([["1", "2"], ["3"]], docs) == [["a:1", "a:2"], ["b:3"]]
    assert build_programs_from_chat([["1```x", "2"], ["3"]], docs) == [["a:1", "a:2"], ["b:3"]]


def test_nothing_runs_unless_allowed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(*_: Any) -> None:
        raise AssertionError("a program was run")

    monkeypatch.setattr("ensembler.evaluation.sandbox.run_program", run)
    monkeypatch.setattr(code_tasks, "run_program", run)
    for names, include_path in (([str(EXAMPLE)], None), (["humaneval"], THEIRS), (["humaneval_64_instruct"], THEIRS)):
        with pytest.raises(ConfigError, match="runs code that the model wrote; add --allow-code-execution"):
            load_tasks(names, include_path=include_path)


def local(tmp_path: Path, body: str) -> str:
    data = write_rows(tmp_path / "rows.jsonl", PROBLEMS)
    path = tmp_path / "own.yaml"
    path.write_text(f"{body}dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntask: own\n")
    return str(path)


@pytest.mark.parametrize(("name", "answer"), [("humaneval", RIGHT), ("humaneval_instruct", RIGHT + "```\nThat is it.")])
def test_the_tasks_of_lm_eval_run_in_the_sandbox(name: str, answer: str, tmp_path: Path) -> None:
    """Its own functions run a program when they are imported, and get their metric from the network."""
    (task,) = load_tasks([local(tmp_path, f"include: {THEIRS / name}.yaml\n")], allow_code_execution=True)
    assert [metric.key for metric in task.metrics] == ["pass@1"]
    first = task.examples()[0]
    assert task.measure(first, [[answer]]).values == {"pass@1": 1.0}
    assert task.measure(first, [[WRONG[0]]]).values == {"pass@1": 0.0}


def test_other_code_tasks_are_refused(tmp_path: Path) -> None:
    body = f"include: {THEIRS.parent / 'mbpp' / 'mbpp.yaml'}\n"
    with pytest.raises(ConfigError, match=r"of lm-eval runs code without limits; code tasks are those in the form of"):
        load_tasks([local(tmp_path, body)], allow_code_execution=True)
    body = f"include: {EXAMPLE}\nmetric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]\n"
    with pytest.raises(ConfigError, match="task own runs code by a metric of its own, without limits; use"):
        load_tasks([local(tmp_path, body)], allow_code_execution=True)


def test_own_functions_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def build(resps, docs):\n    return [[doc['prompt'] + '    return 4' for _ in r] "
        "for r, doc in zip(resps, docs)]\n"
    )
    body = f"include: {EXAMPLE}\nfilter_list:\n  - name: f\n"
    body += "    filter: [{function: custom, filter_fn: !function mine.build}]\n"
    (task,) = load_tasks([local(tmp_path, body)], allow_code_execution=True)
    assert task.measure(task.examples()[1], [["x"] * 20]).values == {"pass@10": 1.0}


def test_too_few_samples(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pass@10 needs 10 samples or more; 9 were made: raise the task's 'repeats'"):
        load_tasks([local(tmp_path, f"include: {EXAMPLE}\nrepeats: 9\n")], allow_code_execution=True)


def test_a_machine_without_a_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        raise RunError("programs cannot be run within limits here")

    monkeypatch.setattr(code_tasks, "check_sandbox", check)
    with pytest.raises(RunError, match="cannot be run within limits"):
        load_tasks([local(tmp_path, f"include: {EXAMPLE}\n")], allow_code_execution=True)
