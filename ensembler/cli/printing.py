"""Completions on standard output, and what `generate --stats` measured on standard error."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import click

from ensembler.cli.command_class import log
from ensembler.cli.tables import console, plain_table, print_explained
from ensembler.decoding.decode_stats import DecodingStats
from ensembler.decoding.drafting import AUTO, NONE
from ensembler.decoding.texts import Choice, Completion, GridCompletion, explain
from ensembler.modeling import EnsembleForCausalLM


class InOrder:
    """Calls a function for each of `numbers`, in their order; what waits for an earlier one is called in the end."""

    def __init__(self, numbers: Iterable[int]) -> None:
        self._numbers = deque(numbers)
        self._waiting: dict[int, Callable[[], None]] = {}

    def add(self, number: int, function: Callable[[], None]) -> None:
        """Call the function now, and those that waited for it, or later."""
        self._waiting[number] = function
        while self._numbers and self._numbers[0] in self._waiting:
            self._waiting.pop(self._numbers.popleft())()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in sorted(self._waiting):
            self._waiting[number]()


class Printer(InOrder):
    """Prints completions in the order of `numbers`, each as soon as those before it are printed.

    `fields`: by number what the input row holds, which its result carries back. `vocabulary`: see `json_line`. An
    interruption prints the rest too.
    """

    def __init__(
        self,
        tokenizer: Any,
        numbers: Sequence[int],
        fields: Mapping[int, Mapping[str, Any]],
        vocabulary: str,
        *,
        as_json: bool,
        is_shown: bool,
    ) -> None:
        super().__init__(numbers)
        self._model: EnsembleForCausalLM | None = None
        self._tokenizer = tokenizer
        self._fields = fields
        self._vocabulary = vocabulary
        self._as_json = as_json
        self._is_shown = is_shown
        self._has_many = len(numbers) > 1

    def explain_with(self, model: EnsembleForCausalLM) -> None:
        """Mark the tokens of texts that are not the anchor's own choice."""
        self._model = model

    def print(self, completion: Completion | GridCompletion) -> dict[str, Any]:
        """Take a completion, print what can be, and return its row."""
        choices = []
        row = completion.to_row()
        if self._model is not None:
            choices = [explain(self._model, completion.prompt_ids, one.ids) for one in completion.all_samples]
            moved = [_moved(sample, self._tokenizer) for sample in choices]
            row["moved"] = moved[0] if len(moved) == 1 else moved
        row = with_fields(row, self._fields.get(completion.number, {}))
        if self._is_shown:
            self.add(completion.number, partial(self._print, completion, choices, row))
        return row

    def _print(
        self, completion: Completion | GridCompletion, choices: list[list[Choice]], row: Mapping[str, Any]
    ) -> None:
        if self._as_json:
            click.echo(json_line(row, self._vocabulary))
            return
        points = completion.samples if isinstance(completion, GridCompletion) else {None: completion.samples}
        for point, samples in points.items():
            for index, sample in enumerate(samples):
                if self._has_many or len(completion.all_samples) > 1:
                    at = "" if point is None else f", {point.rule} at alpha {point.alpha:g}"
                    click.echo(f"--- prompt {completion.number}{at}, text {index}")
                if choices:
                    print_explained(choices[index], self._tokenizer)
                else:
                    click.echo(sample.text)


def with_fields(row: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of results behind the `fields` of its input; a field that is called as a result gives way."""
    return {"number": row["number"], **{key: value for key, value in fields.items() if key not in row}, **row}


def json_line(row: Mapping[str, Any], vocabulary: str) -> str:
    """Return a row as JSON with the level of the vocabulary contract: there are no settings beside it that say so."""
    return json.dumps({**row, "vocabulary": vocabulary}, ensure_ascii=False)


def _moved(choices: list[Choice], tokenizer: Any) -> list[dict[str, Any]]:
    """The tokens at which alpha moved the most probable token, for JSON."""
    return [
        {
            "position": position,
            "token": tokenizer.decode([choice.token]),
            "ensemble_token": tokenizer.decode([choice.ensemble_token]),
            "anchor_token": tokenizer.decode([choice.anchor_token]),
            "probability": choice.probability,
            "anchor_probability": choice.anchor_probability,
        }
        for position, choice in enumerate(choices)
        if choice.moved
    ]


def say_why_plain(draft: str, stats: DecodingStats) -> None:
    """Say, a line for each reason, why a draft that was asked for did not come about, or was given up."""
    if draft in (AUTO, NONE):
        return
    for reason, num_batches in stats.by_transformers.items():
        log.info("decoded plainly: %s%s", reason, _times(num_batches))
    if stats.plain_reason is not None:
        what = "drafting was given up" if stats.num_rounds else "nothing was drafted"
        log.info("%s: %s", what, stats.plain_reason)


def print_stats(stats: DecodingStats, *, as_json: bool) -> None:
    """Print seconds by phase and member, and what came of drafting."""
    row = stats.to_row()
    if as_json:
        click.echo(json.dumps({"stats": row}), err=True)
        return
    lines = [*_seconds("phase", row["phases"], stats.seconds), *_seconds("member", row["members"], stats.seconds)]
    console(stderr=True).print(plain_table(("", "", "seconds", "share"), lines))
    for line in _counts(row):
        click.echo(line, err=True)


def _seconds(kind: str, parts: Mapping[str, float], total: float) -> Iterator[tuple[str, str, str, str]]:
    for name, seconds in parts.items():
        yield kind, name, f"{seconds:.3f}", f"{seconds / total:.1%}" if total else ""
        kind = ""


def _counts(row: Mapping[str, Any]) -> Iterator[str]:
    yield f"tokens/s: {_number(row['tokens_per_second'])}, plain steps: {row['num_plain_steps']}"
    if row["draft"] is not None:
        yield (
            f"draft: {row['draft']}, rounds: {row['num_rounds']}, "
            f"tokens per round: {_number(row['tokens_per_round'])}, acceptance: {_number(row['acceptance'])}"
        )
    reasons: dict[str, int] = row["by_transformers"]
    for reason, num_batches in reasons.items():
        yield f"by transformers' own loop: {reason}{_times(num_batches)}"
    if row["plain_reason"] is not None:
        yield f"plain: {row['plain_reason']}"
    if text := row["text"]:
        evaluations = ", ".join(f"{role} {num:.2f}" for role, num in text["evaluations"].items())
        yield (
            f"by text: evaluations per token: {evaluations}, rounds: {text['rounds']:.2f}, "
            f"open: {text['mean_open']:.2%} (at most {text['largest_open']:.2%})"
            + ("" if text["certain"] is None else f", certain: {text['certain']:.1%}")
        )
    for name, reason in row["eager"].items():
        yield f"without CUDA graphs: {name}, {reason}"


def _times(num_batches: int) -> str:
    return f" ({num_batches} batches)" if num_batches > 1 else ""


def _number(value: object) -> str:
    return "-" if value is None else f"{value:.2f}"
