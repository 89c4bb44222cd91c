"""Rows that texts take turns on give the logits of each text read alone."""

from __future__ import annotations

import random

import pytest
import torch
from helpers.text_cases import save_text_members

from ensembler import EnsembleForCausalLM
from ensembler.engine.path_rows import PathRows
from ensembler.engine.text_member_set import TextMemberSet


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> EnsembleForCausalLM:
    return EnsembleForCausalLM.from_pretrained(save_text_members(tmp_path_factory.mktemp("texts")))


@torch.inference_mode()
def test_texts_that_go_on_part_and_come_back_are_read_as_alone(model: EnsembleForCausalLM) -> None:
    """More texts and ways to write them than rows; some end, and others begin."""
    member_set = model.member_set
    assert isinstance(member_set, TextMemberSet)
    rows, alone = PathRows(member_set._others[0], "target_pt"), model.members["target_pt"]
    pick = random.Random(0)
    texts = [[1, *pick.choices(range(5, 800), k=pick.randrange(1, 9))] for _ in range(6)]
    for _ in range(40):
        texts[pick.randrange(6)] = [1, pick.randrange(5, 800)] if pick.random() < 0.1 else texts[pick.randrange(6)]
        asked = pick.sample(range(6), pick.randrange(1, 7))
        most = rows.reserve(len(asked))
        wanted = [texts[at] + pick.choices(range(5, 800), k=pick.randrange(1, 3)) for at in asked for _ in range(2)]
        for start in range(0, len(wanted), most):
            part = wanted[start : start + most]
            for ids, found in zip(part, rows.logits(part)[:, -1], strict=True):
                torch.testing.assert_close(found, alone(torch.tensor([ids])).logits[0, -1], atol=1e-4, rtol=1e-4)
        for at in asked:
            texts[at] = texts[at] + pick.choices(range(5, 800), k=1)
    assert rows._cache is not None
    assert rows._cache.num_rows <= 8  # six texts, and two for other ways to write some of them
