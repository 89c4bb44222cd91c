"""Who drafts, at which numbers; what a text's own repetitions draft; and scores that are recorded under a draft."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.adapter_cases import make_pair, save_adapter, save_base
from helpers.drafting_cases import ROLES, fixed, make_trio, plain_ids
from helpers.tiny import make_model, random_ids

from ensembler import EnsembleForCausalLM
from ensembler.decoding.decoder import Decoder, grid_of
from ensembler.decoding.drafting import Drafter, find_drafter, look_up
from ensembler.engine.grid import Grid, GridPoint
from ensembler.errors import ConfigError

Numbers = dict[str, tuple[float, float]]


def find(
    model: EnsembleForCausalLM, draft: str, points: list[GridPoint] | None = None
) -> tuple[Drafter | str, list[Grid]]:
    """Who drafts, and the grids that choosers were made for."""
    grids: list[Grid] = []
    found = find_drafter(model, draft, grid_of(model, points, 1), lambda grid: grids.append(grid))  # type: ignore
    return found, grids


def numbers(model: EnsembleForCausalLM, draft: str) -> Numbers:
    """The constant and the slope of each drafting role."""
    _, (grid,) = find(model, draft)
    num = len(grid.roles)
    (row,) = grid.weights.table.tolist()
    return {role: (row[place], row[num + place]) for place, role in enumerate(grid.roles)}


def test_the_numbers_of_a_draft(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter, target = save_adapter(base, tmp_path / "adapter"), make_model("gpt2", 3)
    base_change, eft = (make_pair(base, adapter, target, rule=rule) for rule in ("base-change", "eft"))
    assert numbers(base_change.shared, "source_pt") == {"source_ft": (1, 0), "source_pt": (0, 0)}
    assert numbers(eft.shared, "source_ft") == {"source_pt": (1, -1), "source_ft": (0, 1)}
    for role in ROLES:
        assert numbers(base_change.copies, role) == {role: (1, 0)}
        assert numbers(eft.copies, role) == {role: (1, 0)}


def test_the_numbers_of_a_drafts_grid(tmp_path: Path) -> None:
    """EFT drafted by both source members is p_pt · (p_ft / p_pt)^α, base-change p_ft, at each point."""
    base = save_base(tmp_path / "base")
    model = make_pair(base, save_adapter(base, tmp_path / "adapter"), make_model("gpt2", 3)).shared
    points = [GridPoint(rule, alpha) for rule in ("base-change", "eft") for alpha in (0.0, 0.4, 1.5)]
    _, (grid,) = find(model, "source_ft", points)
    assert grid.points == tuple(points)
    z_ft, z_pt = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    found = grid.combine({"source_ft": z_ft, "source_pt": z_pt})
    expected = [z_ft] * 3 + [z_pt + alpha * (z_ft - z_pt) for alpha in (0.0, 0.4, 1.5)]
    torch.testing.assert_close(found, torch.stack(expected))


def test_a_score_is_left_out_and_cannot_draft() -> None:
    members = {"target_pt": make_model("llama", 1), "reward": make_model("llama", 2)}
    model = EnsembleForCausalLM.from_members(rule="reward", alpha=0.3, members=members)
    assert numbers(model, "target_pt") == {"target_pt": (1, 0)}
    with pytest.raises(ConfigError, match="draft is 'reward', which gives scores and no distribution"):
        find(model, "reward")


def test_auto_drafts_with_a_light_member_alone() -> None:
    equal = EnsembleForCausalLM.from_members(members={role: make_model("llama", 1) for role in ROLES})
    assert find(equal, "auto") == ("no member is light enough to draft for the others", [])
    members = {role: make_model("llama", 1) for role in ROLES} | {"target_pt": make_model("llama", 1, num_layers=6)}
    found, _ = find(EnsembleForCausalLM.from_members(members=members), "auto")
    assert isinstance(found, Drafter)
    assert found.runner is not None
    assert found.runner.roles[0].startswith("source_")
    assert found.name == found.runner.name
    assert 0 < found.share < 1 / 3
    assert len(found.others) == 2


def test_auto_does_not_draft_with_a_score() -> None:
    """Also where it is the lightest."""
    members = {"target_pt": make_model("llama", 1, num_layers=8), "reward": make_model("llama", 2, num_layers=1)}
    model = EnsembleForCausalLM.from_members(rule="reward", alpha=0.3, members=members)
    assert find(model, "auto") == ("no member is light enough to draft for the others", [])


def test_repetitions_are_drafted_by_no_member() -> None:
    found, grids = find(make_trio(), "ngram")
    assert isinstance(found, Drafter)
    assert (found.runner, found.others, found.share, found.name, grids) == (None, (), 0.0, "ngram", [])


@pytest.mark.parametrize(
    ("text", "num", "found"),
    [
        ([1, 2, 3, 4, 5, 1, 2, 3], 4, [4, 5, 1, 2]),
        ([1, 2, 3, 7, 9, 2, 3, 8, 2, 3], 1, [8]),  # the latest place
        ([1, 2, 3, 7, 9, 2, 3, 8, 1, 2, 3], 2, [7, 9]),  # three tokens before two
        ([4, 1, 2, 3, 4, 1], 9, [2, 3, 4, 1]),  # no more than there is
        ([1, 2, 3], 3, []),
        ([5, 5, 5, 5], 3, [5]),
        ([1, 2, 1, 2], 0, []),
        ([1], 3, []),
        ([], 3, []),
    ],
)
def test_what_followed_before(text: list[int], num: int, found: list[int]) -> None:
    assert look_up(text, num) == found


@pytest.mark.parametrize("sampling", [False, True])
def test_scores_are_those_of_the_text_and_not_of_rejected_drafts(sampling: bool) -> None:
    model, ids = make_trio(alpha=0.1), random_ids(2, 5)
    options = {"max_new_tokens": 14, "do_sample": sampling, "return_dict_in_generate": True}
    options |= {"output_scores": True, "output_logits": True, "repetition_penalty": 1.2}
    decoder = fixed(num=4, seed=6)
    found = plain_ids(model, ids, **options, custom_generate=decoder)
    expected = plain_ids(model, ids, **options, custom_generate=Decoder("none", seed=6))
    assert 0 < decoder.stats.num_accepted < decoder.stats.num_drafted
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.stack(found[name]), torch.stack(expected[name]), rtol=1e-4, atol=1e-4)
