"""Cases for the tests of tasks: YAML tasks of every output type on small files, and lm-eval's own run of them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ensembler.evaluation.documents import Answer, Document
from ensembler.evaluation.tasks import TextTask

QUESTIONS = [
    {"question": "abc", "choices": ["de", "f", "ghi"], "answer": 0},
    {"question": "the cat", "choices": ["sat", "r", "42"], "answer": 1},
    {"question": "z 9", "choices": ["x", "yy", "zzz"], "answer": 2},
    {"question": "one and two", "choices": ["3", "4", "55"], "answer": 0},
    {"question": "q", "choices": ["aa", "b", "c"], "answer": 1},
    {"question": "qu #7", "choices": ["aa", "b b", "c"], "answer": 2},
    {"question": "mno p", "choices": ["1", "2", "three"], "answer": 1},
]
PAIRS = [
    {"sentence1": f"the {a}", "sentence2": f"a {b}", "label": str(i % 3 % 2)}
    for i, (a, b) in enumerate(
        zip(["cat", "dog", "cow", "hen", "emu", "fox"], ["bat", "log", "cow", "pen", "emu", "box"], strict=True)
    )
]
TEXTS = [{"text": "once upon a time " * n + "end"} for n in (1, 3, 12, 2)]

_HEAD = """
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}.jsonl, train: train_{file}.jsonl}}}}
test_split: test
training_split: train
fewshot_split: train
output_type: {output_type}
"""
_BODIES = {
    "choice": (
        "questions",
        "multiple_choice",
        """
doc_to_text: "ask {{question}} say"
doc_to_choice: choices
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
  - {metric: brier_score, aggregation: brier_score, higher_is_better: false}
""",
    ),
    "mutual": (
        "questions",
        "multiple_choice",
        """
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_mutual_info, aggregation: mean, higher_is_better: true}
""",
    ),
    "inputs": (
        "questions",
        "multiple_choice",
        """
doc_to_text: "{{answer}}"
doc_to_choice: choices
doc_to_target: "{{question}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    ),
    "targets": (
        "questions",
        "generate_until",
        """
doc_to_text: "{{question}}"
doc_to_target: "{{choices}}"
repeats: 2
generation_kwargs: {until: [" "], max_gen_toks: 5, do_sample: true, temperature: 0.9}
filter_list:
  - name: first
    filter: [{function: take_first}]
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
    ),
    "translate": (
        "questions",
        "generate_until",
        """
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 9, do_sample: false}
metric_list:
  - {metric: bleu, aggregation: bleu, higher_is_better: true}
  - {metric: chrf, aggregation: chrf, higher_is_better: true}
""",
    ),
    "pairs": (
        "pairs",
        "multiple_choice",
        """
doc_to_text: "{{sentence1}} and {{sentence2}}"
doc_to_choice: ["no", "yes"]
doc_to_target: "{{label}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: f1, aggregation: f1, higher_is_better: true}
""",
    ),
    "generate": (
        "questions",
        "generate_until",
        """
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["e", "#"], max_gen_toks: 9, do_sample: false}
filter_list:
  - name: number
    filter: [{function: regex, regex_pattern: "([0-9])"}, {function: take_first}]
  - name: letters
    filter: [{function: regex, regex_pattern: "([a-z]+)", fallback: "none"}, {function: take_first}]
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}
""",
    ),
    "last_word": (
        "questions",
        "loglikelihood",
        """
doc_to_text: "{{question}}"
doc_to_target: " {{choices[answer]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    ),
    "text": (
        "texts",
        "loglikelihood_rolling",
        """
doc_to_text: ""
doc_to_target: text
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
    ),
}
TASKS = tuple(_BODIES)
FEWSHOT_TASKS = tuple(task for task in TASKS if task != "text")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def write_tasks(folder: Path) -> Path:
    """A folder with a YAML file for each of `TASKS` and their data, found beside it."""
    folder.mkdir()
    for name, rows in (("questions", QUESTIONS), ("pairs", PAIRS), ("texts", TEXTS)):
        write_rows(folder / f"{name}.jsonl", rows[:-2])
        write_rows(folder / f"train_{name}.jsonl", rows[-4:])
    for task, (file, output_type, body) in _BODIES.items():
        text = _HEAD.format(task=f"tiny_{task}", file=file, output_type=output_type) + body
        (folder / f"{task}.yaml").write_text(text, "utf-8")
    return folder


def run_lm_eval(
    task: TextTask,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_length: int | None = None,
    bootstrap_iters: int = 0,
) -> dict[str, Any]:
    """lm-eval's own evaluation of the same task, the model in a plain HFLM."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    return evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu", max_length=max_length),
        tasks=[task.task],
        task_manager=TaskManager(include_defaults=False),
        limit=task.settings.limit,
        bootstrap_iters=bootstrap_iters,
        apply_chat_template=task.settings.apply_chat_template,
        fewshot_as_multiturn=task.settings.fewshot_as_multiturn,
        system_instruction=task.settings.system_instruction,
    )


def evaluate(model: Any, **settings: Any) -> dict[str, Any]:
    """`lm_eval.simple_evaluate`."""
    from lm_eval import simple_evaluate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # it asks pip, for more than a second
        found = simple_evaluate(model, **{"bootstrap_iters": 0, **settings})
    assert found is not None
    return dict(found)


def recorded(results: Mapping[str, Any], task: TextTask) -> dict[int, Answer]:
    """The answers to each document of lm-eval's run, before filters."""
    is_text = task.task.OUTPUT_TYPE == "generate_until"
    return {
        sample["doc_id"]: [list(each) if is_text else each[0] for each in sample["resps"]]
        for sample in results["samples"][task.name]
    }


def figures(task: TextTask, documents: Sequence[Document], answers: Mapping[int, Answer]) -> dict[str, float]:
    """Every metric of a task, by way of rows of JSON."""
    rows: dict[str, list[Any]] = defaultdict(list)
    for document in documents:
        values, _ = task.measure(document, answers[document.index])
        for key, value in json.loads(json.dumps(values, allow_nan=False)).items():
            rows[key].append(value)
    return {key: task.aggregate(key, values) for key, values in rows.items()}


def figures_of(results: Mapping[str, Any], task: TextTask) -> dict[str, float]:
    """The figures of lm-eval's run by the keys of `figures`."""
    several = len({metric.filter for metric in task.metrics}) > 1
    return {
        key if several else key.rpartition(",")[0]: value
        for key, value in results["results"][task.name].items()
        if "," in key and "_stderr," not in key
    }
