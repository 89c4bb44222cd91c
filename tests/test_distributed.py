"""Several processes on loopback: they decode what one process decodes, and stop together when one of them fails."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SaveMember
from peft import LoraConfig, get_peft_model
from tiny import TableModel, make_model, random_ids
from torch.testing import assert_close
from transformers import PreTrainedModel

from ensembler import EnsembleForCausalLM, MemberConfig
from ensembler.config import EnsembleConfig
from ensembler.distributed import World
from ensembler.errors import EnsemblerError, MemberError, MissingExtraError, RankError, RunError
from ensembler.members import load_group
from ensembler.preflight import check_ensemble
from ensembler.runners import Step

ROLES = ("source_ft", "target_pt", "source_pt")
OPTIONS = {"max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 3}
Task = Callable[[World], Any]


def run_ranks(size: int, task: Task, *, timeout: float = 60.0, wait: tuple[int, ...] | None = None) -> list[Any]:
    """Call `task` in `size` forked processes and return what each returned, or the text of the error that it raised.

    `wait`: the ranks that will answer (default: all).
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")  # the models of a test, and torch, are there at once
    pipes = [fork.Pipe(duplex=False) for _ in range(size)]
    processes = [
        fork.Process(target=_one_rank, args=(rank, size, port, task, timeout, pipes[rank][1])) for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        answers = range(size) if wait is None else wait
        return [pipes[rank][0].recv() if pipes[rank][0].poll(90) else None for rank in answers]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _one_rank(rank: int, size: int, port: int, task: Task, timeout: float, result: Any) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        world = World(timeout)
        result.send(task(world))
        time.sleep(1)  # rank 0 holds the store in which the others call the roll
    except EnsemblerError as error:
        result.send(error.args[0])
        time.sleep(1)
    except BaseException:
        result.send(traceback.format_exc())
    os._exit(0)


def spread(
    world: World, members: dict[str, PreTrainedModel], whole: EnsembleForCausalLM, **changes: Any
) -> EnsembleForCausalLM:
    """The ensemble `whole` over the ranks of `world`: its members are given out as they are loaded otherwise."""
    groups = [[role] for role in whole.rule.roles]
    mine = [role for index in world.divide(groups) for role in groups[index]]
    model = EnsembleForCausalLM(
        whole.config, {role: members[role] for role in mine}, whole.contract, world=world, **changes
    )
    model.generation_config = whole.generation_config
    return model


def digests(model: EnsembleForCausalLM) -> list[int]:
    """A list that grows by one checksum of the combined logits with each forward of `model`."""
    seen: list[int] = []
    forward = model.forward

    @functools.wraps(forward)  # generate looks at its arguments
    def noting(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        seen.append(zlib.crc32(output.logits.numpy().tobytes()))
        return output

    model.forward = noting
    return seen


IDS = random_ids(3, 6)
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
DECODING: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_p": 0.9, "seed": 11},
    "sequences": {"do_sample": True, "num_return_sequences": 2, "seed": 4},
    "beams": {"num_beams": 3, "do_sample": False},
    "padding": {"attention_mask": MASK},
    "static": {"cache_implementation": "static", "max_new_tokens": 5},
    "uncached": {"use_cache": False},
}


def decode_all(model: EnsembleForCausalLM) -> dict[str, list[list[int]]]:
    texts = {}
    for name, options in DECODING.items():
        seed = options.get("seed")
        if seed is not None:
            torch.manual_seed(seed)
        more = {key: value for key, value in options.items() if key != "seed"}
        texts[name] = model.generate(IDS, **{**OPTIONS, **more}).tolist()
    return texts


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("rule", ["base-change", "eft"])
def test_ranks_decode_what_one_process_decodes(trio: dict[str, PreTrainedModel], size: int, rule: str) -> None:
    """Tokens of every way to decode; logits to 1e-5; and the same bits on every rank at every step."""
    whole = EnsembleForCausalLM.from_members(rule=rule, alpha=0.7, members=trio)
    expected = decode_all(whole)
    with torch.no_grad():
        logits = whole(IDS, attention_mask=MASK).logits

    def task(world: World) -> Any:
        model = spread(world, trio, whole)
        seen = digests(model)
        texts = decode_all(model)
        with torch.no_grad():
            own = model(IDS, attention_mask=MASK).logits
        return texts, own, seen, sorted(model.members)

    results = run_ranks(size, task)
    for texts, own, seen, _ in results:
        assert texts == expected
        assert_close(own, logits, atol=1e-5, rtol=0)
        assert len(seen) > 40
        assert seen == results[0][2]
    assert sorted(role for _, _, _, roles in results for role in roles) == sorted(ROLES)


def test_what_a_sum_cannot_say_is_gathered(trio: dict[str, PreTrainedModel]) -> None:
    """A cut-off, ratios over the shared ids, −inf in a member, α per row: bit for bit as one process."""
    wide = {**trio, "target_pt": make_model("llama", 8, vocab_size=72)}
    tables = torch.randn(4, 64, 64)
    tables[1:][torch.rand(3, 64, 64) < 0.2] = -torch.inf
    forbidding = {role: TableModel(table) for role, table in zip(ROLES, tables[1:], strict=True)}
    cases = {
        "cutoff": ({"rule": "contrastive", "alpha": 0.5}, {"expert": trio["source_ft"], "amateur": trio["source_pt"]}),
        "neutral": ({"rule": "eft", "alpha": 1.3, "outside": "neutral"}, wide),
        "masked": ({"rule": "eft", "alpha": 1.3}, wide),
        "forbidding": ({"rule": "base-change", "alpha": 0.8}, forbidding),
        "rows": ({"rule": "base-change", "alpha": 0.8}, trio),
        "anchor": ({"rule": "base-change", "alpha": 0.0}, trio),
    }
    wholes = {name: EnsembleForCausalLM.from_members(members=members, **how) for name, (how, members) in cases.items()}
    per_row = torch.tensor([0.0, 0.4, 1.7])
    wholes["rows"].alpha = per_row
    with torch.no_grad():
        expected = {name: whole(IDS).logits for name, whole in wholes.items()}

    def task(world: World) -> Any:
        found = {}
        for name, whole in wholes.items():
            model = spread(world, cases[name][1], whole)
            if name == "rows":
                model.alpha = per_row
            with torch.no_grad():
                found[name] = model(IDS).logits
        with torch.no_grad():
            return found, spread(world, trio, wholes["anchor"]).member_logits(Step(IDS))

    with torch.no_grad():
        alone = wholes["anchor"].member_logits(Step(IDS))
    for found, members in run_ranks(2, task):
        for name, logits in found.items():
            tolerance = 1e-5 if name in ("rows", "masked") else 0
            assert_close(logits, expected[name], atol=tolerance, rtol=0)
        assert list(members) == list(ROLES)
        assert all(torch.equal(members[role], alone[role]) for role in ROLES)


def test_a_shared_backbone_is_one_group(save_member: SaveMember, tmp_path: Path) -> None:
    base, target = save_member("base"), save_member("target", "qwen2", 5)
    patched = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    patched.save_pretrained(tmp_path / "adapter")
    members = {
        "source_pt": MemberConfig(str(base)),
        "source_ft": MemberConfig(str(base), adapter=str(tmp_path / "adapter")),
        "target_pt": MemberConfig(str(target)),
    }
    config = EnsembleConfig(rule="base-change", alpha=0.6, members=members)
    expected = decode_all(EnsembleForCausalLM.from_config(config))

    def task(world: World) -> Any:
        model = EnsembleForCausalLM.from_config(config, world=world)
        return decode_all(model), sorted(model.members), model.shortest_context

    for rank, (texts, roles, shortest) in enumerate(run_ranks(2, task)):
        assert texts == expected
        assert roles == [["source_ft", "source_pt"], ["target_pt"]][rank]
        assert shortest is not None
    with_three = run_ranks(3, task)
    assert all("start 2 with --nproc-per-node" in message for message in with_three)


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

    monkeypatch.setattr("ensembler.modeling.load_group", short)
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
        raise MissingExtraError("jinja2", "eval")

    def task(world: World) -> Any:
        numbers = [world.first(lambda: world.rank * 10 + 3), world.first(lambda: [1, "a"])]
        try:
            world.first(refuse)
        except MissingExtraError as error:
            numbers.append(str(error))
        return [*numbers, torch.initial_seed(), torch.rand(2).tolist()]

    first, second = run_ranks(2, task)
    assert first[:2] == [3, [1, "a"]]
    assert "pip install 'logit-ensembler[eval]'" in first[2]
    assert first == second


# -- started by torchrun --------------------------------------------------------------------------------------------


def torchrun(size: int, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), "-m", "ensembler"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *map(str, arguments)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def write_prompts(path: Path, number: int) -> Path:
    question = "Tom has {} pens. Gwen takes 3 pens. Question: How many pens does Tom have now? Answer:"
    path.write_text("".join(json.dumps({"prompt": question.format(i)}) + "\n" for i in range(20, 20 + number)))
    return path


def without_seconds(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_the_command_under_torchrun(tmp_path: Path) -> None:
    """One set of rows and one line of statistics, whatever the number of processes: none of which drafts."""
    from ensembler.cli.main import main

    prompts = write_prompts(tmp_path / "prompts.jsonl", 6)
    options = ["generate", "demo", "--prompts", prompts, "--batch-size", 4, "--temperature", 0.8, "--seed", 5]
    options += ["--draft", "none"]  # several processes draw as plain decoding does
    run = torchrun(3, *options, "--output", tmp_path / "three.jsonl")
    errors = run.communicate(timeout=120)[1]
    assert run.returncode == 0, errors
    assert errors.count("texts: 6") == 1
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in [*options, "--output", tmp_path / "one.jsonl"]])
    assert ended.value.code == 0
    assert without_seconds(tmp_path / "three.jsonl") == without_seconds(tmp_path / "one.jsonl")


