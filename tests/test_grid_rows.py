"""The parts of a grid, against plain Python: which texts share a row, fake models with known logits, the noise."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from grid_cases import POINTS
from tiny import tables

from ensembler import EnsembleForCausalLM
from ensembler.decoding.choosing import Noise
from ensembler.decoding.grid import GridDecoder
from ensembler.decoding.points import GridPoint
from ensembler.decoding.samples import stopping_criteria
from ensembler.decoding.tracks import ENDED, Tracks

ROLES = ("source_ft", "source_pt", "target_pt")


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_the_distinct_texts(seed: int) -> None:
    """Random tokens for each (point, text), random ends of rows: compared with a dict of texts."""
    chance = random.Random(seed)
    num_points, num_prompts, num_samples = chance.randint(1, 6), chance.randint(1, 4), chance.randint(1, 3)
    tracks = Tracks(num_points, num_prompts, num_samples)
    places = [(point, stream) for point in range(num_points) for stream in range(num_prompts * num_samples)]
    texts: dict[tuple[int, int], tuple[int, ...]] = {place: (place[1] // num_samples,) for place in places}
    rows = [(prompt,) for prompt in range(num_prompts)]
    while tracks.num_rows:
        assert tracks.num_rows == len(set(texts.values())) == len(rows)
        tokens = torch.full((num_points, num_prompts * num_samples), ENDED)
        for place in texts:
            assert rows[tracks.row_of[place]] == texts[place]
            tokens[place] = chance.choice([4, 4, 4, 9, 50_000])
            texts[place] += (int(tokens[place]),)
        parents, new = tracks.advance(tokens)
        rows = [(*rows[parent], token) for parent, token in zip(parents.tolist(), new.tolist(), strict=True)]
        assert len(set(rows)) == len(rows)
        assert parents.tolist() == sorted(parents.tolist())
        is_complete = torch.tensor([chance.random() < 0.2 for _ in rows])
        ended = {tuple(place): rows[row] for found, row in tracks.end(is_complete) for place in found.tolist()}
        assert ended == {place: text for place, text in texts.items() if is_complete[rows.index(text)]}
        texts = {place: text for place, text in texts.items() if place not in ended}
        rows = [row for row, ends in zip(rows, is_complete.tolist(), strict=True) if not ends]
        assert all(tracks.row_of[place] == ENDED for place in places if place not in texts)


def table_ensemble(seed: int) -> tuple[EnsembleForCausalLM, dict[str, Any]]:
    members = dict(zip(ROLES, tables(3, seed=seed), strict=True))
    return EnsembleForCausalLM.from_members(members=members), members


@pytest.mark.parametrize("seed", range(8))
def test_known_logits(seed: int) -> None:
    """Every text walked by hand through the tables in float64; rows counted from the texts; ends by id 2."""
    model, members = table_ensemble(seed)
    table = {role: member.table.double() for role, member in members.items()}
    firsts = random.Random(seed).sample(range(4, 64), 5)
    expected = {}
    for point in POINTS:
        anchor, other = ("source_ft", "target_pt") if point.rule == "base-change" else ("target_pt", "source_ft")
        z = table[anchor] + point.alpha * (table[other] - table["source_pt"])
        for first in firsts:
            text = [first]
            while len(text) < 21 and text[-1] != 2:
                text.append(int(z[text[-1]].argmax()))
            expected[point, first] = text
    output = model.generate(
        torch.tensor([[first] for first in firsts]), custom_generate=GridDecoder(POINTS), max_new_tokens=20
    )
    found = {
        (point, first): output.sequences[k, row, : output.lengths[k, row]].tolist()
        for k, point in enumerate(POINTS)
        for row, first in enumerate(firsts)
    }
    assert found == expected
    longest = max(map(len, expected.values())) - 1
    distinct = [
        len({tuple(text[: step + 1]) for text in expected.values() if len(text) > step + 1}) for step in range(longest)
    ]
    assert list(output.rows_per_step) == distinct
    assert {member.num_forwards for member in members.values()} == {longest}


def test_a_split_after_common_tokens() -> None:
    """Two points agree for five tokens and part at the sixth, where the tables of the fake models say so."""
    model, members = table_ensemble(0)
    with torch.no_grad():
        for member in members.values():
            member.table.zero_()
        for token in range(10, 16):
            members["source_ft"].table[token, token + 1] = 5.0
        members["target_pt"].table[15, 40] = 8.0
        members["source_ft"].table[16:, 2] = 5.0
    points = [GridPoint("base-change", alpha) for alpha in (0.0, 0.5, 1.0)]
    output = model.generate(torch.tensor([[10]]), custom_generate=GridDecoder(points), max_new_tokens=9)
    assert output.rows_per_step == (1, 1, 1, 1, 1, 1, 2)
    common = [10, 11, 12, 13, 14, 15]
    assert output.sequences[:, 0].tolist() == [[*common, 16, 2], [*common, 16, 2], [*common, 40, 2]]


# -- noise ------------------------------------------------------------------------------------------------------------


def test_noise_belongs_to_seed_prompt_sample_and_position() -> None:
    noise = Noise(5, torch.tensor([7, 2**40 + 9]), torch.tensor([0, 3]))
    for _ in range(3):
        noise.next_position()
    found = noise.of(torch.tensor([1, 0, 1]), torch.device("cpu"))
    assert found.tolist() == [[5, 2**40 + 9, 3, 2], [5, 7, 0, 2], [5, 2**40 + 9, 3, 2]]


# -- inputs -----------------------------------------------------------------------------------------------------------


def test_a_stop_text_may_not_begin_in_the_prompt(tokenizer: Any) -> None:
    rows = torch.tensor([text + [4] * (4 - len(text)) for text in ([5, 6, 7, 8], [5, 5, 6, 7], [9, 9, 9, 5])])
    stop = tokenizer.decode([5, 6])
    assert stopping_criteria(tokenizer, [stop], 1)(rows[:, :2], None).tolist() == [False, False, False]
    assert stopping_criteria(tokenizer, [stop], 1)(rows[:, :3], None).tolist() == [False, True, False]
    assert stopping_criteria(tokenizer, [stop], 0)(rows[:, :2], None).tolist() == [True, False, False]
    assert not stopping_criteria(tokenizer, [], 1)
