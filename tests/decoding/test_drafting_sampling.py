"""Sampling with drafts: exactly the ensemble's distribution after processors; a text depends on its seed alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.drafting_cases import (
    assert_same,
    drafted,
    fixed,
    make_tables,
    make_trio,
    num_texts,
    plain,
    prompts_of,
    similar_tables,
)
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedTokenizerFast
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ensembler import EnsembleForCausalLM
from ensembler.decoding.decoder import Decoder
from ensembler.decoding.decoding_options import DecodingOptions
from ensembler.decoding.texts import complete_prompts, decoder_of

VOCAB = 6
ROWS = 6000
PROCESSORS: dict[str, tuple[dict[str, Any], list[LogitsProcessor]]] = {
    "none": ({}, []),
    "temperature": ({"temperature": 0.6}, [TemperatureLogitsWarper(0.6)]),
    "top-k": ({"top_k": 3}, [TopKLogitsWarper(3)]),
    "top-p": ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
    "min-p": ({"min_p": 0.2}, [MinPLogitsWarper(0.2)]),
    "repetition penalty": ({"repetition_penalty": 1.5}, [RepetitionPenaltyLogitsProcessor(1.5)]),
    "all": (
        {"repetition_penalty": 1.3, "temperature": 1.2, "top_k": 5, "top_p": 0.95, "min_p": 0.02},
        [
            RepetitionPenaltyLogitsProcessor(1.3),
            TemperatureLogitsWarper(1.2),
            TopKLogitsWarper(5),
            TopPLogitsWarper(0.95),
            MinPLogitsWarper(0.02),
        ],
    ),
}


def exact(model: EnsembleForCausalLM, prompt: Tensor, num: int, processors: list[LogitsProcessor]) -> Tensor:
    """P of every continuation of `num` tokens, (V, ..., V) float64, by one enumeration: nothing of the package."""
    weights = model.rule.weights(model.config.alpha)
    table = sum(weight * model.members[role].table.detach().double() for role, weight in weights.items())
    assert isinstance(table, Tensor)
    texts, chances = prompt[None], torch.ones(1, dtype=torch.float64)
    for _ in range(num):
        scores = LogitsProcessorList(processors)(texts, table[texts[:, -1]])
        chances = (chances[:, None] * scores.softmax(-1)).flatten()
        new = torch.arange(VOCAB).repeat(texts.shape[0])
        texts = torch.cat([texts.repeat_interleave(VOCAB, 0), new[:, None]], dim=1)
    return chances.view([VOCAB] * num)


def p_value(counts: Tensor, chances: Tensor) -> float:
    """Of a chi-square test; cells of less than five expected are one. What cannot be must not have been."""
    stats = pytest.importorskip("scipy.stats")
    assert not counts[chances == 0].any(), (counts, chances)
    expected = chances * counts.sum()
    rare = expected < 5
    found = torch.cat([counts[~rare].double(), counts[rare].sum()[None].double()])
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
    is_some = wanted > 0
    return float(stats.chisquare(found[is_some], wanted[is_some] * found.sum() / wanted.sum()).pvalue)


def pairs_of(texts: Tensor) -> Tensor:
    """How often each second and third token stand together, (V, V): both were drafted ahead in a round of three."""
    return torch.bincount(texts[:, 1] * VOCAB + texts[:, 2], minlength=VOCAB**2).view(VOCAB, VOCAB)


@pytest.mark.parametrize("draft", ["source_ft", "target_pt", "ngram"])
@pytest.mark.parametrize(("name", "together"), [*((name, "samples") for name in PROCESSORS), ("all", "prompts")])
def test_the_joint_distribution_of_two_tokens(name: str, together: str, draft: str) -> None:
    """Of many samples, which share rows and drafts while they agree, and of a batch of one prompt many times."""
    model = make_tables(vocab_size=VOCAB, distance=0.9)
    settings, processors = PROCESSORS[name]
    prompt = torch.tensor([4, 1, 3, 4])
    if draft == "ngram":  # whatever comes next has stood behind a 4 before
        prompt = torch.tensor([4, 0, 1, 4, 1, 3, 4, 2, 0, 4, 3, 1, 4, 4, 5, 4, 5, 2, 4])
    options = {"max_new_tokens": 4, "do_sample": True, "top_k": 0, **settings}
    found = []
    for decoder in (fixed(draft, 3, seed=17), Decoder("none", seed=17)):
        if together == "samples":
            texts = model.generate(prompt[None], num_return_sequences=ROWS, **options, custom_generate=decoder)
        else:
            texts = model.generate(prompt.expand(ROWS, -1), **options, custom_generate=decoder)
        found.append(texts[:, prompt.shape[0] :])
        if decoder.draft == draft:
            stats = decoder.stats
            assert 0 < stats.num_accepted < 0.98 * stats.num_drafted
            assert stats.num_drafted > (ROWS if together == "prompts" else 3)
    assert torch.equal(*found)
    counts, chances = pairs_of(found[0]), exact(model, prompt, 3, processors).sum(0)
    likely = p_value(counts, chances)
    assert likely > 1e-3, (likely, counts / ROWS, chances)
    assert p_value(counts, exact(model, prompt, 3, [TemperatureLogitsWarper(1.7)]).sum(0) + 1e-12) < 1e-6


def test_eft_drafted_by_the_denominator() -> None:
    """A draft far from the ensemble, at an α above 1."""
    model = make_tables("eft", 1.4, vocab_size=VOCAB)
    prompt, decoder = torch.tensor([5, 2]), fixed("source_pt", 4, seed=3)
    options = {"max_new_tokens": 4, "do_sample": True, "top_k": 0}
    texts = model.generate(prompt.expand(ROWS, -1), **options, custom_generate=decoder)[:, 2:]
    likely = p_value(pairs_of(texts), exact(model, prompt, 3, []).sum(0))
    assert likely > 1e-3, likely
    assert 0 < decoder.stats.num_accepted < decoder.stats.num_drafted


SAMPLING = {
    "plain": {},
    "top-p": {"top_p": 0.9},
    "all": {"temperature": 1.3, "top_k": 20, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2},
}


@pytest.mark.parametrize("name", SAMPLING)
@pytest.mark.parametrize("draft", ["source_ft", "target_pt", "ngram"])
def test_a_text_depends_on_its_seed_alone(tokenizer: PreTrainedTokenizerFast, draft: str, name: str) -> None:
    """Neither on who drafts how many tokens, nor on timing, nor on what is decoded beside it."""
    model, prompts = make_trio(alpha=0.2), prompts_of(6)
    settings = {"temperature": 0.6, "seed": 7, "num_return_sequences": 2, **SAMPLING[name]}
    options = DecodingOptions(max_new_tokens=14, **settings)
    expected = plain(model, tokenizer, prompts, options, batch_size=6)
    assert num_texts(expected) == 12
    for num, batch_size in ((1, 6), (3, 4), (8, 6), (None, 6), (3, 1)):
        found = complete_prompts(
            model,
            tokenizer,
            prompts,
            options,
            batch_size=batch_size,
            decoder=Decoder(draft, num_positions=num or 8, is_fixed=num is not None),
        )
        assert_same({one.number: one.samples for one in found}, expected)
    other = DecodingOptions(max_new_tokens=14, **{**settings, "seed": 8})
    assert plain(model, tokenizer, prompts, other, batch_size=6) != expected
    alone = [prompts[4]]  # of other prompts there may be none
    assert plain(model, tokenizer, alone, options) == {4: expected[4]}


@pytest.mark.parametrize(("seed", "num_different"), [(None, 2), (5, 1)])
def test_without_a_seed_texts_differ_from_run_to_run(
    tokenizer: PreTrainedTokenizerFast, seed: int | None, num_different: int
) -> None:
    model, prompts = make_trio(alpha=0.2), prompts_of(3)
    options = DecodingOptions(max_new_tokens=12, temperature=1.0, seed=seed, draft="source_ft")
    runs = []
    for _ in range(2):
        decoder = decoder_of(options)
        completions = complete_prompts(model, tokenizer, prompts, options, batch_size=3, decoder=decoder)
        texts = {one.number: tuple(one.samples[0].ids) for one in completions}
        runs.append(tuple(texts[number] for number in range(3)))
        assert decoder.stats.draft == "source_ft"
    assert len(set(runs)) == num_different


def test_a_draft_with_the_same_noise_is_accepted_more_often(tokenizer: PreTrainedTokenizerFast) -> None:
    """A draft of the ensemble's own distribution (α = 0) is always right; one near it mostly."""
    prompts = prompts_of(20)
    acceptances = []
    for alpha in (0.0, 0.1, 1.0):
        model = make_tables("base-change", alpha, vocab_size=64)
        options = DecodingOptions(max_new_tokens=10, temperature=1.0, seed=2)
        _, decoder = drafted(model, tokenizer, prompts, options, "source_ft", 4, batch_size=20)
        acceptances.append(decoder.stats.num_accepted / decoder.stats.num_drafted)
    assert acceptances[0] == 1 > acceptances[1] > 0.7 > acceptances[2]


def test_tables_are_alike_but_not_the_same() -> None:
    first, second = (model.table for model in similar_tables(2, VOCAB))
    assert 0.1 < (first - second).abs().mean() < (first - first.flip(0)).abs().mean()