def ranks_of(launcher: int) -> dict[int, int]:
    """Process ids by rank."""
    children = subprocess.run(["ps", "--ppid", str(launcher), "-o", "pid="], capture_output=True, text=True).stdout
    found = {}
    for child in map(int, children.split()):
        rank = re.search(r"\0RANK=(\d+)", Path(f"/proc/{child}/environ").read_text())
        if rank:
            found[int(rank[1])] = child
    return found


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_ends_the_run_with_one_error(tmp_path: Path, victim: int) -> None:
    prompts, output = write_prompts(tmp_path / "prompts.jsonl", 4000), tmp_path / "out.jsonl"
    run = torchrun(3, "generate", "demo", "--prompts", prompts, "--batch-size", 2, "--output", output)
    end = time.monotonic() + 100
    while not (output.exists() and output.stat().st_size > 1000) and run.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    ranks = ranks_of(run.pid)
    os.kill(ranks[victim], signal.SIGKILL)
    errors = run.communicate(timeout=100)[1]
    assert run.returncode == 1
    said = [line for line in errors.splitlines() if line.startswith("Error: ")]
    assert len(said) == 1, errors
    role = {0: "source_ft", 2: "source_pt"}[victim]
    assert said[0].startswith(f"Error: lost rank {victim} ({role}) at step ")
    assert not any(Path(f"/proc/{process}").exists() for process in ranks.values())
    assert len(without_seconds(output)) > 0
