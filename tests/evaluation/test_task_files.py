"""A file of rows as a task: what becomes of prompts, choices and answers, and which row is at fault."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import make_model
from transformers import PreTrainedTokenizerFast

pytest.importorskip("lm_eval")

from helpers.task_cases import figures, figures_of, recorded, run_lm_eval, write_rows

from ensembler.errors import ConfigError, PromptError
from ensembler.evaluation.documents import Document
from ensembler.evaluation.last_number import last_number
from ensembler.evaluation.lm_eval_settings import PromptSettings
from ensembler.evaluation.task_files import field_names, fill, make_task_from_file
from ensembler.evaluation.tasks import TextTask

ROWS: list[dict[str, Any]] = [
    {"question": "a {b} c", "options": ["x", "y z"], "label": "1", "answer": "12"},
    {"question": "{{q}} {", "options": ["no", "yes", "so"], "label": 0, "answer": "so 3\n#### 1,004"},
    {"question": "q", "options": ["u", "v"], "label": "v", "answer": "$5."},
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", ROWS)


def make(data: Path, settings: PromptSettings | None = None, **templates: Any) -> TextTask:
    return make_task_from_file(
        data, **{"prompt": "Q: {question}", "answer": "{answer}", **templates}, settings=settings
    )


def pairs(task: TextTask) -> list[list[tuple[str, str]]]:
    """Context and continuation of all requests, by document."""
    assert all(one.request_type == "loglikelihood" for document in task.documents() for one in document.requests)
    return [[request.args for request in document.requests] for document in task.documents()]


def settings_of(document: Document) -> dict[str, Any]:
    """The settings by which the one text of a document is generated."""
    (request,) = document.requests
    assert request.request_type == "generate_until"
    return dict(request.args[1])


def test_choices_of_a_field(data: Path) -> None:
    task = make(data, choices="{options}", answer="{label}")
    assert task.metrics[0].key == "acc"
    assert (task.name, task.splits) == ("rows", {"test": 3})
    assert pairs(task) == [
        [("Q: a {b} c", " x"), ("Q: a {b} c", " y z")],
        [("Q: {{q}} {", " no"), ("Q: {{q}} {", " yes"), ("Q: {{q}} {", " so")],
        [("Q: q", " u"), ("Q: q", " v")],
    ]
    assert [document.gold for document in task.documents()] == ["y z", "no", "v"]
    right = task.measure(task.documents()[0], [[-2.0, False], [-1.0, False]])
    assert right == ({"acc": 1.0}, {"none": "y z"})


def test_rows_keep_their_own_fields(tmp_path: Path) -> None:
    own = {"prompt": "p", "source": "s", "choices": "a", "target": "t", "answer": "12", "passage": [1]}
    data = write_rows(tmp_path / "d.jsonl", [own, {**own, "source": "other"}])
    for settings in ({}, {"choices": "{answer},no"}, {"metric": "perplexity"}, {"metric": "flexible_number"}):
        task = make_task_from_file(data, **{"prompt": "{prompt} of {source}", "answer": "{answer}", **settings})
        documents = task.documents()
        assert [document.content["source"] for document in documents] == ["s", "other"], settings
        assert {name: documents[0].content[name] for name in own} == {**own, "passage": "[1]"}
        assert [document.prompt for document in documents] == ["p of s", "p of other"]
        assert documents[0].gold.strip() == "12"


def test_choices_of_texts(tmp_path: Path) -> None:
    labels = ["0", 1, "yes", " no", True, "1"]
    data = write_rows(tmp_path / "d.jsonl", [{"q": "x", "label": label, "other": "maybe"} for label in labels[:4]])
    task = make_task_from_file(data, prompt="{q}?\n", choices="no, yes", answer="{label}")
    assert [document.gold for document in task.documents()] == ["no", "yes", "yes", "no"]
    assert pairs(task)[0] == [("x?\n", "no"), ("x?\n", "yes")]
    task = make_task_from_file(data, prompt="{q}?", choices="no,yes,{other}", answer="{label}")
    assert pairs(task)[0] == [("x?", " no"), ("x?", " yes"), ("x?", " maybe")]
    data = write_rows(tmp_path / "d.jsonl", [{"q": "x", "label": True}, {"q": "x", "label": "1"}])
    task = make_task_from_file(data, prompt="{q}?", choices="false,true", answer="{label}")
    assert [document.gold for document in task.documents()] == ["true", "true"]
    task = make_task_from_file(data, prompt="{q}?", choices="1,true", answer="{label}")  # text goes before index
    assert [document.gold for document in task.documents()] == ["true", "1"]


def test_a_space_before_the_answer(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.jsonl", [{"q": "x", "c": [" a", " b"], "a": "a"}])
    for prompt, choices, expected in (
        ("{q}", "a,b", "x a"),
        ("{q} ", "a,b", "x a"),
        ("{q}", "{c}", "x a"),
        ("{q}\n", "a,b", "x\na"),
    ):
        context, text = pairs(make_task_from_file(data, prompt=prompt, choices=choices, answer="{a}"))[0][0]
        assert context + text == expected


def test_null_is_no_choice(tmp_path: Path) -> None:
    data = write_rows(
        tmp_path / "d.jsonl", [{"q": "x", "c": ["a", "null"], "a": 0}, {"q": "x", "c": ["a", None], "a": 0}]
    )
    with pytest.raises(PromptError, match=r"d.jsonl:2 has null among the choices \['a', None\]; give each some text"):
        make_task_from_file(data, prompt="{q}", choices="{c}", answer="{a}")
    skipped: list[str] = []
    task = make_task_from_file(data, prompt="{q}", choices="{c}", answer="{a}", skip=skipped.append)
    assert [document.choices for document in task.documents()] == [("a", "null")]
    assert len(skipped) == 1


def test_few_shot_examples_are_other_rows(data: Path) -> None:
    task = make(data, choices="{options}", answer="{label}", settings=PromptSettings(num_fewshot=2))
    for row, contexts in zip(ROWS, pairs(task), strict=True):
        assert contexts[0][0].count(f"Q: {row['question']}") == 1
        assert contexts[0][0].count("\n\nQ: ") == 2
    flexible = make(data, metric="flexible_number", settings=PromptSettings(num_fewshot=2))
    assert "so 3\n#### 1,004\n\n" in flexible.documents()[0].prompt
    with pytest.raises(ConfigError, match="3 few-shot examples beside each question need more than the 3 rows"):
        make(data, PromptSettings(num_fewshot=3))


def test_exact_match(data: Path) -> None:
    task = make(data, PromptSettings(limit=1))
    assert task.metrics[0].key == "exact_match"
    (document,) = task.documents()
    assert document.prompt == "Q: a {b} c"
    assert settings_of(document) == {"until": ["\n\n"], "do_sample": False, "max_gen_toks": 256}
    data = write_rows(data.with_name("one.jsonl"), ROWS[:1])
    one_line = make(data, PromptSettings(gen_kwargs="temperature=0.5"), max_new_tokens=9)
    assert settings_of(one_line.documents()[0]) == {
        "until": ["\n"],
        "do_sample": False,
        "max_gen_toks": 9,
        "temperature": 0.5,
    }
    for text, value in ((" 12", 1.0), ("12 \n", 1.0), ("1", 0.0), ("12.", 0.0), ("", 0.0)):
        assert task.measure(document, [[text]])[0] == {"exact_match": value}
    listed = make(write_rows(data.with_name("list.jsonl"), [{"question": "q", "answer": "[1, 2]"}]))
    (document,) = listed.documents()
    assert listed.measure(document, [["[1, 2]"]])[0] == {"exact_match": 1.0}
    assert listed.measure(document, [["1"]])[0] == {"exact_match": 0.0}


def test_flexible_number(data: Path) -> None:
    task = make(data, metric="flexible_number")
    documents = task.documents()
    assert [document.gold for document in documents] == ["12", "1004", "5"]
    for index, text, value in (
        (0, "2 + 10 = 12", 1.0),
        (0, "it is $12.", 1.0),
        (0, "12 and then 13", 0.0),
        (0, "none", 0.0),
        (1, "so #### 1004", 1.0),
        (2, "5", 1.0),
        (2, "it costs $5.00.", 1.0),
        (2, "5 ... or so", 1.0),
    ):
        assert task.measure(documents[index], [[text]])[0] == {"exact_match": value}, text


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("the order costs $29.00.", "29"),
        ("profit of $70,000.", "70000"),
        ("72, altogether.", "72"),
        ("72 ...", "72"),
        ("72...", "72"),
        ("25 dollars and, well,.", "25"),
        ("it is −3 degrees, not 4 or -3", "-3"),
        ("10-7", "7"),
        ("(10)-7", "7"),
        ("a loss of -$1,234.50", "-1234.5"),
        ("half: .5", "0.5"),
        ("-0.0", "0"),
        ("007", "7"),
        ("1\u202f000\u00a0000", "1000000"),
        ("3,4,5", "5"),
        ("1,2345", "2345"),
        ("\\boxed{25}", "25"),
        ("25%", "25"),
        ("none", "[invalid]"),
        ("", "[invalid]"),
    ],
)
def test_the_last_number_of_a_text(text: str, number: str) -> None:
    assert last_number(text) == number


def test_numbers_that_are_written_otherwise_are_the_same() -> None:
    generator = random.Random(0)
    for _ in range(300):
        cents = generator.randrange(-(10**9), 10**9)
        sign, (whole, part) = "-" if cents < 0 else "", divmod(abs(cents), 100)
        expected = f"{sign}{whole}.{part:02d}".rstrip("0").rstrip(".") if cents else "0"
        for written in (
            f"{sign}{whole}.{part:02d}",
            f"{sign}${whole:,}.{part:02d}",
            f"so 3 x {sign}{whole:,}.{part:02d}000.",
        ):
            assert last_number(written) == expected, written
        assert Decimal(last_number(f"{cents / 100:.2f} ...")) * 100 == cents


def test_perplexity(data: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    task = make(data, metric="perplexity")
    assert pairs(task)[1] == [("Q: {{q}} {", " so 3\n#### 1,004")]
    values = [task.measure(one, [[-float(one.index + 1), False]])[0] for one in task.documents()]
    assert [metric.key for metric in task.metrics] == ["word_perplexity", "byte_perplexity", "bits_per_byte"]
    assert not task.metrics[0].higher_is_better
    words, num_bytes = 1 + 4 + 1, 2 + 15 + 3
    assert task.aggregate("word_perplexity", [v["word_perplexity"] for v in values]) == pytest.approx(
        math.exp(6 / words)
    )
    bits = task.aggregate("bits_per_byte", [value["bits_per_byte"] for value in values])
    assert bits == pytest.approx(6 / num_bytes / math.log(2))
    assert task.standard_error("word_perplexity", [value["word_perplexity"] for value in values]) is None


@pytest.mark.parametrize(
    "templates",
    [{"choices": "{options}", "answer": "{label}"}, {}, {"metric": "flexible_number"}, {"metric": "perplexity"}],
)
def test_figures_of_lm_eval(templates: Any, data: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for num_fewshot in (None, 1):
        task = make(data, PromptSettings(num_fewshot=num_fewshot), **templates)
        results = run_lm_eval(task, make_model("llama", 5, max_position_embeddings=400), tokenizer)
        assert figures(task, task.documents(), recorded(results, task)) == figures_of(results, task)


def test_templates() -> None:
    row = {"a": "x", "b_c": 1.5, "d-e": [1, "é"], "f": True, "g": {"h": None}, "ü": "u"}
    for template, expected in {
        "{a}{a}": "xx",
        "{b_c} {d-e} {f} {g} {ü}": '1.5 [1, "é"] true {"h": null} u',
        "{ a } {} {1} {a": "{ a } {} {1} {a",
        "{{a}}": "{a}",
        "f() { return {a}; }": "f() { return x; }",
        '{"k": "{a}"}': '{"k": "x"}',
    }.items():
        assert fill(template, row, "s") == expected
    assert field_names("{a} {{b}} { c } {d-e}") == ["a", "d-e"]
    with pytest.raises(PromptError, match=r"^s has no field 'z'; its fields are .* \(write \{\{z\}\} for the braces"):
        fill("{z}", row, "s")


@pytest.mark.parametrize(
    ("lines", "settings", "message"),
    [
        ("", {}, "holds no rows; expected one JSON object per line"),
        ("\n\n", {}, "holds no rows"),
        ('{"question": "q", "answer": "1"}\n{"question": "q"', {}, r"d.jsonl:2 is no JSON in UTF-8"),
        ("1\n", {}, "d.jsonl:1 is no JSON object"),
        (
            "\ufeff [\n {}]\n",
            {},
            "d.jsonl is a JSON array; expected one JSON object per line, which `jq .*d.jsonl`",
        ),
        ('{"question": "q", "answer": "1"}\n\n{"answer": "1"}\n', {}, r"d.jsonl:3 has no field 'question'; its fields"),
        ('{"question": "q", "answer": null}\n', {}, "d.jsonl:1 has null under 'answer'"),
        ('{"question": "q", "answer": " "}\n', {}, "d.jsonl:1: the answer is empty"),
        ('{"question": "q", "answer": "one"}\n', {"metric": "flexible_number"}, "d.jsonl:1: the answer 'one' holds no"),
        ('{"question": "\\ud800", "answer": "1"}\n', {}, "d.jsonl:1 is not UTF-8 text"),
        (
            '{"question": "q", "answer": "1", "_target": 1}\n',
            {},
            "d.jsonl:1 has a field '_target', a name kept for what is made of a row; rename it",
        ),
        ('{"question": "q", "answer": "1"}\n', {"choices": "{c}"}, "d.jsonl:1 has no field 'c'"),
        ('{"question": "q", "answer": "1"}\n', {"choices": "{answer}"}, r"d.jsonl:1: \{answer\} is no list of choices"),
        ('{"question": "q", "answer": "1"}\n', {"choices": "a,,b"}, "d.jsonl:1: choice 1 is empty"),
        ('{"question": "q", "answer": "1"}\n', {"choices": "a"}, r"d.jsonl:1 has the choices \['a'\]; give two"),
        ('{"question": "q", "answer": "1"}\n', {"choices": "a,a"}, "give two or more that differ"),
        (
            '{"question": "q", "answer": "1", "options": ["1", "2"]}\n',
            {"choices": "options"},
            r"or the list in that field: --choices '\{options\}'",
        ),
        ('{"question": "q", "answer": "2"}\n', {"choices": "a,b"}, "'2' is none of the choices; .* from 0 to 1"),
        ('{"question": "q", "answer": -1}\n', {"choices": "a,b"}, "'-1' is none of"),
        ('{"question": "q", "answer": "²"}\n', {"choices": "a,b"}, "'²' is none of"),
        ('{"question": "q", "answer": 1.0}\n', {"choices": "a,b"}, "'1.0' is none of"),
        ('{"question": "q", "answer": true}\n', {"choices": "a,b"}, "'true' is none of"),
        ('{"question": "q", "answer": "1"}\n', {"prompt": "Q"}, "--prompt 'Q' names no field"),
        ('{"question": "q", "answer": "1"}\n', {"answer": "answer"}, "--answer 'answer' names no field"),
        (
            '{"question": "q", "answer": "1"}\n',
            {"metric": "f1"},
            "metric 'f1' is not known for a data file",
        ),
        ('{"question": "q", "answer": "1"}\n', {"metric": "acc"}, "metric acc needs choices to choose from"),
        (
            '{"question": "q", "answer": "1"}\n',
            {"metric": "exact_match", "choices": "a,b"},
            "metric exact_match needs no choices: leave --choices out",
        ),
    ],
)
def test_bad_files(lines: str, settings: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(lines, "utf-8")
    with pytest.raises((PromptError, ConfigError), match=message) as caught:
        make(tmp_path / "d.jsonl", **settings)
    assert "\n" not in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"nothing.jsonl cannot be read: No such file"):
        make(tmp_path / "nothing.jsonl")


def test_rows_are_described(data: Path) -> None:
    """The same in every process, and other where a template is another."""
    settings = {"choices": "{options}", "answer": "{label}"}
    described = make(data, **settings).describe()
    assert json.loads(json.dumps(described)) == described == make(data, **settings).describe()
    assert make(data).describe() != described


def test_numbers_are_found_before_anything_else_of_lm_eval_is_loaded(tmp_path: Path) -> None:
    write_rows(tmp_path / "sums.jsonl", [{"q": "1 + 2", "a": "so 3"}])
    code = (
        "from ensembler.evaluation.task_files import make_task_from_file as make; "
        f"print(make({str(tmp_path / 'sums.jsonl')!r}, prompt='{{q}}', answer='{{a}}', metric='flexible_number')"
        ".documents()[0].content['_target'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split()[-1:] == ["3"], done.stderr
