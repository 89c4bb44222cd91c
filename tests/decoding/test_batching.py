"""Prompts that take each other's places: refilling changes no text, and leaves no place empty."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import pytest
from helpers.grid_cases import by_transformers, spied
from helpers.tiny import make_model, make_tokenizer, random_ids
from transformers import GenerationConfig

from ensembler import EnsembleForCausalLM
from ensembler.decoding.decode_stats import DecodingStats, Meter
from ensembler.decoding.decoder import Decoder
from ensembler.decoding.decoding_options import DecodingOptions
from ensembler.decoding.prompts import EncodedPrompt
from ensembler.decoding.samples import Sample
from ensembler.decoding.texts import complete_prompts
from ensembler.engine.model_runner import Step

TOKENIZER = make_tokenizer()
HEADER = random_ids(1, 36, seed=77)[0].tolist()
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "penalty": {"repetition_penalty": 1.4, "stop": ("e", "7")},
    "sampling": {"temperature": 1.0, "seed": 3},
    "samples": {"temperature": 0.8, "top_p": 0.9, "seed": 3, "num_return_sequences": 3, "prefill_chunk": 5},
}


@pytest.fixture
def ensemble(fresh: EnsembleForCausalLM) -> EnsembleForCausalLM:
    """One whose texts end after few tokens or many."""
    fresh.generation_config = GenerationConfig(eos_token_id=[2, *range(5, 64, 8)], pad_token_id=3)
    return fresh


def many_prompts(count: int = 60) -> list[EncodedPrompt]:
    """Prompts of 1 to 20 tokens; some begin with a header, some are there twice."""
    ids = [random_ids(1, 1 + (7 * i) % 20, seed=i // 2 if i % 5 == 0 else i)[0].tolist() for i in range(count)]
    return [EncodedPrompt(2 * i, HEADER + one if i % 4 == 0 else one) for i, one in enumerate(ids)]


def decode(
    model: EnsembleForCausalLM,
    prompts: Sequence[EncodedPrompt],
    batch_size: int,
    decoder: Decoder | None = None,
    **options: Any,
) -> dict[int, list[Sample]]:
    decoding = DecodingOptions(**{"max_new_tokens": 11, "draft": "none", **options})
    completions = list(complete_prompts(model, TOKENIZER, prompts, decoding, batch_size=batch_size, decoder=decoder))
    found = {one.number: one.samples for one in completions}
    assert len(found) == len(completions) == len(prompts)
    return found


@pytest.mark.parametrize("mode", MODES)
def test_refilling_changes_no_text(ensemble: EnsembleForCausalLM, mode: str) -> None:
    """One, few and all together, drafted or not: the texts of `transformers`' own loop."""
    prompts, options = many_prompts(), MODES[mode]
    with by_transformers(ensemble):
        expected = decode(ensemble, prompts, 9, **options)
    assert len({sample.num_tokens for samples in expected.values() for sample in samples}) > 4
    for batch_size in (1, 3, 200):
        assert decode(ensemble, prompts, batch_size, **options) == expected, batch_size
    for draft in ("source_pt", "ngram"):
        decoder = Decoder(draft, num_positions=4, is_fixed=True, seed=3)
        assert decode(ensemble, prompts, 7, decoder, **options) == expected, draft
        assert decoder.stats.num_rounds > 0


def test_the_order_and_the_others_change_no_text(ensemble: EnsembleForCausalLM) -> None:
    prompts, options = many_prompts(24), MODES["samples"]
    expected = decode(ensemble, prompts, 4, **options)
    assert decode(ensemble, prompts[::-1], 4, **options) == expected
    some = decode(ensemble, prompts[3::4], 2, **options)
    assert some == {number: expected[number] for number in some}
    fewer = decode(ensemble, prompts, 4, **{**options, "num_return_sequences": 2})
    assert fewer == {number: samples[:2] for number, samples in expected.items()}


def expected_forwards(lengths: Sequence[int], num_together: int) -> list[tuple[bool, int]]:
    """Whether each forward reads prompts, and its rows, for texts of so many tokens in their order."""
    waiting, running, forwards = deque(lengths), [], []
    while waiting or running:
        new = [waiting.popleft() for _ in range(min(len(waiting), num_together - len(running)))]
        forwards.append((bool(new), len(new or running)))
        running = (
            [left - 1 for left in running if left > 1] if not new else running + [one - 1 for one in new if one > 1]
        )
    return forwards


