"""A task from a file of rows: prompt, choices and answer as templates, the metric by its name."""

from __future__ import annotations

import json
import re
from codecs import BOM_UTF8
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensembler.decoding.prompts import Report, check_utf8, read_lines
from ensembler.errors import ConfigError, PromptError
from ensembler.evaluation.last_number import NONE, last_number, last_numbers
from ensembler.evaluation.lm_eval_settings import PromptSettings, silence_lm_eval
from ensembler.evaluation.tasks import TextTask
from ensembler.extras import require

_FIELD = re.compile(r"\{\{([^\W\d][\w-]*)\}\}|\{([^\W\d][\w-]*)\}")


def field_names(template: str) -> list[str]:
    """Return the fields of a template. ``{name}`` is one; other braces, and ``{{name}}``, are text."""
    return [match[2] for match in _FIELD.finditer(template) if match[2]]


def fill(template: str, row: Mapping[str, Any], source: str) -> str:
    """Return `template` with the fields of `row`; ``{{name}}`` becomes ``{name}``.

    A text is taken as it is, anything else as JSON. Raises PromptError, which names `source` and the field, where a
    field is missing or null.
    """
    return _FIELD.sub(
        lambda match: _as_text(_look_up(match[2], row, source)) if match[2] else f"{{{match[1]}}}", template
    )


def _look_up(name: str, row: Mapping[str, Any], source: str) -> Any:
    if row.get(name) is None:
        found = f"null under {name!r}" if name in row else f"no field {name!r}"
        known = ", ".join(row) or "none"
        raise PromptError(
            f"{source} has {found}; its fields are {known} (write {{{{{name}}}}} for the braces themselves)"
        )
    return row[name]


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


METRICS = ("acc", "exact_match", "flexible_number", "perplexity")
_MADE = ("_prompt", "_choices", "_target", "_answer")  # fields of a document that are made of the row's


@dataclass(frozen=True)
class TaskFile:
    """Templates that make a task of rows; validated when made, but for the rows. See `make_task_from_file`."""

    prompt: str
    answer: str
    choices: str | None
    metric: str

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ConfigError(f"metric {self.metric!r} is not known for a data file; give one of {', '.join(METRICS)}")
        if (self.metric == "acc") != (self.choices is not None):
            wanted = (
                "choices to choose from: give --choices" if self.metric == "acc" else "no choices: leave --choices out"
            )
            raise ConfigError(f"metric {self.metric} needs {wanted}, or give another metric")
        for option, template in (("--prompt", self.prompt), ("--answer", self.answer)):
            if not field_names(template):
                raise ConfigError(f"{option} {template!r} names no field of the rows; give one such as '{{question}}'")

    def read(self, path: Path, skip: Report | None = None) -> list[dict[str, Any]]:
        """Return the documents of a JSON Lines file: prompt, target and choices beside the row's own fields as texts.

        A row that cannot be used raises PromptError; with `skip`, it is called with the message instead.
        """
        with suppress(OSError), path.open("rb") as file:
            if file.read(1024).removeprefix(BOM_UTF8).lstrip()[:1] == b"[":
                raise PromptError(
                    f"{path} is a JSON array; expected one JSON object per line, which `jq -c '.[]' {path}` makes of it"
                )
        return read_lines(path, self._document, holds="rows; expected one JSON object per line", skip=skip)

    def _document(self, row: Any, number: int, source: str) -> dict[str, Any]:
        if not isinstance(row, dict):
            raise PromptError(f'{source} is no JSON object; expected one per line, such as {{"question": "..."}}')
        prompt, answer = (fill(template, row, source) for template in (self.prompt, self.answer))
        for text in (prompt, answer):
            check_utf8(text, source)
        if taken := next((name for name in _MADE if name in row), None):
            raise PromptError(f"{source} has a field {taken!r}, a name kept for what is made of a row; rename it")
        own = {name: _as_text(value) for name, value in row.items() if value is not None}
        document = {**own, "_prompt": prompt}
        if self.choices is None:
            return {**document, "_target": self._target(answer, source), "_answer": answer}
        choices = _choices(self.choices, row, source)
        return {**document, "_choices": choices, "_target": _index(answer, choices, source)}

    def _target(self, answer: str, source: str) -> str:
        if not answer.strip():
            raise PromptError(f"{source}: the answer is empty; give it some text")
        if self.metric != "flexible_number":
            return answer.strip() if self.metric == "exact_match" else answer
        number = last_number(answer)
        if number == NONE:
            raise PromptError(
                f"{source}: the answer {answer[-40:]!r} holds no number; give one, or --metric exact_match"
            )
        return number


