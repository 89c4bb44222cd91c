"""Shards of the vocabulary, combined one by one and joined, are the combination of whole rows, bit for bit."""

from __future__ import annotations

import math
import random
from functools import partial

import pytest
import torch
from ensembler_kernels import Weights, combine
from torch import Tensor

from ensembler.engine.grid import make_combination
from ensembler.rules import RULES, Rule, get_rule
from ensembler.serving import vocab_shards
from ensembler.serving.vocab_shards import VocabShards, can_combine_shards
from ensembler.vocab import VocabularyContract

TRIO = ("source_ft", "target_pt", "source_pt")
LINEAR = get_rule("linear", constant={"source_ft": 0.5, "target_pt": 0.5}, slope={"target_pt": 0.4, "source_pt": -0.7})
SERVED: dict[str, tuple[Rule, ...]] = {
    "trio": (RULES["base-change"], RULES["eft"], LINEAR, Rule("source_pt", {"source_pt": 1.0}, {}, "", "")),
    "reward": (RULES["reward"], Rule("target_pt", {"target_pt": 1.0}, {}, "", "", raw_roles=frozenset({"reward"}))),
    "realign": (RULES["realign"],),
}


def weights_of(rules: tuple[Rule, ...], widths: dict[str, int], shared: int, outside: str = "mask") -> Weights:
    contract = VocabularyContract("", shared, widths, dict.fromkeys(widths, shared), dict.fromkeys(widths, 0))
    return Weights.of(*((make_combination(rule, contract, outside, tuple(widths)), 1.0) for rule in rules))


def random_widths(roles: tuple[str, ...], kind: str, draw: random.Random) -> tuple[dict[str, int], int]:
    """Widths by role and the number of shared ids: of one width, with padded heads, or with more tokens in some."""
    most = draw.choice([draw.randint(1, 40), draw.randint(40, 700), 1000, 2113])
    if kind == "identical":
        return dict.fromkeys(roles, most), most
    widths = {role: draw.randint(max(1, most - draw.choice([3, 90, most])), most) for role in roles}
    return widths, draw.randint(max(1, min(widths.values()) - 70), min(widths.values()))


def random_rows(weights: Weights, num: int, generator: torch.Generator) -> Tensor:
    """A table whose rows are of all rules, at random α, 0 among them."""
    rows = weights.table[torch.randint(len(weights), (num,), generator=generator)].clone()
    rows[:, -2] = torch.randn(num, generator=generator) * (torch.rand(num, generator=generator) > 0.3)
    return rows


def random_logits(widths: dict[str, int], num: int, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    """Logits of which about every second tensor holds −inf, +inf or NaN in a few places."""
    found = []
    for width in widths.values():
        z = torch.randn(num, width, generator=generator) * 8
        for number in (-math.inf, math.inf, math.nan):
            share = 0.03 if torch.rand(1, generator=generator) < 0.2 else 0.0
            z[torch.rand(num, width, generator=generator) < share] = number
        found.append(z.to(dtype))
    return found


def cut(z: Tensor, num_ranks: int, size: int) -> list[Tensor]:
    """A member's logits in shards, with rubbish in the padding."""
    padded = torch.full((len(z), num_ranks * size), math.nan, dtype=z.dtype)
    padded[:, : z.shape[1]] = z
    return list(padded.split(size, dim=1))


def by_shards(shards: VocabShards, num_ranks: int, logits: list[Tensor], table: Tensor) -> tuple[Tensor, Tensor]:
    """Return the result of all ranks together."""
    own = [cut(z, num_ranks, shards.size) for z in logits]
    parts = [shards.combine(rank, [z[rank] for z in own], table) for rank in range(num_ranks)]
    assert {part.shape for part in parts} == {(len(table), shards.size + len(logits))}
    assert {part.dtype for part in parts} == {torch.float32}
    return shards.join(torch.stack(parts))


def same_rows(one: Tensor, other: Tensor) -> Tensor:
    """Return the rows that agree to the bit; every NaN is as good as another."""
    assert one.shape == other.shape
    return ((one.view(torch.int32) == other.view(torch.int32)) | (one.isnan() & other.isnan())).all(1)


def near_rows(one: Tensor, other: Tensor, table: Tensor) -> Tensor:
    """Return the rows that agree to a rounding and have a product that is rounded: a CPU does it alone."""
    is_rounded = (table[:, :-2].abs() % 1 != 0).any(1)
    return one.isclose(other, rtol=0, atol=2e-5, equal_nan=True).all(1) & is_rounded


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["identical", "padded"])
@pytest.mark.parametrize("served", SERVED)
def test_shards_are_the_whole_row_bit_for_bit(
    served: str, kind: str, num_ranks: int, impl: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocab_shards, "combine", partial(combine, impl=impl))
    roles = SERVED[served][0].roles
    num_nan = num_empty = 0
    for seed in range(60):
        draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        widths, shared = random_widths(roles, kind, draw)
        weights = weights_of(SERVED[served], widths, shared, "neutral" if kind == "identical" and seed % 2 else "mask")
        num, dtype = draw.randint(0, 5), draw.choice([torch.float32, torch.bfloat16, torch.float16])
        logits, table = random_logits(widths, num, dtype, generator), random_rows(weights, num, generator)
        size = math.ceil((max(widths.values()) + draw.choice([0, 0, 64, 900])) / num_ranks)

        shards = VocabShards(weights, tuple(widths.values()), size)
        combined, is_nan = by_shards(shards, num_ranks, logits, table)
        whole = combine(logits, weights.replace_table(table), impl=impl)
        is_same = same_rows(combined, whole)
        if impl is None:
            is_same |= near_rows(combined, whole, table)
        assert is_same.all(), (seed, widths, shared, dtype)
        assert torch.equal(is_nan, torch.stack([z.isnan().any(1) for z in logits], 1))
        num_nan += int(is_nan.sum())
        num_empty += (num_ranks - 1) * size >= shared
    assert num_nan > 20  # the cases were not all harmless
    assert num_ranks == 1 or num_empty > 5


def test_a_cutoff_and_neutral_ids_need_whole_rows() -> None:
    even, uneven = dict.fromkeys(TRIO, 70), dict(zip(TRIO, (70, 64, 70), strict=True))
    trio = SERVED["trio"]
    assert can_combine_shards(weights_of(trio, uneven, 60), tuple(uneven.values()))
    assert can_combine_shards(weights_of(trio, even, 70, "neutral"), (70, 70, 70))
    assert not can_combine_shards(weights_of(trio, even, 60, "neutral"), (70, 70, 70))
    assert not can_combine_shards(weights_of(trio, uneven, 64, "neutral"), tuple(uneven.values()))
    pair = {"expert": 70, "amateur": 70}
    contrastive = weights_of((RULES["contrastive"],), pair, 70)
    assert not can_combine_shards(contrastive, (70, 70))
    with pytest.raises(ValueError, match="rules without a cut-off"):
        VocabShards(contrastive, (70, 70), 35)


def test_logits_that_are_no_shard_are_refused() -> None:
    widths = dict.fromkeys(TRIO, 70)
    weights = weights_of(SERVED["trio"], widths, 70)
    with pytest.raises(ValueError, match="a shard of 35 ids, got 70"):
        VocabShards(weights, (70, 70, 70), 35).combine(0, [torch.zeros(2, 70)] * 3, weights.table[:2])
