"""Members with different tokenizers in several processes: they decode what one process decodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.rank_cases import run_ranks, spread
from helpers.text_cases import KINDS, save_text_members
from torch.testing import assert_close

from ensembler import EnsembleForCausalLM
from ensembler.decoding.decoding_options import DecodingOptions
from ensembler.decoding.prompts import Prompt, encode_prompts
from ensembler.decoding.texts import complete_grid, complete_prompts
from ensembler.engine.distributed import World
from ensembler.engine.grid import GridPoint
from ensembler.engine.text_member_set import TextMemberSet
from ensembler.evaluation.backends import score

TEXTS = ("The quick brown", "def f(x):", "It is 1234 and", "lazy dogs jump")


def decode_all(model: EnsembleForCausalLM) -> dict[str, list[list[int]]]:
    """Prompts that join others, greedy and sampled, plain and at the points of a grid."""
    assert isinstance(model.member_set, TextMemberSet)
    tokenizer = model.member_set.text.plan.anchor.tokenizer
    prompts = [Prompt(number, text, "") for number, text in enumerate(TEXTS)]
    encoded = encode_prompts(prompts, tokenizer, plan=model.member_set.text.plan)
    points = [GridPoint(model.rule.name, alpha) for alpha in (0.0, 0.8)]
    found = {}
    for temperature in (0.0, 0.9):
        options = DecodingOptions(max_new_tokens=7, temperature=temperature, seed=3)
        for one in complete_prompts(model, tokenizer, encoded, options, batch_size=3):
            found[f"plain {temperature} {one.number}"] = [sample.ids for sample in one.samples]
        for at in complete_grid(model, tokenizer, encoded[:2], points, options, batch_size=4):
            found[f"grid {temperature} {at.number}"] = [sample.ids for one in at.samples.values() for sample in one]
    return found


def scored(model: EnsembleForCausalLM) -> list[list[float]]:
    rows = [{"prompt": "The quick", "continuation": text} for text in (" brown fox", " 12 dogs")]
    return [row["log_prob"] for row in score(model, rows, alpha=[0.0, 1.0])]


@pytest.mark.parametrize(("kinds", "size"), [(KINDS[0], 2), (KINDS[0], 3), (KINDS[2], 2)])
def test_ranks_decode_what_one_process_decodes(kinds: tuple[str, str, str], size: int, tmp_path: Path) -> None:
    """A rank may run no member of the anchor's tokenizer, and another none that is asked for text."""
    whole = EnsembleForCausalLM.from_pretrained(save_text_members(tmp_path, *kinds))
    assert isinstance(whole.member_set, TextMemberSet)
    plan, members = whole.member_set.text.plan, dict(whole.members.items())
    ids = whole.tokenizer("The quick brown fox", return_tensors="pt").input_ids
    expected, scores = decode_all(whole), scored(whole)
    with torch.no_grad():
        logits = whole(ids, use_cache=False).logits

    def task(world: World) -> Any:
        model = spread(world, members, whole, text=plan)
        model.tokenizer = plan.anchor.tokenizer
        texts, own_scores = decode_all(model), scored(model)
        with torch.no_grad():
            return texts, own_scores, model(ids, use_cache=False).logits

    assert any(expected[f"plain 0.9 {at}"] != expected[f"plain 0.0 {at}"] for at in range(len(TEXTS)))
    results = run_ranks(size, task)
    assert all(isinstance(one, tuple) for one in results), results
    for texts, own_scores, own in results:
        assert texts == expected
        assert own_scores == [pytest.approx(one, abs=1e-4) for one in scores]
        assert_close(own, logits, atol=1e-5, rtol=0)
        assert torch.equal(own, results[0][2])


def test_a_member_that_fails_stops_all_with_its_name(tmp_path: Path) -> None:
    whole = EnsembleForCausalLM.from_pretrained(save_text_members(tmp_path))
    assert isinstance(whole.member_set, TextMemberSet)
    plan, members = whole.member_set.text.plan, dict(whole.members.items())
    with torch.no_grad():
        next(members["target_pt"].parameters()).fill_(torch.nan)
    errors = run_ranks(3, lambda world: decode_all(spread(world, members, whole, text=plan)))
    assert all("target_pt computed NaN logits" in error for error in errors), errors
