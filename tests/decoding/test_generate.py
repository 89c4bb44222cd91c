"""`generate` decodes what `transformers`' own loop decodes: every option, drafted or not, and what it returns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from helpers.grid_cases import spied
from helpers.noise_cases import shared_noise
from helpers.tiny import make_model, make_tokenizer, random_ids
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    WatermarkingConfig,
)
from transformers.generation import StopStringCriteria

from ensembler import EnsembleForCausalLM
from ensembler.decoding.decoder import Decoder
from ensembler.engine.grid import make_grid
from ensembler.engine.row_cache import RowCache
from ensembler.errors import InputError

IDS = random_ids(4, 9, seed=5)
LEFT = torch.tensor([[1] * 9, [0] * 4 + [1] * 5, [0] * 8 + [1], [0] * 2 + [1] * 7])
HOLES = torch.tensor([[1] * 9, [1, 0, 0, 1, 1, 0, 1, 1, 1], [0, 0, 1, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0, 1]])
ENDS = [2, *range(5, 64, 8)]


@pytest.fixture
def model(fresh: EnsembleForCausalLM) -> EnsembleForCausalLM:
    """One whose texts end after few tokens or many."""
    fresh.generation_config = GenerationConfig(eos_token_id=ENDS, pad_token_id=3)
    return fresh


@contextmanager
def by_transformers(model: EnsembleForCausalLM) -> Iterator[None]:
    """Inside, `generate` has a reason for `transformers`' own loop."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ensembler.decoding.decoder.why_transformers", lambda *prepared, **more: "it is the reference")
        yield


@contextmanager
def by_the_loop(model: EnsembleForCausalLM) -> Iterator[None]:
    """Inside, `transformers`' own loop may not be used."""

    def refuse(*prepared: Any, **more: Any) -> None:
        raise AssertionError("transformers decoded")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "sample_as_transformers", refuse)
        yield


def both(model: EnsembleForCausalLM, ids: Tensor = IDS, **options: Any) -> tuple[Any, Any]:
    """What the loop returns, and what `transformers`' own returns, with the same seed."""
    options = {"max_new_tokens": 12, "do_sample": False, **options}
    if not {"logits_processor", "stopping_criteria"}.isdisjoint(options):  # of the caller's own: by row, he says
        options["custom_generate"] = Decoder("none")
    results = []
    for how in (by_the_loop, by_transformers):
        with how(model):
            torch.manual_seed(8)
            results.append(model.generate(ids, **options))
    return results[0], results[1]


class NothingTwice(LogitsProcessor):
    """Forbids the last token of each row, and the more of the others the longer a text is."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.scatter(1, input_ids[:, -1:], -torch.inf)
        scores[:, input_ids.shape[1] :] -= 2.0
        return scores


class SumEnds(StoppingCriteria):
    """Ends a row where its new tokens add up to a multiple of 5."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids[:, 9:].sum(1) % 5 == 0


OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "one end": {"eos_token_id": 9},
    "no end": {"eos_token_id": None},
    "min_new_tokens": {"min_new_tokens": 6},
    "min_length": {"min_length": 13},
    "max_length": {"max_new_tokens": None, "max_length": 14},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[40], [11, 12], [30]], "eos_token_id": None},
    "repetition_penalty": {"repetition_penalty": 1.8},
    "stop_strings": {"stop_strings": ["a", "9", "bc"], "tokenizer": make_tokenizer(), "eos_token_id": None},
    "forced_eos_token_id": {"forced_eos_token_id": 9, "eos_token_id": 9},
    "suppress_tokens": {"suppress_tokens": list(range(10, 30)), "begin_suppress_tokens": list(range(30, 40))},
    "sequence_bias": {"sequence_bias": [[[20], 4.0], [[21, 22], 3.0]]},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (3, 1.3), "eos_token_id": 9},
    "renormalize_logits": {"renormalize_logits": True, "remove_invalid_values": True},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=4.0, seeding_scheme="selfhash")},
    "processor": {"logits_processor": LogitsProcessorList([NothingTwice()])},
    "criterion": {"stopping_criteria": [SumEnds()]},
    "chunks": {"prefill_chunk_size": 2},
    "all": {"min_new_tokens": 3, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3, "bad_words_ids": [[40]]},
}
SAMPLING: dict[str, dict[str, Any]] = {
    "plain": {"top_k": 0},
    "temperature": {"temperature": 0.6, "top_k": 0},
    "top": {"temperature": 1.3, "top_k": 20, "top_p": 0.9},
    "cut": {"min_p": 0.02, "typical_p": 0.9, "epsilon_cutoff": 0.002, "eta_cutoff": 0.002, "top_k": 0},
    "penalty": {"repetition_penalty": 1.5, "min_new_tokens": 4, "temperature": 0.9},
}


