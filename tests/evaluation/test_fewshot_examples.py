"""No question stands among its own solved examples, and all other prompts are those of lm-eval."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from helpers.task_cases import write_rows

from ensembler.errors import ConfigError
from ensembler.evaluation.lm_eval_settings import PromptSettings
from ensembler.evaluation.task_loading import load_tasks
from ensembler.evaluation.tasks import TextTask

_HEAD = """
task: sums
dataset_path: json
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: exact_match}]
"""
_CHOICE = """
task: choice
dataset_path: json
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}]
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def sums(num: int, seed: int = 0) -> list[dict[str, str]]:
    generator = random.Random(seed)
    pairs = [(generator.randrange(90), generator.randrange(90)) for _ in range(num)]
    return [{"question": f"{a} + {b} + {index} =", "answer": str(a + b + index)} for index, (a, b) in enumerate(pairs)]


def load(folder: Path, text: str, num_fewshot: int = 3, **rows: list[dict[str, Any]]) -> TextTask:
    files = {split: str(write_rows(folder / f"{split}.jsonl", of_split)) for split, of_split in rows.items()}
    path = folder / "task.yaml"
    path.write_text(f"{text}\ndataset_kwargs: {{data_files: {files}}}\n")
    (task,) = load_tasks([str(path)], PromptSettings(num_fewshot=num_fewshot))
    return task


def of_lm_eval(task: TextTask) -> list[str]:
    """The prompts that lm-eval makes by itself."""
    task.task.set_fewshot_seed(1234)
    return [task.task.fewshot_context(doc, task.num_fewshot) for doc in task.task.eval_docs]


def leaks(prompts: list[str], rows: list[dict[str, str]]) -> list[int]:
    """The numbers of the prompts that show their question before it is asked."""
    return [index for index, prompt in enumerate(prompts) if prompt.count(rows[index]["question"]) != 1]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("split", "more"),
    [
        ("test", "test_split: test"),
        ("test", "test_split: test\nfewshot_split: test"),
        ("test", "test_split: test\nfewshot_split: test\nfewshot_config: {sampler: first_n}"),
        ("validation", "validation_split: validation"),
        ("validation", "validation_split: validation\nfewshot_split: validation"),
    ],
)
def test_a_question_is_not_among_its_own_examples(
    split: str, more: str, seed: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = sums(9, seed)
    task = load(tmp_path, f"{_HEAD}{more}", **{split: rows})
    with caplog.at_level(logging.WARNING):
        prompts = [document.prompt for document in task.documents()]
    assert leaks(prompts, rows) == []
    assert {prompt.count("=") for prompt in prompts} == {4}
    expected = of_lm_eval(task)
    leaked = leaks(expected, rows)
    assert [index for index in range(9) if prompts[index] != expected[index]] == leaked
    said = f"{len(leaked)} questions stand among their own solved examples in lm-eval's prompts; here other examples"
    assert any(said in note for note in task.notes) == any(said in text for text in caplog.messages) == bool(leaked)
    again = load(tmp_path, f"{_HEAD}{more}", **{split: rows})
    assert [document.prompt for document in again.documents()] == prompts


def test_lm_eval_itself_shows_questions_their_answers(tmp_path: Path) -> None:
    """Without this, the test above would have nothing to find."""
    assert leaks(of_lm_eval(load(tmp_path, f"{_HEAD}test_split: test", test=sums(9))), sums(9))


def test_a_question_that_is_there_twice_is_not_shown(tmp_path: Path) -> None:
    """Under another number, which lm-eval takes for another document; with another answer it is one."""
    rows = [{"id": str(number), **row} for number, row in enumerate([*sums(5), *sums(5)])]
    more = f"{_HEAD}test_split: test\nfewshot_split: test"
    task = load(tmp_path, more, test=rows)
    assert leaks([document.prompt for document in task.documents()], rows) == []
    for row in rows[5:]:
        row["answer"] += "1"
    other = load(tmp_path, more, test=rows)
    assert [document.prompt for document in other.documents()] == of_lm_eval(other)


def test_examples_of_another_split_are_those_of_lm_eval_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = sums(6)
    more = f"{_HEAD}test_split: test\ntraining_split: train\nfewshot_split: train"
    task = load(tmp_path, more, num_fewshot=2, test=rows, train=[*rows[:3], *sums(3, 7)])
    with caplog.at_level(logging.WARNING):
        prompts = [document.prompt for document in task.documents()]
    assert prompts == of_lm_eval(task)
    leaked = leaks(prompts, rows)
    assert leaked
    said = f"{len(leaked)} questions stand among their own solved examples here as in lm-eval's prompts"
    assert said in task.notes[-1]
    assert any(said in text for text in caplog.messages)
    trained = task.documents("train")
    assert leaks([document.prompt for document in trained], [*rows[:3], *sums(3, 7)]) == []


def test_too_few_others_are_refused(tmp_path: Path) -> None:
    task = load(tmp_path, f"{_HEAD}test_split: test", num_fewshot=4, test=sums(4))
    with pytest.raises(ConfigError, match=r"no prompt could be made .* enough examples for few-shot"):
        task.documents()


# -- splits, right answers and choices of YAML tasks ------------------------------------------------------------------


@pytest.mark.parametrize("key", ["test_split", "validation_split", "training_split", "fewshot_split"])
def test_a_split_that_the_data_lack_is_named(key: str, tmp_path: Path) -> None:
    more = f"{key}: tset" if key == "test_split" else f"test_split: test\n{key}: tset"
    with pytest.raises(ConfigError, match=f"task sums has {key}: tset, which its data lack; give one of test, dev"):
        load(tmp_path, f"{_HEAD}{more}", test=sums(3), dev=sums(3))


def questions(*answers: Any) -> list[dict[str, Any]]:
    return [{"question": f"q{i}", "choices": ["a", "b", "c"], "answer": answer} for i, answer in enumerate(answers)]


@pytest.mark.parametrize("wrong", [3, -1, -3, 100])
def test_right_answers_out_of_range_are_told(wrong: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """lm-eval counts them as wrong in silence; labels of -1 are those that a data set hides."""
    text = f"{_CHOICE}test_split: test"
    task = load(tmp_path, text, 0, test=questions(2, wrong, 0))
    with caplog.at_level(logging.WARNING):
        documents = task.documents()
    assert [document.gold for document in documents] == ["c", None, "a"]
    assert f"choice/test/1: the right answer {wrong} is neither one of the choices" in caplog.text
    assert "1 of 3 documents are such, and count as wrong" in caplog.text
    answers = [[-1.0, False], [-2.0, False], [-0.5, False]]
    assert [task.measure(document, answers)[0]["acc"] for document in documents] == [1.0, 0.0, 0.0]
    refused = "of its first document is no index" if wrong > 0 else ".*; the same goes for all other documents"
    with pytest.raises(ConfigError, match=f"the right answer {wrong} {refused}"):
        load(tmp_path, text, 0, test=questions(wrong, wrong)).documents()


def test_null_among_choices_is_no_text(tmp_path: Path) -> None:
    rows = [*questions(0), {"question": "q", "choices": ["a", None], "answer": 0}]
    with pytest.raises(ConfigError, match="choice/test/1 has null among its choices; give it some text"):
        load(tmp_path, f"{_CHOICE}test_split: test", 0, test=rows).documents()
