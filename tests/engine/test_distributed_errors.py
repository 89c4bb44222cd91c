"""Several processes on loopback: what fails on one of them stops all, and everyone is told which it was."""

from __future__ import annotations

import functools
import time
from typing import Any

import pytest
import torch
from helpers.commands import SaveMember
from helpers.rank_cases import IDS, OPTIONS, ROLES, run_ranks, spread
from helpers.tiny import TableModel
from torch.testing import assert_close
from transformers import PreTrainedModel

from ensembler import EnsembleForCausalLM
from ensembler.config import EnsembleConfig
from ensembler.engine.distributed import World
from ensembler.engine.members import load_group
from ensembler.errors import MemberError, MissingExtraError, RankError, RunError
from ensembler.preflight import check_ensemble


def fakes() -> dict[str, PreTrainedModel]:
    generator = torch.Generator().manual_seed(1)
    return {role: TableModel(torch.randn(64, 64, generator=generator)) for role in ROLES}


@pytest.mark.parametrize("fault", [RuntimeError("boom"), torch.OutOfMemoryError("big"), float("nan")])
def test_a_member_that_fails_at_step_5_stops_all_ranks(fault: BaseException | float) -> None:
    """Every rank raises the one error with rank and role, its caches are as before, and the step can be made again."""
    members = fakes()
    whole = EnsembleForCausalLM.from_members(members=members)

    def task(world: World) -> Any:
        model = spread(world, members, whole)
        cache = model.new_cache()
        with torch.no_grad():
            for _ in range(4):
                model(IDS[:, :1], past_key_values=cache)
            if world.rank == 1:
                model.members["target_pt"].fault = fault
            error = None
            try:
                model(IDS[:, :1], past_key_values=cache)
            except RunError as caught:
                error = str(caught)
            lengths = set(cache.lengths().values())
            again = model(IDS[:, :1], past_key_values=cache).logits
        return error, lengths, again

    with torch.no_grad():
        expected = whole(IDS[:, :1]).logits
    reason = {"boom": "failed: RuntimeError: boom", "big": "ran out of memory"}.get(str(fault), "computed NaN")
    for rank, (error, lengths, again) in enumerate(run_ranks(3, task)):
        assert f"target_pt {reason}" in error
        assert ("rank 1 (target_pt): " in error) == (rank != 1)
        assert lengths == {4}
        assert_close(again, expected, atol=1e-5, rtol=0)


def test_a_member_that_fails_while_texts_are_decoded_stops_all_ranks() -> None:
    """The same in the decode loop: it ends everywhere with one error, and texts can be decoded again."""
    members = fakes()
    whole = EnsembleForCausalLM.from_members(members=members)
    expected = whole.generate(IDS, **OPTIONS).tolist()

    def task(world: World) -> Any:
        model = spread(world, members, whole)
        if world.rank == 1:
            target = model.members["target_pt"]
            run = target.forward

            @functools.wraps(run)
            def failing(*inputs: Any, **more: Any) -> Any:
                target.fault = RuntimeError("boom") if target.num_forwards == 4 else None
                return run(*inputs, **more)

            target.num_forwards, target.forward = 0, failing
        error = None
        try:
            model.generate(IDS, **OPTIONS)
        except RunError as caught:
            error = str(caught)
        return error, model.generate(IDS, **OPTIONS).tolist()

    for rank, (error, again) in enumerate(run_ranks(3, task)):
        assert "target_pt failed: RuntimeError: boom" in error
        assert ("rank 1 (target_pt): " in error) == (rank != 1)
        assert again == expected


def test_a_member_that_cannot_be_loaded_stops_all_ranks(
    save_member: SaveMember, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = {"reference": str(save_member("a")), "aligned": str(save_member("b"))}
    config = EnsembleConfig(rule="realign", members=members)
    checked = check_ensemble(config)

    def short(group: Any, **options: Any) -> Any:
        if group[0].role == "aligned":
            raise RunError("aligned ran out of memory")
        return load_group(group, **options)

    monkeypatch.setattr("ensembler.engine.members.load_group", short)
    first, second = run_ranks(2, lambda world: EnsembleForCausalLM.from_checked(checked, world=world))
    assert first == "rank 1 (aligned): RunError: aligned ran out of memory"
    assert second == "aligned ran out of memory"


def test_a_file_that_one_machine_lacks_is_said_on_all_ranks() -> None:
    def look(world: World) -> int:
        if world.rank == 1:
            raise MemberError("target_pt: there is no folder /models/target")
        return 5

    first, second = run_ranks(2, lambda world: world.together(lambda: look(world)))
    assert first == "rank 1: MemberError: target_pt: there is no folder /models/target"
    assert second == "target_pt: there is no folder /models/target"
    assert run_ranks(2, lambda world: world.together(lambda: world.rank)) == [0, 1]


def test_ranks_that_read_other_tokens_are_told(trio: dict[str, PreTrainedModel]) -> None:
    whole = EnsembleForCausalLM.from_members(members=trio)

    def task(world: World) -> Any:
        return spread(world, trio, whole)(IDS + world.rank)

    for message in run_ranks(2, task):
        assert message.startswith("rank 1 (target_pt) decodes other tokens than rank 0 (source_ft and source_pt)")


def test_a_silent_rank_is_named_within_the_timeout(trio: dict[str, PreTrainedModel]) -> None:
    whole = EnsembleForCausalLM.from_members(members=trio)

    def task(world: World) -> Any:
        model = spread(world, trio, whole)
        model(IDS)
        if world.rank == 2:
            time.sleep(600)
        return model(IDS)

    def caught(world: World) -> Any:
        try:
            return task(world)
        except RankError as error:
            return str(error), error.reporter

    for message, reporter in run_ranks(3, caught, timeout=2.0, wait=(0, 1)):
        assert message.startswith("lost rank 2 (source_pt) at step 2: no answer in 2 seconds")
        assert reporter == 0


def test_what_the_first_rank_does_for_all() -> None:
    def refuse() -> None:
        raise MissingExtraError("scipy", "pip install -e '.[eval]'")

    def task(world: World) -> Any:
        numbers = [world.first(lambda: world.rank * 10 + 3), world.first(lambda: [1, "a"])]
        try:
            world.first(refuse)
        except MissingExtraError as error:
            numbers.append(str(error))
        return [*numbers, torch.initial_seed(), torch.rand(2).tolist()]

    first, second = run_ranks(2, task)
    assert first[:2] == [3, [1, "a"]]
    assert first[2] == "scipy is not installed; install it with: pip install -e '.[eval]'"
    assert first == second
