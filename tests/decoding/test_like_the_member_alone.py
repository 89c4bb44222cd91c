"""At α = 0 an ensemble gives the texts and scores of its anchor alone, one text at a time, whatever decodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.alone_cases import KINDS, NUM_NEW, PROMPTS, WITHOUT_CACHE, Alone, alone
from helpers.family_configs import FAMILIES
from helpers.tiny import make_tokenizer, random_ids

from ensembler.decoding.decoder import Decoder
from ensembler.decoding.decoding_options import DecodingOptions
from ensembler.decoding.prompts import EncodedPrompt
from ensembler.decoding.texts import complete_grid, complete_prompts
from ensembler.engine.grid import GridPoint, make_grid
from ensembler.evaluation.backends import TransformersBackend
from ensembler.evaluation.request_batches import can_share_contexts, make_batches
from ensembler.evaluation.requests import ScoringRequest

Texts = list[list[int]]


def by_generate(**options: Any) -> Callable[[Alone], Texts]:
    """All prompts in one batch, then one by one: the same texts."""

    def decode(case: Alone) -> Texts:
        found = case.ensemble_texts(together=True, **options)
        assert case.ensemble_texts(together=False, **options) == found
        return found

    return decode


def by_draft(draft: str) -> Callable[[Alone], Texts]:
    def decode(case: Alone) -> Texts:
        decoder = Decoder(draft, num_positions=4, is_fixed=True)
        return case.ensemble_texts(together=True, custom_generate=decoder)

    return decode


def by_queue(**options: Any) -> Callable[[Alone], Texts]:
    def decode(case: Alone) -> Texts:
        prompts = [EncodedPrompt(number, prompt[0].tolist()) for number, prompt in enumerate(PROMPTS)]
        asked = DecodingOptions(max_new_tokens=NUM_NEW, **options)
        found = complete_prompts(case.ensemble, make_tokenizer(), prompts, asked, batch_size=2)
        texts = {one.number: one.samples[0].ids for one in found}
        return [texts[number] for number in range(len(prompts))]

    return decode


def by_grid(case: Alone) -> Texts:
    prompts = [EncodedPrompt(number, prompt[0].tolist()) for number, prompt in enumerate(PROMPTS)]
    points = make_grid(["base-change"], [0.5, 0.0])
    asked = DecodingOptions(max_new_tokens=NUM_NEW)
    found = complete_grid(case.ensemble, make_tokenizer(), prompts, points, asked, batch_size=3)
    texts = {one.number: one.samples[points[1]][0].ids for one in found}
    return [texts[number] for number in range(len(prompts))]


WAYS = {
    "greedy": by_generate(),
    "growing cache": by_generate(cache_implementation="dynamic"),
    "static cache": by_generate(cache_implementation="static"),
    "pieces": by_generate(prefill_chunk_size=5),
    "pieces, growing cache": by_generate(prefill_chunk_size=5, cache_implementation="dynamic"),
    "n-grams draft": by_draft("ngram"),
    "another member drafts": by_draft("source_pt"),
    "it drafts itself": by_draft("source_ft"),
    "queue": by_queue(),
    "queue, drafts, pieces": by_queue(draft="ngram", draft_tokens=4, prefill_chunk=5),
    "grid": by_grid,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_texts(kind: str, way: str) -> None:
    case = alone(kind)
    assert WAYS[way](case) == case.texts()


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_cache(kind: str) -> None:
    case = alone(kind)
    assert by_generate(use_cache=False)(case) == case.texts(use_cache=False)


@pytest.mark.parametrize("kind", KINDS)
def test_beams(kind: str) -> None:
    case = alone(kind)
    expected = case.texts(num_beams=3, use_cache=kind not in WITHOUT_CACHE)
    assert by_generate(num_beams=3)(case) == expected
    assert by_generate(num_beams=3, prefill_chunk_size=5)(case) == expected


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": None}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_assistants_give_the_greedy_text_or_are_refused(kind: str, options: dict[str, Any]) -> None:
    """A state cannot be taken back, and neither can the scale of positions."""
    case = alone(kind)
    own = {name: case.ensemble.members["source_pt"] if value is None else value for name, value in options.items()}
    if kind in ("gemma2", "bloom", "lfm2"):
        assert case.ensemble_texts(together=False, **own) == case.texts()
        return
    reason = "scales positions beyond 16" if " " in kind else "not supported with stateful"
    with pytest.raises(ValueError, match=reason):
        case.ensemble_texts(together=False, **own)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_scores(kind: str, batch_size: int) -> None:
    """Of continuations that begin alike, are beginnings of others, and pass the length where positions are scaled."""
    case, requests, expected = alone(kind), [], []
    for number, length in enumerate((3, 12, 15, 20)):
        context = random_ids(1, length, seed=length)[0].tolist()
        others = [random_ids(1, size, seed=size)[0].tolist() for size in (1, 6, 3)]
        continuations = [*others, others[1][:2], [7]]
        requests.append(ScoringRequest(number, tuple(context), tuple(map(tuple, continuations)), "it"))
        for ids in continuations:
            case.forget()
            with torch.no_grad():
                logits = case.model(input_ids=torch.tensor([context + ids[:-1]]), use_cache=False).logits[0]
            chosen = logits.double().log_softmax(-1)[length - 1 :].gather(1, torch.tensor(ids)[:, None])
            expected.append(float(chosen.sum()))
    share = can_share_contexts(member.config for member in case.ensemble.members.values())
    batches = make_batches(requests, batch_size, share_contexts=share)
    scored = TransformersBackend(case.ensemble).score(batches, [GridPoint("base-change", 0.0)])
    by_number = {one.request.number: one for batch in scored for one in batch}
    found = [score.log_probs[0] for number in range(4) for score in by_number[number].scores]
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("family", [one for one in FAMILIES if one not in KINDS])
def test_every_family_of_the_decode_loop(family: str) -> None:
    case = alone(family)
    assert [way for way, decode in WAYS.items() if decode(case) != case.texts()] == []
    test_without_a_cache(family)
    test_beams(family)
    test_scores(family, 3)