def make_task_from_file(
    data: Path | str,
    *,
    prompt: str,
    answer: str,
    choices: str | None = None,
    metric: str | None = None,
    name: str | None = None,
    settings: PromptSettings | None = None,
    max_new_tokens: int = 256,
    skip: Report | None = None,
) -> TextTask:
    """Return the rows of a JSON Lines file as a task with one split, test.

    ``{field}`` stands for a field of the row in `prompt` and `answer`. `choices`: the texts to choose from, as
    'yes,no', as '{option1},{option2}', or '{field}' of a list; `answer` is then the right one's text or its index from
    0 (text before index, where both are possible). A space is put before an answer unless the prompt ends in white
    space or an answer begins with it. `metric` (default acc with choices, otherwise exact_match):

    - acc: the choice of the highest log-prob is the right one
    - exact_match: the generated line, without white space around it, is the answer
    - flexible_number: the last number of the generated text is that of the answer, see `last_number`
    - perplexity: of the answer after the prompt, per word and byte as lm-eval has it: word_perplexity, byte_perplexity,
      bits_per_byte

    Generated texts have at most `max_new_tokens`. Few-shot examples are other rows of the file. Raises ConfigError, or
    PromptError with line and field; with `skip`, that is called with the message and the row is left out.
    """
    settings = settings or PromptSettings()
    file = TaskFile(prompt, answer, choices, metric or ("exact_match" if choices is None else "acc"))
    data = Path(data)
    documents = file.read(data, skip)
    if settings.num_fewshot is not None and settings.num_fewshot >= len(documents):
        raise ConfigError(
            f"{settings.num_fewshot} few-shot examples beside each question need more than the {len(documents)} rows"
        )
    answers = [text for document in documents for text in document.get("_choices", [str(document["_target"])])]
    delimiter = "" if prompt[-1:].isspace() or any(text[:1].isspace() for text in answers) else " "
    rows = require("datasets", "eval").Dataset.from_list(documents)
    config = {
        "task": name or data.stem,
        "custom_dataset": lambda **_: {"test": rows},
        "test_split": "test",
        "fewshot_split": "test",
        "doc_to_text": "_prompt",
        "doc_to_target": "_target",
        "target_delimiter": delimiter,
        "metadata": {"version": 1},
        **_settings(file.metric, answers, delimiter, max_new_tokens),
    }
    with silence_lm_eval():
        task = require("lm_eval.api.task", "eval").ConfigurableTask(config=config)
    return TextTask(task, settings)


def _settings(metric: str, answers: Sequence[str], delimiter: str, max_new_tokens: int) -> dict[str, Any]:
    """A metric for lm-eval's settings; lm-eval knows its aggregation by its name."""
    if metric == "acc":
        return {"output_type": "multiple_choice", "doc_to_choice": "_choices", "metric_list": [{"metric": "acc"}]}
    if metric == "perplexity":
        return {
            "output_type": "loglikelihood",
            "doc_to_target": lambda document: delimiter + document["_target"],
            "target_delimiter": "",  # lm-eval puts none before what it scores
            "process_results": _perplexities,
            "metric_list": [{"metric": one} for one in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        }
    is_text = metric == "exact_match"
    end = "\n" if is_text and all("\n" not in answer for answer in answers) else "\n\n"
    extract = {"function": "remove_whitespace"} if is_text else {"function": "custom", "filter_fn": last_numbers}
    return {
        "output_type": "generate_until",
        "generation_kwargs": {"until": [end], "do_sample": False, "max_gen_toks": max_new_tokens},
        "fewshot_config": {"doc_to_target": "_target" if is_text else "_answer"},  # the way to the number is shown, too
        "filter_list": [{"name": "none", "filter": [extract, {"function": "take_first"}]}],
        "metric_list": [{"metric": "exact_match"}],
    }


def _perplexities(document: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    task = require("lm_eval.api.task", "eval").Task
    log_prob, answer = results[0][0], document["_target"]
    of_bytes = (log_prob, task.count_bytes(answer))
    words = (log_prob, task.count_words(answer))
    return {"word_perplexity": words, "byte_perplexity": of_bytes, "bits_per_byte": of_bytes}


def _choices(template: str, row: Mapping[str, Any], source: str) -> list[str]:
    names = field_names(template)
    if names and template.strip() == f"{{{names[0]}}}":
        values = _look_up(names[0], row, source)
        if not isinstance(values, list):
            raise PromptError(f"{source}: {template.strip()} is no list of choices; give one, or --choices 'a,b'")
        if None in values:
            raise PromptError(f"{source} has null among the choices {values}; give each some text")
        choices = [_as_text(value) for value in values]
    else:
        choices = [fill(part.strip(), row, source) for part in template.split(",")]
    for index, choice in enumerate(choices):
        check_utf8(choice, source)
        if not choice.strip():
            raise PromptError(f"{source}: choice {index} is empty; give it some text")
    if len(choices) < 2 or len(set(choices)) < len(choices):
        field = template.strip()
        hint = f", or the list in that field: --choices '{{{field}}}'" if isinstance(row.get(field), list) else ""
        raise PromptError(f"{source} has the choices {choices}; give two or more that differ{hint}")
    return choices


def _index(answer: str, choices: Sequence[str], source: str) -> int:
    """The right choice: by its text, or else by its index."""
    texts = [choice.strip() for choice in choices]
    if answer.strip() in texts:
        return texts.index(answer.strip())
    if answer.strip().isdecimal() and int(answer) < len(choices):
        return int(answer)
    expected = f"expected one of {list(choices)}, or an index from 0 to {len(choices) - 1}"
    raise PromptError(f"{source}: the answer {answer!r} is none of the choices; {expected}")
