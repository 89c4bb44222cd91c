"""Tasks give lm-eval's own figures: its answers through our rows come to its results, for every output type."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import Run
from helpers.tiny import make_model
from transformers import PreTrainedModel, PreTrainedTokenizerFast

pytest.importorskip("lm_eval")

from helpers.task_cases import (
    FEWSHOT_TASKS,
    QUESTIONS,
    TASKS,
    figures,
    figures_of,
    recorded,
    run_lm_eval,
    write_rows,
    write_tasks,
)

from ensembler.errors import ConfigError, RunError
from ensembler.evaluation.documents import Answer, Document, Metric, choose_metric, from_json, to_json
from ensembler.evaluation.lm_eval_settings import PromptSettings
from ensembler.evaluation.task_loading import load_tasks
from ensembler.evaluation.tasks import TextTask


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tasks(tmp_path / "tasks")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model("llama", 5, max_position_embeddings=96)


def load(folder: Path, name: str, **settings: Any) -> TextTask:
    (task,) = load_tasks([str(folder / f"{name}.yaml")], PromptSettings(**settings))
    return task


@pytest.mark.parametrize("num_fewshot", [None, 2])
@pytest.mark.parametrize("name", TASKS)
def test_the_figures_are_those_of_lm_eval(
    name: str, num_fewshot: int | None, folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    if num_fewshot and name not in FEWSHOT_TASKS:
        pytest.skip("no few-shot examples in a text")
    task = load(folder, name, num_fewshot=num_fewshot, limit=4)
    documents = task.documents()
    assert [document.name for document in documents] == [f"tiny_{name}/test/{i}" for i in range(len(documents))]
    results = run_lm_eval(task, model, tokenizer)
    assert arguments(documents) == asked(results, task)
    found = figures(task, documents, recorded(results, task))
    assert found == figures_of(results, task)
    assert {metric.key for metric in task.metrics} == set(found)


@pytest.mark.parametrize(
    "change",
    [
        {"test_split: test": "validation_split: test"},
        {"fewshot_split: train\n": ""},
        {"test_split: test": "validation_split: test", "fewshot_split: train\n": ""},
        {"test_split: test": "validation_split: test", "training_split: train\nfewshot_split: train\n": ""},
        {"fewshot_split: train": "fewshot_split: test"},
        {"output_type": "fewshot_config: {sampler: first_n}\noutput_type"},
        {"output_type": 'description: "Say it."\nfewshot_delimiter: "#"\ngen_prefix: so\noutput_type'},
    ],
)
def test_few_shot_prompts_are_those_of_lm_eval(
    change: dict[str, str], folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = folder / "choice.yaml"
    text = path.read_text()
    for old, new in change.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    task = load(folder, "choice", num_fewshot=2)
    results = run_lm_eval(task, model, tokenizer)
    documents = task.documents()
    assert arguments(documents) == asked(results, task)
    assert figures(task, documents, recorded(results, task)) == figures_of(results, task)


def arguments(documents: list[Document]) -> list[list[tuple[Any, ...]]]:
    """The requests of lm-eval's instances for each document."""
    return [[tuple(request.args) for request in document.requests] for document in documents]


def asked(results: dict[str, Any], task: TextTask) -> list[list[tuple[Any, ...]]]:
    """The same of lm-eval's own run."""
    samples = {sample["doc_id"]: sample["arguments"] for sample in results["samples"][task.name]}
    return [[tuple(each) for each in samples[index]] for index in sorted(samples)]


