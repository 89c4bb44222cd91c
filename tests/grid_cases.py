"""Ensembles for the tests of grids, and what one point gives alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from tiny import make_model

from ensembler import EnsembleForCausalLM
from ensembler.decoding.grid_texts import GridBatch, complete_grid
from ensembler.decoding.points import GridPoint
from ensembler.decoding.prompts import EncodedPrompt
from ensembler.decoding.samples import Sample
from ensembler.decoding.texts import DecodingOptions, complete_batches
from ensembler.runners import Step

RULES = ("base-change", "eft")
ALPHAS = [round(0.1 * index, 1) for index in range(16)]
POINTS = [GridPoint(rule, alpha) for rule in RULES for alpha in ALPHAS]
Texts = dict[tuple[GridPoint, int], list[Sample]]


def make_trio(widths: Sequence[int], *, outside: str = "mask") -> EnsembleForCausalLM:
    """Tiny members of these widths (source FT, source PT, target PT), and of families with and without a window."""
    members = {
        "source_ft": make_model("llama", 1, vocab_size=widths[0]),
        "source_pt": make_model("mistral", 2, vocab_size=widths[1], hidden_size=24, num_layers=1),
        "target_pt": make_model("gpt2", 3, vocab_size=widths[2], hidden_size=32, num_layers=3),
    }
    return EnsembleForCausalLM.from_members(members=members, outside=outside)


def run_grid(
    model: EnsembleForCausalLM, tokenizer: Any, prompts: list[EncodedPrompt], options: DecodingOptions, **more: Any
) -> tuple[Texts, list[GridBatch]]:
    """The samples of each point and prompt, and the batches they came in; `more` may hold other `points`."""
    batches = list(complete_grid(model, tokenizer, prompts, more.pop("points", POINTS), options, **more))
    texts = {
        (point, completion.number): samples
        for batch in batches
        for completion in batch.completions
        for point, samples in completion.samples.items()
    }
    return texts, batches


def run_alone(
    model: EnsembleForCausalLM,
    tokenizer: Any,
    prompts: list[EncodedPrompt],
    options: DecodingOptions,
    points: Sequence[GridPoint] = POINTS,
    **more: Any,
) -> Texts:
    """The same by one `generate` of transformers for each point."""
    texts: Texts = {}
    for point in points:
        one = EnsembleForCausalLM.from_members(
            rule=point.rule, alpha=point.alpha, members=dict(model.members.items()), outside=model.config.outside
        )
        one.generation_config = model.generation_config
        for batch in complete_batches(one, tokenizer, prompts, options, **more):
            texts |= {(point, completion.number): completion.samples for completion in batch}
    return texts


def assert_same(found: Texts, expected: Texts) -> None:
    assert found.keys() == expected.keys()
    differing = {key: (found[key], expected[key]) for key in found if found[key] != expected[key]}
    assert not differing, f"{len(differing)} of {len(found)} differ, the first: {next(iter(differing.items()))}"


@contextmanager
def spied(model: EnsembleForCausalLM) -> Any:
    """A list of the steps that the members of `model` are given inside."""
    steps: list[Step] = []
    run = model.member_logits

    def noting(step: Step, cache: Any = None) -> Any:
        steps.append(step)
        return run(step, cache)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "member_logits", noting)
        yield steps


def distinct_texts(batch: GridBatch, step: int) -> int:
    """How many different texts of `step` tokens a batch has that were not complete with them."""
    return len(
        {
            (completion.number, tuple(sample.ids[:step]))
            for completion in batch.completions
            for samples in completion.samples.values()
            for sample in samples
            if len(sample.ids) > step
        }
    )