@pytest.mark.parametrize("mask", [None, LEFT], ids=["whole", "padded"])
@pytest.mark.parametrize("name", OPTIONS)
def test_greedy(model: EnsembleForCausalLM, name: str, mask: Tensor | None) -> None:
    options = {**OPTIONS[name], "attention_mask": mask}
    found, expected = both(model, **options)
    assert found.tolist() == expected.tolist()
    decoder = Decoder("source_pt", num_positions=4, is_fixed=True)
    if "stop_strings" in options:  # `generate` loses the tokenizer of a decoding method of one's own
        stops = {"stop_strings": options.pop("stop_strings"), "tokenizer": options.pop("tokenizer")}
        options["stopping_criteria"] = [StopStringCriteria(**stops)]
    drafted = model.generate(IDS, **{"max_new_tokens": 12, **options}, do_sample=False, custom_generate=decoder)
    assert drafted.tolist() == expected.tolist()
    assert decoder.stats.num_drafted > 0


@pytest.mark.parametrize("mask", [None, LEFT], ids=["whole", "padded"])
@pytest.mark.parametrize("num", [1, 3])
@pytest.mark.parametrize("name", SAMPLING)
def test_sampled(model: EnsembleForCausalLM, name: str, num: int, mask: Tensor | None) -> None:
    options = {**SAMPLING[name], "do_sample": True, "num_return_sequences": num, "attention_mask": mask}
    found, expected = both(model, **options)
    assert found.tolist() == expected.tolist()
    assert len({tuple(row) for row in found.tolist()}) > num
    torch.manual_seed(8)
    decoder = Decoder("source_pt", num_positions=4, is_fixed=True)
    drafted = model.generate(IDS, **options, max_new_tokens=12, custom_generate=decoder)
    assert drafted.tolist() == expected.tolist()
    assert decoder.stats.num_drafted > 0


def test_a_mask_with_holes() -> None:
    """A token that is masked is not there: without a window, which counts places in `transformers`."""
    members = {"reference": make_model("llama", 1), "aligned": make_model("gpt2", 2)}
    model = EnsembleForCausalLM.from_members(rule="realign", alpha=0.6, members=members)
    found, expected = both(model, attention_mask=HOLES)
    assert found.tolist() == expected.tolist()
    for row, mask in enumerate(HOLES.bool()):
        alone = model.generate(IDS[row : row + 1, mask], max_new_tokens=12, do_sample=False)[0, int(mask.sum()) :]
        assert found[row, 9 : 9 + len(alone)].tolist() == alone.tolist()