def test_standard_errors_are_those_of_lm_eval(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, num in (("choice", 5), ("pairs", 4), ("last_word", 5)):
        task = load(folder, name)
        results = run_lm_eval(task, model, tokenizer, bootstrap_iters=50)
        answers, documents = recorded(results, task), task.documents()
        assert len(documents) == num
        capfd.readouterr()
        for metric in task.metrics:
            values = [task.measure(document, answers[document.index])[0][metric.key] for document in documents]
            expected = results["results"][task.name][f"{metric.name}_stderr,none"]
            found = task.standard_error(metric.key, values, num_resamples=50)
            assert found == (None if expected == "N/A" else expected), (name, metric)
        assert capfd.readouterr() == ("", "")


def test_what_a_task_tells_of_itself(folder: Path) -> None:
    task = load(folder, "generate")
    assert (task.name, task.version, task.num_fewshot) == ("tiny_generate", "Yaml", 0)
    assert task.splits == {"test": 5, "train": 4}
    assert task.default_split == "test"
    assert [metric.key for metric in task.metrics] == ["exact_match,number", "exact_match,letters"]
    assert choose_metric(task, "exact_match,letters") == Metric(
        "exact_match,letters", "exact_match", "letters", higher_is_better=True, is_mean=True
    )
    assert choose_metric(task, None) == task.metrics[0]
    with pytest.raises(ConfigError, match=r"no metric 'f1'; it has exact_match,number, exact_match,letters"):
        choose_metric(task, "f1")
    pairs = load(folder, "pairs")
    assert [metric.is_mean for metric in pairs.metrics] == [True, False]
    text = load(folder, "text")
    assert [metric.higher_is_better for metric in text.metrics] == [False] * 3


def test_predictions_and_right_answers_as_texts(folder: Path) -> None:
    task = load(folder, "choice")
    document = task.documents()[1]
    assert (document.choices, document.gold) == (("sat", "r", "42"), "r")
    assert document.content["question"] == "the cat"
    values, predictions = task.measure(document, [[-3.0, False], [-1.0, False], [-1.0, True]])
    assert predictions == {"none": "r"}
    assert values["acc"] == 1.0
    generate = load(folder, "generate")
    document = generate.documents()[1]
    values, predictions = generate.measure(document, [["so 1 or 2"]])
    assert predictions == {"number": "1", "letters": "so"}
    assert values == {"exact_match,number": 1.0, "exact_match,letters": 0.0}
    assert document.gold == "1"
    for name, answers in (("last_word", [[-3.2, True]]), ("text", [-3.2])):
        task = load(folder, name)
        values, predictions = task.measure(task.documents()[0], answers)
        assert predictions == {}, "a log-prob alone is no answer"
        assert values.keys() == {metric.key for metric in task.metrics}


def test_answers_are_not_kept(folder: Path) -> None:
    """One document is measured for every α: what was answered for one must not reach another."""
    task = load(folder, "generate")
    (document, *_) = task.documents()
    right, wrong = [["0"]], [["1"]]
    for answers, value in ((right, 1.0), (wrong, 0.0), (right, 1.0)):
        assert task.measure(document, answers)[0]["exact_match,number"] == value


def test_an_impossible_answer_is_kept_in_rows(folder: Path) -> None:
    """An ensemble may forbid a token: log-prob −inf."""
    task = load(folder, "last_word")
    values, _ = task.measure(task.documents()[0], [[-math.inf, False]])
    line = json.dumps(values, allow_nan=False)
    assert task.aggregate("perplexity", [json.loads(line)["perplexity"]]) == math.inf


def test_prompts_are_the_same_again(folder: Path) -> None:
    whole = load(folder, "choice", num_fewshot=2)
    expected = arguments(whole.documents())
    whole.documents("train")
    assert arguments(whole.documents()) == arguments(load(folder, "choice", num_fewshot=2).documents()) == expected
    for limit in (2, 0.4):
        assert arguments(load(folder, "choice", num_fewshot=2, limit=limit).documents()) == expected[:2]


def test_an_example_is_not_shown_to_itself(folder: Path) -> None:
    task = load(folder, "choice", num_fewshot=3)
    assert task.splits["train"] == 4
    for row, document in zip(QUESTIONS[-4:], task.documents("train"), strict=True):
        assert document.prompt.count(f"ask {row['question']} say") == 1
        assert document.name.startswith("tiny_choice/train/")
        assert document.prompt.count("ask ") == 4
    with pytest.raises(ConfigError, match="enough examples for few-shot") as caught:
        load(folder, "choice", num_fewshot=4).documents("train")
    assert "\n" not in str(caught.value)


def test_rows_of_random_values() -> None:
    numpy = pytest.importorskip("numpy")
    draw = random.Random(0)

    def value(depth: int) -> Any:
        kind = draw.randrange(9 if depth else 6)
        simple = [1, -2.5, "text", None, True, math.inf]
        if kind < 6:
            return simple[kind]
        inner = [value(depth - 1) for _ in range(draw.randrange(3))]
        return [inner, {str(i): item for i, item in enumerate(inner)}, inner][kind - 6]

    for _ in range(500):
        given = value(3)
        assert from_json(json.loads(json.dumps(to_json(given, "x"), allow_nan=False))) == given
    assert to_json((numpy.int64(1), numpy.array([0.5, 1.0]), numpy.bool_(True)), "x") == [1, [0.5, 1.0], True]
    assert math.isnan(from_json(to_json(numpy.float32("nan"), "x")))
    with pytest.raises(RunError, match=r"acc of a/test/0 has the value .* \(set\), which no row can hold"):
        to_json({1, 2}, "acc of a/test/0")


def test_names_of_an_include_path(folder: Path) -> None:
    (folder / "both.yaml").write_text("group: tiny_both\ntask: [tiny_choice, tiny_text]\n")
    (folder / "pairs.yaml").write_text((folder / "pairs.yaml").read_text() + "tag: [tiny_tag]\n")
    assert [task.name for task in load_tasks(["tiny_pairs"], include_path=folder)] == ["tiny_pairs"]
    assert [task.name for task in load_tasks(["tiny_tag"], include_path=folder)] == ["tiny_pairs"]


def test_groups_are_expanded(folder: Path) -> None:
    data = {name: str(folder / f"{name}.jsonl") for name in ("questions", "pairs")}
    for name, file in (("choice", "questions"), ("pairs", "pairs")):
        path = folder / f"{name}.yaml"
        path.write_text(
            path.read_text()
            .replace(f"test: {file}.jsonl", f"test: {data[file]}")
            .replace(f"train: train_{file}", f"train: {folder}/train_{file}")
        )
    (folder / "both.yaml").write_text("group: tiny_both\ntask: [tiny_choice, tiny_pairs]\n")
    tasks = load_tasks(["tiny_both"], include_path=folder)
    assert sorted(task.name for task in tasks) == ["tiny_choice", "tiny_pairs"]


def test_documents_are_told_apart_by_their_question(folder: Path) -> None:
    """Solved examples before it do not count: splits that share rows are found with few-shot prompts, too."""
    write_rows(folder / "train_questions.jsonl", [QUESTIONS[1], *QUESTIONS[-3:]])
    for num_fewshot in (0, 2):
        task = load(folder, "choice", num_fewshot=num_fewshot)
        test = [task.identity(document) for document in task.documents()]
        train = [task.identity(document) for document in task.documents("train")]
        assert len(set(test)) == len(test)
        assert [test.index(each) for each in train if each in test] == [1, 4]


def test_data_files_of_the_current_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    (folder / "choice.yaml").rename(tmp_path / "elsewhere" / "choice.yaml")
    monkeypatch.chdir(folder)
    assert load(tmp_path / "elsewhere", "choice").splits == {"test": 5, "train": 4}


MIXED = """
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

class Mixed(ConfigurableTask):
    def __init__(self, config=None):
        settings = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{question}}", "doc_to_target": "x"}
        settings["dataset_kwargs"] = {"data_files": {"test": "FILE"}}
        super().__init__(config={"task": config["task"], **settings})

    def construct_requests(self, doc, ctx, apply_chat_template=False, chat_template=None, **more):
        text = Instance("generate_until", doc, (ctx, {"until": ["#"]}), 0, **more)
        return [Instance("loglikelihood", doc, (ctx, " no"), 1, **more), text]

    def process_results(self, doc, results):
        return {"pairs": ({"found": results[0]}, doc["answer"]), "log_prob": results[1][0]}

    def aggregation(self):
        return {"pairs": lambda pairs: sum(one["found"] == str(other) for one, other in pairs) / len(pairs)}

    def higher_is_better(self):
        return {"pairs": True}
"""


def test_a_task_written_in_python(folder: Path) -> None:
    """Requests of several kinds in their order, values of any shape, a metric that is not declared."""
    (folder / "mixed.py").write_text(MIXED.replace("FILE", f"{folder}/questions.jsonl"))
    (folder / "mixed.yaml").write_text("task: tiny_mixed\nclass: !function mixed.Mixed\n")
    task = load(folder, "mixed", limit=2)
    documents = task.documents()
    assert [request.request_type for request in documents[0].requests] == ["generate_until", "loglikelihood"]
    answers: list[Answer] = [[["0"], [-2.0, False]], [["0"], [-4.0, False]]]
    rows = [json.loads(json.dumps(task.measure(d, a)[0])) for d, a in zip(documents, answers, strict=True)]
    assert rows[0] == {"pairs": [{"found": "0"}, 0], "log_prob": -2.0}
    assert task.aggregate("pairs", [row["pairs"] for row in rows]) == 0.5
    assert task.aggregate("log_prob", [row["log_prob"] for row in rows]) == -3.0
    assert task.standard_error("pairs", [row["pairs"] for row in rows]) is None


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"^task 'winogrand' is not known; did you mean winogrande"):
        load_tasks(["winogrand"])


