"""The tasks in examples/tasks ask what lm-eval's own ask, on rows of local files in the columns that they name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

import lm_eval.tasks
from helpers.task_cases import write_rows
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks._yaml_loader import load_yaml

from ensembler.evaluation.documents import Answer, Document
from ensembler.evaluation.task_loading import load_tasks
from ensembler.evaluation.tasks import TextTask

FOLDER = Path(__file__).parents[2] / "examples" / "tasks"
THEIRS = Path(lm_eval.tasks.__file__).parent
_FLEXIBLE = "exact_match,flexible-extract"

# Rows of our own: ours with labels as files have them, and what the hub's data set gives for the same row.
CASES: dict[str, tuple[str, list[dict[str, Any]], list[dict[str, Any]]]] = {
    "boolq": (
        "super_glue/boolq/default.yaml",
        [{"passage": "Rain falls.", "question": "is it wet", "label": label} for label in ("true", "false")],
        [{"passage": "Rain falls.", "question": "is it wet", "label": label} for label in (1, 0)],
    ),
    "sst2": (
        "glue/sst2/default.yaml",
        [{"sentence": "a fine day ", "label": "1"}, {"sentence": "so dull ", "label": "0"}],
        [{"sentence": "a fine day ", "label": 1}, {"sentence": "so dull ", "label": 0}],
    ),
    "mrpc": (
        "glue/mrpc/default.yaml",
        [{"sentence1": "He ran.", "sentence2": "She ran.", "label": label} for label in "10"],
        [{"sentence1": "He ran.", "sentence2": "She ran.", "label": label} for label in (1, 0)],
    ),
    "wnli": (
        "glue/wnli/default.yaml",
        [{"sentence1": "It fell.", "sentence2": "The cup fell.", "label": label} for label in "01"],
        [{"sentence1": "It fell.", "sentence2": "The cup fell.", "label": label} for label in (0, 1)],
    ),
    "rte": (
        "glue/rte/default.yaml",
        [{"sentence1": "It fell.", "sentence2": "The cup fell.", "label": label} for label in "01"],
        [{"sentence1": "It fell.", "sentence2": "The cup fell.", "label": label} for label in (0, 1)],
    ),
    "winogrande": (
        "winogrande/default.yaml",
        [{"sentence": "The _ fell, it's old. ", "option1": "cup's", "option2": 'lid "x"', "answer": a} for a in "21"],
        [{"sentence": "The _ fell, it's old. ", "option1": "cup's", "option2": 'lid "x"', "answer": a} for a in "21"],
    ),
    "gsm8k": (
        "gsm8k/gsm8k.yaml",
        [{"question": "What is 1,000 + 2?", "answer": "It is 1,002.\n#### 1,002"}] * 2,
        [{"question": "What is 1,000 + 2?", "answer": "It is 1,002.\n#### 1,002"}] * 2,
    ),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def on_rows(yaml: Path, rows: list[dict[str, Any]], folder: Path, name: str) -> TextTask:
    """A task of a YAML file on other rows, all splits the same."""
    data = write_rows(folder / f"{name}.jsonl", rows)
    files = {split: str(data) for split in ("train", "validation", "test")}
    (folder / f"{name}.yaml").write_text(
        f"include: {yaml}\ntask: {name}\ndataset_path: json\ndataset_name: null\n"
        f"dataset_kwargs: {json.dumps({'data_files': files})}\nnum_fewshot: 0\n"
    )
    (task,) = load_tasks([str(folder / f"{name}.yaml")])
    return task


@pytest.mark.parametrize("name", CASES)
def test_examples_ask_what_lm_eval_asks(name: str, tmp_path: Path) -> None:
    theirs_at, rows, hub_rows = CASES[name]
    ours = on_rows(FOLDER / f"{name}.yaml", rows, tmp_path, "ours")
    theirs = on_rows(THEIRS / theirs_at, hub_rows, tmp_path, "theirs")
    assert ours.default_split == theirs.default_split
    assert ours.version == theirs.version
    for mine, other in zip(ours.documents(), theirs.documents(), strict=True):
        assert asked(mine) == asked(other)
        assert (mine.gold, mine.choices) == (other.gold, other.choices)
        for answers in answer_sheets(mine):
            values, _ = ours.measure(mine, answers)
            expected, _ = theirs.measure(other, answers)
            assert values == ({"exact_match": expected[_FLEXIBLE]} if name == "gsm8k" else expected)
    assert {metric.name for metric in ours.metrics} == {metric.name for metric in theirs.metrics}


def asked(document: Document) -> list[tuple[Any, ...]]:
    found = []
    for request in document.requests:
        text, *more = request.args
        if request.request_type == "generate_until":
            more = [{"temperature": 0.0, **normalize_gen_kwargs(*more)}]
        found.append((request.request_type, text, *more))
    return found


def answer_sheets(document: Document) -> list[Answer]:
    num = len(document.requests)
    if document.requests[0].request_type == "generate_until":
        return [[[text]] for text in (" It is 1002.", "$1,002", "1002 or 3", "none", "#### 1,002.")]
    return [[[-1.0 - (i != best), False] for i in range(num)] for best in range(num)]


def test_every_example_is_tested() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {*CASES, "humaneval_pass10"}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_data_are_named_beside_the_file_or_on_the_hub(path: Path) -> None:
    settings = load_yaml(path, resolve_func=False)
    files = (settings.get("dataset_kwargs") or {}).get("data_files", {})
    assert all(file.startswith("data/") for file in files.values())
    assert files or "/" in settings["dataset_path"]
    assert not list(FOLDER.rglob("*.jsonl"))