def forwards_of(steps: Sequence[Step]) -> list[tuple[bool, int]]:
    return [(step.logits_to_keep == 1, step.input_ids.shape[0]) for step in steps]


@pytest.mark.parametrize("num_together", [1, 3, 8, 200])
def test_the_next_prompt_gets_the_place_of_one_that_ended(ensemble: EnsembleForCausalLM, num_together: int) -> None:
    prompts = [one for one in many_prompts(40) if len(one.ids) < len(HEADER)]
    with spied(ensemble) as steps:
        found = decode(ensemble, prompts, num_together, temperature=1.0, seed=3)
    ordered = sorted(prompts, key=lambda prompt: (-len(prompt.ids), prompt.number))
    lengths = [found[prompt.number][0].num_tokens for prompt in ordered]
    assert forwards_of(steps) == expected_forwards(lengths, num_together)
    num_waiting = len(prompts)
    for reads_prompts, num_rows in forwards_of(steps):
        num_waiting -= num_rows if reads_prompts else 0
        assert reads_prompts or not num_waiting or num_rows == num_together  # no place is empty while one waits


def test_a_prompt_keeps_its_place_until_its_last_sample_has_ended(ensemble: EnsembleForCausalLM) -> None:
    """Its samples begin on one row; what they have in common is read once."""
    prompts = [one for one in many_prompts(20) if len(one.ids) < len(HEADER)]
    with spied(ensemble) as steps:
        found = decode(ensemble, prompts, 2, temperature=1.0, seed=3, num_return_sequences=4)
    assert all(step.input_ids.shape[0] <= (2 if step.logits_to_keep == 1 else 8) for step in steps)
    texts = {
        (number, tuple(sample.ids[:num]))
        for number, samples in found.items()
        for sample in samples
        for num in range(1, sample.num_tokens)
    }
    rows = sum(step.input_ids.shape[0] for step in steps if step.logits_to_keep == 0)
    assert rows == len(texts)


def test_a_finished_prompt_is_there_before_the_others_are_done(ensemble: EnsembleForCausalLM) -> None:
    options = DecodingOptions(max_new_tokens=11, temperature=1.0, seed=3, draft="none")
    prompts = [one for one in many_prompts(20) if len(one.ids) < len(HEADER)]
    with spied(ensemble) as steps:
        seen = [
            (one.samples[0].num_tokens, len(steps))
            for one in complete_prompts(ensemble, TOKENIZER, prompts, options, batch_size=200)
        ]
    assert all(num_tokens == num_steps for num_tokens, num_steps in seen)
    assert len({num_steps for _, num_steps in seen}) > 4


def test_what_the_loop_cannot_decode_comes_in_batches_of_transformers() -> None:
    members = {"reference": make_model("bloom", 1), "aligned": make_model("llama", 2)}
    model = EnsembleForCausalLM.from_members(rule="realign", alpha=0.5, members=members)
    prompts = many_prompts(7)
    for options in ({}, {"temperature": 1.0, "seed": 3, "num_return_sequences": 2}):
        found = []
        for batch_size in (1, 3, 200):
            decoder = Decoder("none", seed=3)
            found.append(decode(model, prompts, batch_size, decoder, **options))
            ((reason, count),) = decoder.stats.by_transformers.items()
            assert "reference cannot keep a cache of rows" in reason
            assert count == -(-len(prompts) // batch_size)
        assert found[0] == found[1] == found[2]


def test_between_two_completions_the_model_and_the_decoder_are_the_callers() -> None:
    members = {"reference": make_model("bloom", 1), "aligned": make_model("llama", 2)}
    by_batch = EnsembleForCausalLM.from_members(rule="realign", alpha=0.5, members=members)
    members = {**members, "reference": make_model("gpt2", 1)}
    by_row = EnsembleForCausalLM.from_members(rule="realign", alpha=0.5, members=members)
    for model in (by_batch, by_row):
        own = model.generation_config = GenerationConfig(repetition_penalty=1.3, pad_token_id=3)
        decoder = Decoder("none", seed=5, meter=Meter(DecodingStats()))
        options = DecodingOptions(max_new_tokens=3, temperature=1.0, draft="none")
        runs = [complete_prompts(model, TOKENIZER, many_prompts(4), options, decoder=decoder) for _ in range(2)]
        for one, other in zip(*runs, strict=True):
            assert one.number == other.number
            assert model.generation_config is own
            assert model.member_set.timer is None
        assert (decoder.seed, decoder.numbers) == (5, None)
        assert decoder.stats.phases["step"] > 0