def change(folder: Path, old: str, new: str) -> str:
    path = folder / "choice.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return str(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("task: tiny", "tusk: tiny", "names no task; expected 'task: NAME'"),
        ("task: tiny_choice", "task: [", "cannot be read as a task: while parsing"),
        ("test: questions", "test: nothing", "could not be loaded: Unable to find .*nothing.jsonl"),
        ("{{question}}", "{{query}}", "'query' is undefined; check .* data, which has the fields question, choices"),
        ("{{question}}", "{{[question, query][question == 'q']}}", r"no prompt could be .*has question, choices"),
        ("multiple_choice", "single_choice", "could not be loaded: Got invalid output_type 'single_choice'"),
        ("{{question}}", "{{question", "could not be loaded: "),
        ("test_split: test", "test_split: dev", "has test_split: dev, which its data lack; give one of test, train"),
        ("test_split: test\n", "", "must have valid or test docs"),
        ("metric: acc_norm", "metric: no_such_metric", "no_such_metric of task tiny_choice is not known"),
        ("metric: acc_norm", "metric: bleu", "metric bleu of task tiny_choice does not fit its output"),
        ("metric: acc_norm", "metric: perplexity", "metric perplexity of task tiny_choice does not fit its output"),
        ("output_type", "unsafe_code: true\noutput_type", "runs code that the model wrote.*--confirm-run-unsafe-code"),
    ],
)
def test_bad_tasks(old: str, new: str, message: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_tasks([change(folder, old, new)])[0].documents()
    assert "\n" not in str(caught.value)


def test_bad_arguments(folder: Path, tmp_path: Path) -> None:
    path = str(folder / "choice.yaml")
    for names, settings, message in (
        ([], {}, "no task was given"),
        ([path, path], {}, "task tiny_choice is given twice"),
        ([path], {"include_path": tmp_path / "none"}, "none is no folder"),
        ([str(tmp_path / "none.yaml")], {}, "none.yaml does not exist"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_tasks(names, **settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no split 'dev'; it has test, train"):
        load(folder, "choice").documents("dev")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": 0}, "a limit of 0 documents"),
        ({"limit": 1.5}, "a limit of 1.5 documents is not possible; give a number from 1, or a share below 1"),
        ({"gen_kwargs": "hot"}, "'hot' are no settings of generation; give NAME=VALUE"),
        ({"num_fewshot": -1}, "-1 few-shot examples"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PromptSettings(**settings)


def test_a_template_may_not_take_the_ensemble(run: Run) -> None:
    found = run("sweep", "--apply-chat-template", "demo", "--device", "cpu")
    assert found.error == (
        "Error: no ensemble was given: --apply-chat-template took 'demo' as the name of a template; put the ensemble "
        "before it, or write --apply-chat-template=default"
    )


def test_turns_need_a_chat(folder: Path, run: Run) -> None:
    found = run("sweep", "demo", "--task", folder / "choice.yaml", "--fewshot-as-multiturn")
    assert found.error == "Error: fewshot_as_multiturn was given without apply_chat_template; add it"


def test_labels_that_are_texts(folder: Path) -> None:
    """lm-eval warns and counts all answers as wrong."""
    path = folder / "pairs.yaml"
    path.write_text(path.read_text().replace('"{{label}}"', "label"))
    with pytest.raises(ConfigError, match=r"^tiny_pairs/test/0: the right answer '0' is neither one of the choices"):
        load(folder, "pairs").documents()


def test_a_broken_row_is_named(folder: Path) -> None:
    write_rows(folder / "questions.jsonl", [*QUESTIONS, {"question": "q", "choices": ["a", "b"]}])
    for name in ("generate", "choice"):
        with pytest.raises(
            ConfigError, match=f"^tiny_{name}/test/7 has no field 'answer', which .* doc_to_target uses"
        ):
            load(folder, name).documents()


def test_a_metric_of_choices_does_not_fit_texts(folder: Path) -> None:
    path = folder / "generate.yaml"
    path.write_text(path.read_text().replace("metric: exact_match", "metric: acc").replace(", ignore_case: true", ""))
    with pytest.raises(ConfigError, match="metric acc of task tiny_generate does not fit its output"):
        load(folder, "generate").documents()


def test_a_task_that_fixes_its_examples_keeps_them(folder: Path) -> None:
    path = change(folder, "output_type", "num_fewshot: 0\noutput_type")
    assert load_tasks([path], PromptSettings(num_fewshot=3))[0].num_fewshot == 0


def test_no_lm_eval_is_loaded_before_it_is_needed() -> None:
    modules = "documents, lm_eval_settings, task_files, task_loading, tasks"
    code = f"import sys; from ensembler.evaluation import {modules}\n"
    code += "assert not {'lm_eval', 'datasets', 'transformers'} & set(sys.modules), sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
