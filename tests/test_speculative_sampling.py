"""Sampling with drafts: exactly the ensemble's distribution after processors; a text depends on its seed alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import make_pair, save_adapter, save_base
from speculative_cases import assert_same, drafted, make_tables, make_trio, prompts_of, similar_tables
from tiny import make_model
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
from ensembler.decoding.speculative import SpeculativeDecoder
from ensembler.decoding.texts import DecodingOptions, complete_batches

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


@pytest.mark.parametrize("draft", ["source_ft", "target_pt", "ngram"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_the_joint_distribution_of_two_tokens(name: str, draft: str) -> None:
    """A batch of one prompt many times, in rounds of three: the second and the third token, both drafted ahead."""
    model = make_tables(vocab_size=VOCAB, distance=0.9)
    settings, processors = PROCESSORS[name]
    prompt = torch.tensor([4, 1, 3, 4])
    if draft == "ngram":  # whatever comes next has stood behind a 4 before
        prompt = torch.tensor([4, 0, 1, 4, 1, 3, 4, 2, 0, 4, 3, 1, 4, 4, 5, 4, 5, 2, 4])
    decoder = SpeculativeDecoder(draft, num_positions=3, is_fixed=True, seed=17)
    options = {"max_new_tokens": 4, "do_sample": True, "top_k": 0, **settings}
    texts = model.generate(prompt.expand(ROWS, -1), **options, custom_generate=decoder)[:, prompt.shape[0] :]
    stats = decoder.stats
    assert 0.05 * stats.num_drafted < stats.num_accepted < 0.98 * stats.num_drafted
    assert stats.num_drafted > ROWS
    chances = exact(model, prompt, 3, processors).sum(0)
    counts = torch.bincount(texts[:, 1] * VOCAB + texts[:, 2], minlength=VOCAB**2).view(VOCAB, VOCAB)
    found = p_value(counts, chances)
    assert found > 1e-3, (found, counts / ROWS, chances)
    assert p_value(counts, exact(model, prompt, 3, [TemperatureLogitsWarper(1.7)]).sum(0) + 1e-12) < 1e-6


def test_eft_drafted_by_the_denominator() -> None:
    """A draft far from the ensemble, at an α above 1."""
    model = make_tables("eft", 1.4, vocab_size=VOCAB)
    prompt = torch.tensor([5, 2])
    decoder = SpeculativeDecoder("source_pt", num_positions=4, is_fixed=True, seed=3)
    texts = model.generate(prompt.expand(ROWS, -1), max_new_tokens=4, do_sample=True, top_k=0, custom_generate=decoder)[
        :, 2:
    ]
    counts = torch.bincount(texts[:, 1] * VOCAB + texts[:, 2], minlength=VOCAB**2).view(VOCAB, VOCAB)
    found = p_value(counts, exact(model, prompt, 3, []).sum(0))
    assert found > 1e-3, found
    assert 0 < decoder.stats.num_accepted < decoder.stats.num_drafted


SAMPLING = {
    "plain": {},
    "top-p": {"top_p": 0.9},
    "all": {"temperature": 1.3, "top_k": 20, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2},
}


@pytest.mark.parametrize("name", SAMPLING)
@pytest.mark.parametrize("draft", ["source_ft", "target_pt", "ngram"])
def test_a_text_depends_on_its_seed_alone(tokenizer: PreTrainedTokenizerFast, draft: str, name: str) -> None:
    """Neither on how many tokens are drafted, nor on timing, nor on what is decoded beside it."""
    model, prompts = make_trio(alpha=0.2), prompts_of(6)
    settings = {"temperature": 0.6, "seed": 7, "num_return_sequences": 2, **SAMPLING[name]}
    options = DecodingOptions(max_new_tokens=14, **settings)
    expected, _ = drafted(model, tokenizer, prompts, options, draft, 1, batch_size=6)
    for num in (3, 8, None):
        found, _ = drafted(model, tokenizer, prompts, options, draft, num, batch_size=6)
        assert_same(found, expected)
    alone, _ = drafted(model, tokenizer, prompts, options, draft, 3, batch_size=1)
    assert_same(alone, expected)
    other = DecodingOptions(max_new_tokens=14, **{**settings, "seed": 8})
    assert drafted(model, tokenizer, prompts, other, draft, 3, batch_size=6)[0] != expected
    assert len({tuple(sample.ids) for samples in expected.values() for sample in samples}) == 12


@pytest.mark.parametrize("rule", ["base-change", "eft"])
def test_a_text_of_members_on_one_backbone_depends_on_its_seed_alone(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, rule: str
) -> None:
    base = save_base(tmp_path / "base")
    model = make_pair(base, save_adapter(base, tmp_path / "adapter"), make_model("gpt2", 3), rule=rule, alpha=0.3)
    prompts, options = prompts_of(5), DecodingOptions(max_new_tokens=12, temperature=0.8, top_p=0.95, seed=4)
    expected, _ = drafted(model.copies, tokenizer, prompts, options, "source_ft", 1, batch_size=5)
    texts = [drafted(model.shared, tokenizer, prompts, options, "source_ft", num, batch_size=5)[0] for num in (1, 3, 8)]
    assert texts[0] == texts[1] == texts[2]
    is_same_proposal = rule == "base-change"  # EFT's is that of both members, not of one of them
    assert (texts[0] == expected) == is_same_proposal


def test_a_processor_that_forbids_all_but_one_token() -> None:
    """Where the draft and the ensemble have nothing in common, every draft is replaced and no number is lost."""

    model = make_tables(vocab_size=VOCAB)
    is_draft = [False]

    class OneToken(LogitsProcessor):
        """Permits one token to the draft, another to the ensemble."""

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            permitted = torch.full_like(scores, -torch.inf)
            permitted[:, 4 if is_draft[0] else 3] = 0.0
            return permitted

    combine = model.combine

    def combined(*args: Any, **kwargs: Any) -> Tensor:
        is_draft[0] = False
        return combine(*args, **kwargs)

    def drafts(*args: Any) -> None:
        is_draft[0] = True

    model.combine = combined  # type: ignore[method-assign]
    hook = model.members["source_ft"].register_forward_hook(drafts)
    decoder = SpeculativeDecoder("source_ft", num_positions=3, is_fixed=True)
    texts = model.generate(
        torch.tensor([[5, 2], [2, 5]]),
        max_new_tokens=5,
        do_sample=True,
        logits_processor=LogitsProcessorList([OneToken()]),
        custom_generate=decoder,
    )
    hook.remove()
    assert (texts[:, 2:] == 3).all()
    assert decoder.stats.num_rounds > 1
    assert decoder.stats.num_accepted <= 2  # a plain step at the end asks the processor in another order


@pytest.mark.parametrize(("seed", "num_different"), [(None, 2), (5, 1)])
def test_without_a_seed_texts_differ_from_run_to_run(
    tokenizer: PreTrainedTokenizerFast, seed: int | None, num_different: int
) -> None:
    model, prompts = make_trio(alpha=0.2), prompts_of(3)
    options = DecodingOptions(max_new_tokens=12, temperature=1.0, seed=seed, draft="source_ft")
    runs = []
    for _ in range(2):
        decoder = options.decoder()
        batches = complete_batches(model, tokenizer, prompts, options, batch_size=3, decoder=decoder)
        runs.append(tuple(tuple(one.samples[0].ids) for batch in batches for one in batch))
        assert decoder.stats.draft == "source_ft"  # not texts of plain decoding
    assert len(set(runs)) == num_different


def test_tables_are_alike_but_not_the_same() -> None:
    first, second = (model.table for model in similar_tables(2, VOCAB))
    assert 0.1 < (first - second).abs().mean() < (first - first.flip(0)).abs().mean()
