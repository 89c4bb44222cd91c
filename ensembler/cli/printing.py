"""Completions on standard output: JSON lines as they come, plain or marked texts in the order of their prompts."""

from __future__ import annotations

import json
from types import TracebackType
from typing import Any, Self

import click

from ensembler.cli.tables import print_explained
from ensembler.decoding.explain import Choice, explain
from ensembler.decoding.texts import Completion
from ensembler.modeling import EnsembleForCausalLM


class Printer:
    """Prints completions; plain texts wait for the end (of an interrupted run too), so that they come in order."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        as_json: bool,
        quiet: bool,
        many: bool,
    ) -> None:
        self._model: EnsembleForCausalLM | None = None
        self._tokenizer = tokenizer
        self._as_json = as_json
        self._quiet = quiet and not as_json
        self._many = many
        self._waiting: dict[int, tuple[Completion, list[list[Choice]]]] = {}

    def explain_with(self, model: EnsembleForCausalLM) -> None:
        """Mark the tokens of texts that are not the anchor's own choice."""
        self._model = model

    def add(self, completion: Completion) -> dict[str, Any]:
        """Take a completion and return its row."""
        choices = []
        row = completion.to_row()
        if self._model is not None:
            choices = [explain(self._model, completion.prompt_ids, sample.ids) for sample in completion.samples]
            moved = [_moved(sample, self._tokenizer) for sample in choices]
            row["moved"] = moved[0] if len(moved) == 1 else moved
        if self._as_json:
            click.echo(json.dumps(row, ensure_ascii=False))
        elif not self._quiet:
            self._waiting[completion.number] = (completion, choices)
        return row

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in sorted(self._waiting):
            self._print(number, *self._waiting[number])

    def _print(self, number: int, completion: Completion, choices: list[list[Choice]]) -> None:
        for index, sample in enumerate(completion.samples):
            if self._many or len(completion.samples) > 1:
                click.echo(f"--- prompt {number}, text {index}")
            if choices:
                print_explained(choices[index], self._tokenizer)
            else:
                click.echo(sample.text)


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