@pytest.mark.parametrize("alpha", [0.0, 0.9, torch.tensor([0.0, 0.4, 0.8, 1.5])], ids=["0", "0.9", "rows"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_alpha(model: EnsembleForCausalLM, alpha: Any, do_sample: bool) -> None:
    model.alpha = alpha
    found, expected = both(model, do_sample=do_sample, num_return_sequences=2 if do_sample else 1, top_k=0)
    assert found.tolist() == expected.tolist()


# -- what is returned -------------------------------------------------------------------------------------------------


def new_lengths(sequences: Tensor, num_prompt: int, end_ids: list[int]) -> list[int]:
    """The new tokens of each row, up to its end."""
    ends = torch.isin(sequences[:, num_prompt:], torch.tensor(end_ids))
    return [int(row.nonzero()[0]) + 1 if row.any() else row.shape[0] for row in ends]


@pytest.mark.parametrize("mask", [None, LEFT], ids=["whole", "padded"])
@pytest.mark.parametrize("draft", ["none", "source_pt"])
@pytest.mark.parametrize("name", [None, *SAMPLING])
def test_scores_and_logits(model: EnsembleForCausalLM, name: str | None, draft: str, mask: Tensor | None) -> None:
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": name is not None, **SAMPLING.get(name, {})}
    if name is None:
        options |= {"repetition_penalty": 1.2, "min_new_tokens": 3}
        model.generation_config.eos_token_id = [*ENDS, 15, 22]
    options |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    torch.manual_seed(8)
    found = model.generate(IDS, **options, custom_generate=Decoder(draft, num_positions=4, is_fixed=True))
    with shared_noise(8) if name is not None else nullcontext(), by_transformers(model):
        expected = model.generate(IDS, **options)
    assert found.sequences.tolist() == expected.sequences.tolist()
    lengths = new_lengths(found.sequences, 9, model.generation_config.eos_token_id)
    for ours, theirs in ((found.scores, expected.scores), (found.logits, expected.logits)):
        assert len(ours) == len(theirs) == max(lengths)
        for position, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            running = [row for row, length in enumerate(lengths) if position < length]
            assert_close(one[running], other[running], atol=1e-4, rtol=1e-4)
            assert one[[row for row in range(4) if row not in running]].count_nonzero() == 0
            assert one.shape == other.shape
            assert one.dtype == other.dtype


def test_only_what_was_asked_for_is_returned(model: EnsembleForCausalLM) -> None:
    found = model.generate(IDS, max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
    assert found.scores is None
    assert len(found.logits) == 3
    assert isinstance(model.generate(IDS, max_new_tokens=3, output_scores=True), Tensor)


# -- a cache that is handed on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft", ["none", "source_pt"])
@pytest.mark.parametrize("mask", [None, LEFT], ids=["whole", "padded"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_a_cache_goes_on(model: EnsembleForCausalLM, do_sample: bool, mask: Tensor | None, draft: str) -> None:
    """Rows that ended early, turn by turn: the texts of reading each row anew, and only what is new is read."""
    ids, mask, cache = IDS, torch.ones_like(IDS) if mask is None else mask, None
    options = {"do_sample": do_sample, "max_new_tokens": 6, "top_k": 0}
    num_before = 0
    for turn in range(3):
        decoder = Decoder(draft, num_positions=4, is_fixed=True, seed=turn)
        more = {"return_dict_in_generate": True, "past_key_values": cache, "custom_generate": decoder}
        with spied(model) as steps, by_the_loop(model):
            found = model.generate(ids, attention_mask=mask, **options, **more)
        assert steps[0].input_ids.shape[1] <= ids.shape[1] - num_before
        assert isinstance(found.past_key_values, RowCache)
        assert cache is None or found.past_key_values is cache
        cache, num_before = found.past_key_values, ids.shape[1]
        lengths = new_lengths(found.sequences, num_before, ENDS)
        said = torch.zeros(4, found.sequences.shape[1], dtype=torch.bool)
        for row, length in enumerate(lengths):
            prompt, text = ids[row, mask[row].bool()], found.sequences[row, num_before : num_before + length]
            decoder = Decoder("none", seed=turn, numbers=[row])
            with by_transformers(model):
                alone = model.generate(prompt[None], **options, custom_generate=decoder)
            assert alone.tolist() == [[*prompt.tolist(), *text.tolist()]]
            assert cache.lengths[row] == len(prompt) + length - 1  # the newest token is not read yet
            said[row, : num_before + length] = True
            said[row, :num_before] = mask[row].bool()
        ids = torch.cat([found.sequences, random_ids(4, 3, seed=turn)], dim=1)
        mask = torch.cat([said.long(), torch.ones(4, 3, dtype=torch.int64)], dim=1)


def test_a_cache_may_hold_all_of_a_prompt_and_other_texts(model: EnsembleForCausalLM) -> None:
    """Only what stands on a row as it stood is not read again: other rows, fewer or more of them, holes in a mask."""
    options = {"max_new_tokens": 5, "do_sample": False}

    def cache() -> RowCache:
        found = model.generate(IDS, **options, return_dict_in_generate=True).past_key_values
        assert isinstance(found, RowCache)
        return found

    first = model.generate(IDS, **options).tolist()
    with spied(model) as steps:
        assert model.generate(IDS, **options, past_key_values=cache()).tolist() == first
    assert steps[-5].input_ids.shape == (4, 1)  # the last token of each prompt
    changed = IDS.clone()
    changed[:, 3] += 1
    mask = torch.ones_like(IDS)
    mask[1, 4] = 0
    for ids, seen in (
        (IDS[1:2], None),
        (IDS[[2, 0]], None),
        (random_ids(6, 9, seed=8), None),
        (changed, None),
        (IDS, mask),
        (torch.cat([IDS, IDS]), None),
    ):
        expected = model.generate(ids, attention_mask=seen, **options)
        found = model.generate(ids, attention_mask=seen, past_key_values=cache(), **options)
        assert found.tolist() == expected.tolist()


def test_a_cache_of_other_members_is_refused(model: EnsembleForCausalLM, trio: dict[str, PreTrainedModel]) -> None:
    first = model.generate(IDS, max_new_tokens=5, return_dict_in_generate=True)
    other = EnsembleForCausalLM.from_members(members=trio)
    for one in (model, other):
        if one is model:
            one.members["source_pt"] = make_model("llama", 9)
        with pytest.raises(InputError, match="made by other members, or before they were moved; leave it out"):
            one.generate(IDS, max_new_tokens=5, past_key_values=first.past_key_values)


def test_transformers_loop_refuses_a_cache_of_rows(model: EnsembleForCausalLM) -> None:
    first = model.generate(IDS, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    given = {"max_new_tokens": 5, "do_sample": False, "past_key_values": first.past_key_values}
    for options, reason in (
        ({"use_cache": False}, "use_cache is off"),
        ({"num_beams": 2}, "beam search"),
        ({"prefix_allowed_tokens_fn": lambda *_: [1]}, "PrefixConstrainedLogitsProcessor"),
    ):
        with pytest.raises(InputError, match=f"is a RowCache, and transformers' own loop decodes here .{reason}"):
            model.generate(first.sequences, **given, **options)


def test_a_grid_leaves_a_cache_as_it_was(model: EnsembleForCausalLM) -> None:
    first = model.generate(IDS, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    cache = first.past_key_values
    before = list(cache.lengths)
    decoder = Decoder("none", points=make_grid(["base-change"], [0.0, 1.5]))
    options = {"max_new_tokens": 6, "do_sample": False}
    grid = model.generate(first.sequences, **options, past_key_values=cache, custom_generate=decoder)
    assert cache.lengths[: len(before)] == before
    assert not any(cache.lengths[len(before) :])
    expected = model.generate(first.sequences, **options, custom_generate=decoder)
    assert grid.sequences.tolist() == expected.sequences.tolist()
    again = model.generate(first.sequences, **options, past_key_values=cache)
    assert again.tolist() == model.generate(first.sequences, **options).tolist()
