"""Ensembles for the tests of grids, what one point gives alone, and `transformers`' own loop as the reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from helpers.tiny import make_model, random_ids

from ensembler import EnsembleForCausalLM
from ensembler.decoding.decode_stats import DecodingStats
from ensembler.decoding.decoder import Decoder
from ensembler.decoding.decoding_options import DecodingOptions
from ensembler.decoding.prompts import EncodedPrompt
from ensembler.decoding.samples import Sample
from ensembler.decoding.texts import complete_grid, complete_prompts, decoder_of
from ensembler.engine.grid import GridPoint
from ensembler.engine.model_runner import Step

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


def prompts_of(count: int, seed: int = 3, longest: int = 9) -> list[EncodedPrompt]:
    """Random prompts of 1 to `longest` tokens; the last is the first again."""
    rows = [random_ids(1, 1 + (5 * i + seed) % longest, seed=100 * seed + i)[0].tolist() for i in range(count - 1)]
    return [EncodedPrompt(number, ids) for number, ids in enumerate([*rows, rows[0]])]


def run_grid(
    model: EnsembleForCausalLM,
    tokenizer: Any,
    prompts: list[EncodedPrompt],
    options: DecodingOptions,
    points: Sequence[GridPoint] = POINTS,
    decoder: Decoder | None = None,
    **more: Any,
) -> tuple[Texts, DecodingStats]:
    """The samples of each point and prompt, and what the decoder counted."""
    decoder = decoder_of(options, points=points) if decoder is None else decoder
    texts = {
        (point, completion.number): samples
        for completion in complete_grid(model, tokenizer, prompts, points, options, decoder=decoder, **more)
        for point, samples in completion.samples.items()
    }
    assert not decoder.stats.by_transformers
    return texts, decoder.stats


def run_alone(
    model: EnsembleForCausalLM,
    tokenizer: Any,
    prompts: list[EncodedPrompt],
    options: DecodingOptions,
    points: Sequence[GridPoint] = POINTS,
    **more: Any,
) -> Texts:
    """The same by `transformers`' own loop, on its own caches, for each point."""
    texts: Texts = {}
    for point in points:
        one = EnsembleForCausalLM.from_members(
            rule=point.rule, alpha=point.alpha, members=dict(model.members.items()), outside=model.config.outside
        )
        one.generation_config = model.generation_config
        with by_transformers(one):
            completions = list(complete_prompts(one, tokenizer, prompts, options, **more))
        texts |= {(point, completion.number): completion.samples for completion in completions}
    return texts


def assert_same(found: Texts, expected: Texts) -> None:
    assert found.keys() == expected.keys()
    differing = {key: (found[key], expected[key]) for key in found if found[key] != expected[key]}
    assert not differing, f"{len(differing)} of {len(found)} differ, the first: {next(iter(differing.items()))}"


@contextmanager
def by_transformers(model: EnsembleForCausalLM) -> Iterator[None]:
    """Inside, `transformers`' own loop decodes: what it samples has the noise of the decode loop."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.member_set, "why_not_by_row", lambda: "it is the reference")
        yield


@contextmanager
def spied(model: EnsembleForCausalLM) -> Iterator[list[Step]]:
    """A list of the steps that the members of `model` are given inside."""
    steps: list[Step] = []
    run = model.member_set.logits

    def noting(step: Step, *others: Any) -> Any:
        steps.append(step)
        return run(step, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.member_set, "logits", noting)
        yield steps


def distinct_texts(texts: Texts, step: int) -> int:
    """How many different texts of `step` tokens there are that were not complete with them."""
    return len(
        {
            (number, tuple(sample.ids[:step]))
            for (_, number), samples in texts.items()
            for sample in samples
            if len(sample.ids) > step
        }
    )
