"""Members run one by one, each by itself; those that fail surface once, with their role, and leave the rest usable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapter_cases import last_logits, save_adapter, save_base
from helpers.tiny import TableModel, WeightedSum, make_model, random_ids, tables
from transformers import AutoModelForCausalLM

from ensembler import EnsembleForCausalLM, MemberConfig
from ensembler.engine.ensemble_cache import EnsembleCache
from ensembler.engine.model_runner import Step
from ensembler.engine.row_cache import RowCache
from ensembler.errors import LogitsError, RunError

IDS = random_ids(2, 6)
PADDED = torch.cat([torch.tensor([[3, 3], [17, 30]]), IDS], 1)
ROLES = ("source_ft", "source_pt", "target_pt")
OPTIONS: dict[str, Any] = {"max_new_tokens": 9, "eos_token_id": None, "pad_token_id": 3}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


def fakes() -> tuple[EnsembleForCausalLM, dict[str, TableModel]]:
    members = dict(zip(ROLES, tables(3), strict=True))
    return EnsembleForCausalLM.from_members(rule="eft", alpha=0.5, members=members), members


def on_a_backbone(tmp_path: Path) -> EnsembleForCausalLM:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    members = {"source_ft": MemberConfig(str(base), adapter=str(adapter)), "source_pt": str(base)}
    return EnsembleForCausalLM.from_members(alpha=0.7, members={**members, "target_pt": make_model("mistral", 3)})


def tokens(model: EnsembleForCausalLM, **options: Any) -> list[list[int]]:
    torch.manual_seed(4)
    options = {"attention_mask": (PADDED != 3).long(), **OPTIONS, **options}
    result: list[list[int]] = model.generate(PADDED, **options).tolist()
    return result


def row_step(num: int, start: int = 0) -> Step:
    """The tokens of both rows from a position on."""
    return Step(IDS[:, start : start + num], position_ids=torch.arange(start, start + num).expand(2, num))


def make_cache(model: EnsembleForCausalLM, kind: str) -> EnsembleCache | RowCache:
    return model.new_cache() if kind == "growing" else model.member_set.row_cache(2, 20)


def test_every_member_gives_its_own_logits() -> None:
    """In the order of the forwards, each at its own width, on either cache and without one."""
    members = {role: make_model("llama", seed, vocab_size=60 + 2 * seed) for seed, role in enumerate(ROLES)}
    model = EnsembleForCausalLM.from_members(members=members)
    expected = {role: last_logits(members[role], IDS) for role in ROLES}
    for cache in (None, make_cache(model, "growing"), make_cache(model, "rows")):
        with torch.no_grad():
            found = model.member_set.logits(row_step(6), cache)
        assert list(found) == list(model.members)
        for role, logits in found.items():
            torch.testing.assert_close(logits, expected[role], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["growing", "rows"])
def test_some_of_the_forwards(kind: str) -> None:
    model, members = fakes()
    some = [runner for runner in model.member_set.runners if runner.roles != ("source_pt",)]
    found = model.member_set.logits(row_step(6), make_cache(model, kind), some)
    assert set(found) == {"source_ft", "target_pt"}
    assert [members[role].num_forwards for role in ROLES] == [1, 0, 1]


# -- members that fail ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_a_member_that_fails_at_step_5_surfaces_once(role: str) -> None:
    """And the cache that was given is as it was."""
    model, members = fakes()
    expected = model.generate(IDS, **OPTIONS).tolist()
    begun = model.generate(IDS, **{**OPTIONS, "max_new_tokens": 1}, return_dict_in_generate=True)
    cache, boom = begun.past_key_values, ValueError("boom\nand more")
    start = members[role].num_forwards

    def fail(module: TableModel, *_: Any) -> None:
        if module.num_forwards == start + 4:
            raise boom

    handle = members[role].register_forward_pre_hook(fail)
    with pytest.raises(RunError) as caught:
        model.generate(begun.sequences, attention_mask=torch.ones(2, 7), past_key_values=cache, **OPTIONS)
    handle.remove()
    assert str(caught.value) == f"{role} failed: ValueError: boom"
    assert caught.value.__cause__ is boom
    assert members[role].num_forwards == start + 4
    assert cache.lengths[:2] == [6] * 2
    more = {"past_key_values": cache, "attention_mask": torch.ones(2, 7), "max_new_tokens": 8}
    again = model.generate(begun.sequences, **{**OPTIONS, **more})
    assert again.tolist() == expected


@pytest.mark.parametrize("kind", ["growing", "rows"])
@pytest.mark.parametrize("role", ROLES)
def test_a_failed_step_leaves_a_cache_as_it_was(role: str, kind: str) -> None:
    members = {one: make_model("llama", seed) for seed, one in enumerate(ROLES)}
    model = EnsembleForCausalLM.from_members(members=members)
    cache = make_cache(model, kind)

    def fail(*_: Any) -> None:
        raise ValueError("boom")

    with torch.no_grad():
        model.member_set.logits(row_step(3), cache)
        handle = members[role].model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(RunError, match=rf"^{role} failed: ValueError: boom$"):
            model.member_set.logits(row_step(2, 3), cache)
        handle.remove()
        found = model.member_set.logits(row_step(3, 3), cache)
    for name, logits in found.items():
        torch.testing.assert_close(logits, last_logits(members[name], IDS)[:, 3:], rtol=1e-5, atol=1e-5)


def test_all_members_fail_and_one_error_is_raised() -> None:
    model, members = fakes()
    for role, member in members.items():
        member.fault = RuntimeError(role)
    with pytest.raises(RunError, match=r"^target_pt failed: RuntimeError: target_pt$"):
        last_logits(model, IDS)
    assert [member.num_forwards for member in members.values()] == [0, 0, 1]  # the anchor is the first
    for member in members.values():
        member.fault = None
    assert last_logits(model, IDS).isfinite().all()


def test_nan_names_the_member() -> None:
    model, members = fakes()
    cache = model.new_cache()
    members["source_pt"].fault = float("nan")
    with pytest.raises(LogitsError, match=r"^source_pt computed NaN"):
        last_logits(model, IDS, past_key_values=cache, use_cache=True)
    assert set(cache.lengths().values()) == {0}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("fault", [KeyboardInterrupt(), SystemExit(3)], ids=["interrupt", "exit"])
def test_an_interrupt_in_a_member_ends_the_step(role: str, fault: BaseException) -> None:
    model, members = fakes()
    cache = model.new_cache()
    last_logits(model, IDS, past_key_values=cache, use_cache=True)
    members[role].fault = fault
    with pytest.raises(type(fault)):
        last_logits(model, IDS[:, :1], past_key_values=cache, use_cache=True)
    assert set(cache.lengths().values()) == {6}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("fault", [KeyboardInterrupt(), SystemExit(3)], ids=["interrupt", "exit"])
def test_an_interrupt_while_decoding_ends_the_text(role: str, fault: BaseException) -> None:
    model, members = fakes()
    expected = model.generate(IDS, **OPTIONS).tolist()

    def stop(module: TableModel, *_: Any) -> None:
        module.fault = fault if module.num_forwards == start + 3 else None

    start = members[role].num_forwards
    handle = members[role].register_forward_pre_hook(stop)
    with pytest.raises(type(fault)):
        model.generate(IDS, **OPTIONS)
    assert members[role].num_forwards == start + 4
    handle.remove()
    assert model.generate(IDS, **OPTIONS).tolist() == expected


# -- what is handed on ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["no_grad", "inference", "grad", "autocast"])
def test_members_run_in_the_mode_of_their_caller(tmp_path: Path, mode: str) -> None:
    model = on_a_backbone(tmp_path)
    contexts = {
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
        "grad": torch.enable_grad,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }
    seen: list[tuple[bool, bool, bool]] = []

    def look(*_: Any) -> None:
        seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")))

    for role in ("source_pt", "target_pt"):
        model.members[role].get_input_embeddings().register_forward_pre_hook(look)
    with contexts[mode]():
        look()
        logits = model(IDS).logits
    assert len(seen) == 3
    assert len(set(seen)) == 1
    assert logits.requires_grad == (mode in ("grad", "autocast"))
    assert logits.is_inference() == (mode == "inference")


def test_gradients_reach_every_member() -> None:
    """They are those of the weighted sum of logits."""
    members = {role: make_model("llama", seed) for seed, role in enumerate(ROLES)}
    model = EnsembleForCausalLM.from_members(alpha=0.7, members=members)
    model(IDS, labels=IDS).loss.backward()
    found = {role: member.get_input_embeddings().weight.grad.clone() for role, member in members.items()}
    model.zero_grad()
    logits = sum(
        weight * members[role](IDS, use_cache=False).logits
        for role, weight in zip(ROLES, (1.0, -0.7, 0.7), strict=True)
    )
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    for role, member in members.items():
        assert found[role].abs().max() > 0
        torch.testing.assert_close(found[role], member.get_input_embeddings().weight.grad, rtol=1e-4, atol=1e-5)


def test_gradients_flow_through_a_backbone(tmp_path: Path) -> None:
    model = on_a_backbone(tmp_path)
    model(IDS, labels=IDS).loss.backward()
    for role in ("source_pt", "target_pt"):
        assert model.members[role].get_input_embeddings().weight.grad.abs().max() > 0


@pytest.mark.parametrize("mode", MODES)
def test_one_model_in_two_roles(mode: str) -> None:
    """It runs once for each, on caches of their own: as with two copies of it."""
    both, copies = (
        EnsembleForCausalLM.from_members(
            rule="eft", alpha=0.5, members={"source_ft": make_model("qwen2", 1), "source_pt": one, "target_pt": other}
        )
        for one, other in ([make_model("llama", 5)] * 2, [make_model("llama", 5), make_model("llama", 5)])
    )
    assert both.members["source_pt"] is both.members["target_pt"]
    assert tokens(both, **MODES[mode]) == tokens(copies, **MODES[mode])
    assert len(both.member_set.row_cache(1, 9).caches) == 3


@pytest.mark.parametrize("mode", ["greedy", "beams", "no cache"])
def test_all_ways_to_keep_what_was_read_give_one_text(mode: str) -> None:
    members = {role: make_model(family, 1) for role, family in zip(ROLES, ("llama", "gpt2", "gemma2"), strict=True)}
    model = EnsembleForCausalLM.from_members(rule="eft", alpha=0.5, members=members)
    weights = [0.5 if role == "source_ft" else -0.5 if role == "source_pt" else 1.0 for role in ROLES]
    expected = WeightedSum([members[role] for role in ROLES], weights)
    options = {**OPTIONS, **MODES[mode], "attention_mask": (PADDED != 3).long(), "do_sample": False}
    found = model.generate(PADDED, **options).tolist()
    assert found == expected.generate(PADDED, **{**options, "use_cache": False}).tolist()


# -- out of memory ----------------------------------------------------------------------------------------------------

NO_MEMORY: dict[str, BaseException] = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has ..."),
    "host": MemoryError(),
    "torch on the host": RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
}


@pytest.mark.parametrize("kind", NO_MEMORY)
@pytest.mark.parametrize("decoding", [True, False], ids=["decoding", "forward"])
def test_out_of_memory_in_a_step(kind: str, decoding: bool) -> None:
    model, members = fakes()
    members["source_pt"].fault = NO_MEMORY[kind]
    with pytest.raises(RunError, match=r"^source_pt ran out of memory on cpu for 2 rows; .*ensembler plan") as caught:
        model.generate(IDS, **OPTIONS) if decoding else last_logits(model, IDS)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1
    assert last_logits(model, IDS).isfinite().all()


@pytest.mark.parametrize("kind", NO_MEMORY)
@pytest.mark.parametrize("failing", ["base", "target"])
def test_out_of_memory_while_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, failing: str) -> None:
    base, target = save_base(tmp_path / "base"), save_base(tmp_path / "target")
    adapter = save_adapter(base, tmp_path / "adapter")
    load = AutoModelForCausalLM.from_pretrained

    def fail(name: str, **options: Any) -> Any:
        if name == str(tmp_path / failing):
            raise NO_MEMORY[kind]
        return load(name, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    members = {
        "source_ft": MemberConfig(str(base), adapter=str(adapter)),
        "source_pt": str(base),
        "target_pt": str(target),
    }
    roles = {"base": "source_ft and source_pt", "target": "target_pt"}[failing]
    with pytest.raises(RunError, match=f"^{roles} ran out of memory while .*/{failing} was loaded on cpu") as caught:
        EnsembleForCausalLM.from_members(members=members)
    assert str(caught.value).endswith("ensembler plan")
    assert "\n" not in str(caught.value)
