"""The rows of the decode loop against plain Python: which texts share a row, and where rows stand in the cache."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from helpers.grid_cases import POINTS
from helpers.tiny import tables

from ensembler import EnsembleForCausalLM
from ensembler.decoding.decoder import Decoder
from ensembler.decoding.rows import Row, Text, condense_rows, split_rows
from ensembler.decoding.samples import stopping_criteria
from ensembler.engine.grid import GridPoint

ROLES = ("source_ft", "source_pt", "target_pt")


class Simulation:
    """Rows in the hands of the real functions beside a dict of texts, and a cache that is a list of tokens per place.

    Choices, drafts and ends are random; rows come in while others run.
    """

    def __init__(self, chance: random.Random, num_points: int, num_samples: int, *, keeps_rows: bool = False) -> None:
        self.chance = chance
        self.num_points, self.num_samples = num_points, num_samples
        self.keeps_rows = keeps_rows
        self.rows: list[Row] = []
        self.texts: dict[Text, list[int]] = {}
        self.ended: dict[Text, list[int]] = {}
        self.cache: list[list[int]] = []
        self.num_prompts = 0
        self.num_accepted = 0

    def add(self, num: int) -> None:
        """The prompts of new rows are read behind the others, and their texts gain a token each."""
        new = []
        for _ in range(num):
            prompt = [self.num_prompts, *self.tokens(self.chance.randint(0, 3))]
            texts = [Text(p, self.num_prompts, s) for p in range(self.num_points) for s in range(self.num_samples)]
            new.append(Row(prompt, len(prompt), len(prompt) + self.chance.randint(1, 9), texts, prompt))
            self.texts |= {text: list(prompt) for text in texts}
            self.num_prompts += 1
        for place, row in enumerate(new, start=len(self.rows)):
            self.write(place, 0, row.ids)
        self.rows += new
        self.settle({text: (row, self.tokens(1)) for row in new for text in row.texts})

    def step(self) -> None:
        """Every row reads its newest token and random drafts; each text takes as many of these as it happens to."""
        gained = {}
        for place, row in enumerate(self.rows):
            if not row.texts:
                continue
            row.drafts = self.tokens(min(self.chance.randint(0, 4), row.room - 1))
            self.write(place, len(row.ids) - 1, [row.ids[-1], *row.drafts])
            for text in row.texts:
                num = self.chance.choice([0, len(row.drafts), self.chance.randint(0, len(row.drafts))])
                chosen = self.tokens(1)
                if chosen == row.drafts[num : num + 1]:
                    chosen = [1003]  # a draft that is the token that was chosen would have been taken
                gained[text] = row, [*row.drafts[:num], *chosen]
                self.num_accepted += num
        self.settle(gained)

    def settle(self, gained: dict[Text, tuple[Row, list[int]]]) -> None:
        ended = {text for text, (row, new) in gained.items() if len(new) >= row.room or self.chance.random() < 0.07}
        for text, (_, new) in gained.items():
            self.texts[text] += new
        num_before = len(self.rows)
        parts = split_rows(
            self.rows, {text: new for text, (_, new) in gained.items()}, ended, keeps_rows=self.keeps_rows
        )
        self.rows, copies = condense_rows(parts)
        self.check_places(parts, copies, num_before)
        length = max((self.rows[target].num_read for _, target in copies), default=0)
        before = [list(tokens) for tokens in self.cache]
        for source, target in copies:
            self.write(target, 0, before[source][:length])
        for text in ended:
            self.ended[text] = self.texts.pop(text)

    def check_places(self, parts: list[list[Row]], copies: list[tuple[int, int]], num_before: int) -> None:
        """All rows are there, none is copied without need, and none is copied over one that stays."""
        assert sorted(map(id, self.rows)) == sorted(id(row) for rows in parts for row in rows)
        moved = {target: source for source, target in copies}
        assert len(moved) == len(copies)
        for place, row in enumerate(self.rows):
            source = moved.get(place, place)
            assert any(row is part for part in parts[source])
        stay = sum(bool(rows) and place < len(self.rows) for place, rows in enumerate(parts))
        assert len(copies) == len(self.rows) - stay
        assert num_before == len(parts)

    def check(self) -> None:
        """Texts have the tokens that they were given, alone or with those that have the same; the cache holds them."""
        running = {text: row for row in self.rows for text in row.texts}
        assert running.keys() == self.texts.keys()
        assert all(row.ids == self.texts[text] for text, row in running.items())
        rows_with_texts = [row for row in self.rows if row.texts]
        assert sum(len(row.texts) for row in self.rows) == len(self.texts)
        assert len(rows_with_texts) == len({tuple(ids) for ids in self.texts.values()})
        assert self.keeps_rows or len(rows_with_texts) == len(self.rows)
        for place, row in enumerate(self.rows):
            assert row.num_read == len(row.ids) - 1
            assert self.cache[place][: row.num_read] == row.ids[: row.num_read]
        for text, ids in self.ended.items():
            assert text.has_ended
            assert ids[-len(text.ids) :] == text.ids
        assert not any(text.has_ended for text in self.texts)

    def tokens(self, num: int) -> list[int]:
        return [self.chance.choice([1000, 1000, 1000, 1001, 1002]) for _ in range(num)]

    def write(self, place: int, start: int, tokens: list[int]) -> None:
        self.cache += [[] for _ in range(place + 1 - len(self.cache))]
        self.cache[place][start : start + len(tokens)] = tokens


@pytest.mark.parametrize("seed", range(60))
def test_rows_are_the_distinct_texts(seed: int) -> None:
    chance = random.Random(seed)
    world = Simulation(chance, chance.randint(1, 6), chance.randint(1, 3))
    num_waiting = chance.randint(3, 9)
    while num_waiting or world.rows:
        if num_waiting and (not world.rows or chance.random() < 0.4):
            num = chance.randint(1, num_waiting)
            num_waiting -= num
            world.add(num)
        else:
            world.step()
        world.check()
    assert len(world.ended) == world.num_prompts * world.num_points * world.num_samples
    assert not world.texts


@pytest.mark.parametrize("seed", range(20))
def test_rows_that_are_kept_stay_where_they_are(seed: int) -> None:
    """For a cache that somebody goes on with: with one text each, row i is prompt i to the end."""
    world = Simulation(random.Random(seed), 1, 1, keeps_rows=True)
    world.add(6)
    while world.texts:
        world.check()
        assert [row.ids[0] for row in world.rows] == list(range(6))
        world.step()
    assert [row.ids[0] for row in world.rows] == list(range(6))
    ids = {text.prompt: ids for text, ids in world.ended.items()}
    assert [row.ids for row in world.rows] == [ids[prompt] for prompt in range(6)]
    assert all(world.cache[place][: row.num_read] == row.ids[:-1] for place, row in enumerate(world.rows))


def row_of(*names: int) -> Row:
    return Row([0], 1, 9, [Text(0, name, 0) for name in names], [0])


@pytest.mark.parametrize(
    ("sizes", "copies"),
    [
        ([1, 1, 1], []),
        ([0, 1, 1], [(2, 0)]),  # the last row fills the hole
        ([0, 0, 1], [(2, 0)]),
        ([3, 1], [(0, 2), (0, 3)]),  # parts go behind the others
        ([2, 0, 1], [(0, 1)]),  # or where one has left
        ([0, 3], [(1, 0), (1, 2)]),
        ([0, 0], []),
    ],
)
def test_as_few_rows_move_as_possible(sizes: list[int], copies: list[tuple[int, int]]) -> None:
    parts = [[row_of(place) for _ in range(size)] for place, size in enumerate(sizes)]
    rows, found = condense_rows(parts)
    assert sorted(found) == sorted(copies)
    assert len(rows) == sum(sizes)


# -- known logits -----------------------------------------------------------------------------------------------------


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
    longest = max(map(len, expected.values())) - 1
    distinct = [
        len({tuple(text[: step + 1]) for text in expected.values() if len(text) > step + 1}) for step in range(longest)
    ]
    for draft in ("none", "source_ft", "ngram"):
        for member in members.values():
            member.num_forwards = 0
        decoder = Decoder(draft, points=POINTS, num_positions=4, is_fixed=True)
        output = model.generate(torch.tensor([[first] for first in firsts]), custom_generate=decoder, max_new_tokens=20)
        found = {
            (point, first): output.sequences[k, row, : output.lengths[k, row]].tolist()
            for k, point in enumerate(POINTS)
            for row, first in enumerate(firsts)
        }
        assert found == expected
        if draft == "none":
            assert list(output.rows_per_step) == distinct
            assert {member.num_forwards for member in members.values()} == {longest}
        else:
            assert members["target_pt"].num_forwards == len(output.rows_per_step) <= longest


@pytest.mark.parametrize("draft", ["none", "target_pt"])
def test_a_split_after_common_tokens(draft: str) -> None:
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
    decoder = Decoder(draft, points=points, is_fixed=True)
    output = model.generate(torch.tensor([[10]]), custom_generate=decoder, max_new_tokens=9)
    assert draft != "none" or output.rows_per_step == (1, 1, 1, 1, 1, 1, 2)
    common = [10, 11, 12, 13, 14, 15]
    assert output.sequences[:, 0].tolist() == [[*common, 16, 2], [*common, 16, 2], [*common, 40, 2]]


# -- ends -------------------------------------------------------------------------------------------------------------


def test_a_stop_text_may_not_begin_in_the_prompt(tokenizer: Any) -> None:
    rows = torch.tensor([text + [4] * (4 - len(text)) for text in ([5, 6, 7, 8], [5, 5, 6, 7], [9, 9, 9, 5])])
    stop = tokenizer.decode([5, 6])
    assert stopping_criteria(tokenizer, [stop], 1)(rows[:, :2], None).tolist() == [False, False, False]
    assert stopping_criteria(tokenizer, [stop], 1)(rows[:, :3], None).tolist() == [False, True, False]
    assert stopping_criteria(tokenizer, [stop], 0)(rows[:, :2], None).tolist() == [True, False, False]
    assert not stopping_criteria(tokenizer, [], 1)
