"""The threads runner gives what the serial one gives; members that fail surface once, with their role."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import last_logits, roles_of_forwards, save_adapter, save_base
from tiny import TableModel, make_model, random_ids, tables
from transformers import AutoModelForCausalLM, PreTrainedModel

from ensembler import EnsembleForCausalLM, MemberConfig
from ensembler.errors import LogitsError, RunError
from ensembler.runners import SerialRunner, ThreadsRunner, choose_runner

IDS = random_ids(2, 6)
PADDED = torch.cat([torch.tensor([[3, 3], [17, 30]]), IDS], 1)
ROLES = ("source_ft", "source_pt", "target_pt")
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


def two_groups(tmp_path: Path) -> EnsembleForCausalLM:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    members = {"source_ft": MemberConfig(str(base), adapter=str(adapter)), "source_pt": str(base)}
    return EnsembleForCausalLM.from_members(alpha=0.7, members={**members, "target_pt": make_model("mistral", 3)})


def three_groups(_: Path) -> EnsembleForCausalLM:
    members = {role: make_model(family, seed) for seed, (role, family) in enumerate(zip(ROLES, FAMILIES, strict=True))}
    return EnsembleForCausalLM.from_members(alpha=0.7, members=members)


FAMILIES = ("llama", "gpt2", "gemma2")
GROUPS: dict[str, Callable[[Path], EnsembleForCausalLM]] = {"two": two_groups, "three": three_groups}


def tokens(model: EnsembleForCausalLM, **options: Any) -> list[list[int]]:
    torch.manual_seed(4)
    options = {"attention_mask": (PADDED != 3).long(), "max_new_tokens": 8, "eos_token_id": None, **options}
    result: list[list[int]] = model.generate(PADDED, pad_token_id=3, **options).tolist()
    return result


def fakes(runner: Any = None) -> tuple[EnsembleForCausalLM, dict[str, TableModel]]:
    members = dict(zip(ROLES, tables(3), strict=True))
    model = EnsembleForCausalLM.from_members(rule="eft", alpha=0.5, members=members)
    model.runner = runner or ThreadsRunner()
    return model, members


@pytest.mark.parametrize("groups", GROUPS)
def test_threads_equal_serial(tmp_path: Path, groups: str) -> None:
    model = GROUPS[groups](tmp_path)
    assert isinstance(model.runner, SerialRunner)  # one device
    expected = {mode: tokens(model, **options) for mode, options in MODES.items()}
    logits = last_logits(model, PADDED)
    threads = threading.enumerate()
    model.runner = ThreadsRunner()
    assert len(roles_of_forwards(model)) == {"two": 2, "three": 3}[groups]
    assert {mode: tokens(model, **options) for mode, options in MODES.items()} == expected
    assert torch.equal(last_logits(model, PADDED), logits)
    assert threading.enumerate() == threads


def test_every_group_has_a_thread_of_its_own_at_the_same_time() -> None:
    """All wait for all: one after another, none would ever go on."""
    model, members = fakes()
    barrier, seen = threading.Barrier(3, timeout=60), set()

    def meet(*_: Any) -> None:
        barrier.wait()
        seen.add(threading.current_thread())

    handles = [member.register_forward_pre_hook(meet) for member in members.values()]
    last_logits(model, IDS)
    for handle in handles:
        handle.remove()
    assert len(seen) == 3
    assert threading.main_thread() not in seen


def test_compiled_views_of_a_backbone_are_in_one_thread(tmp_path: Path) -> None:
    """What routes the rows of a backbone is one thing for all its views."""
    model = two_groups(tmp_path)
    expected = last_logits(model, IDS)
    model.members["source_ft"] = torch.compile(model.members["source_ft"], backend="eager")
    model.runner = ThreadsRunner()
    seen: dict[str, set[int]] = {"backbone": set(), "target": set()}
    for name, role in (("backbone", "source_pt"), ("target", "target_pt")):
        embeddings = model.members[role].get_input_embeddings()
        embeddings.register_forward_pre_hook(lambda *_, name=name: seen[name].add(threading.get_ident()))
    torch.testing.assert_close(last_logits(model, IDS), expected, atol=1e-5, rtol=1e-5)
    assert len(roles_of_forwards(model)) == 2
    assert len(seen["backbone"]) == 1


@pytest.mark.parametrize("runner", [SerialRunner, ThreadsRunner])
@pytest.mark.parametrize("role", ROLES)
def test_a_member_that_fails_at_step_5_surfaces_once(role: str, runner: type) -> None:
    model, members = fakes(runner())
    expected = model.generate(IDS, max_new_tokens=9, eos_token_id=None, pad_token_id=3).tolist()
    cache = model.new_cache()
    threads = threading.enumerate()
    boom = ValueError("boom\nand more")

    def fail(module: TableModel, *_: Any) -> None:
        if module.num_forwards == start + 4:
            raise boom

    start = members[role].num_forwards
    handle = members[role].register_forward_pre_hook(fail)
    with pytest.raises(RunError) as caught:
        model.generate(IDS, past_key_values=cache, max_new_tokens=9, eos_token_id=None, pad_token_id=3)
    handle.remove()
    assert str(caught.value) == f"{role} failed: ValueError: boom"
    assert caught.value.__cause__ is boom
    assert threading.enumerate() == threads
    assert cache.lengths() == {(name,): 6 + 3 for name in model.rule.roles}
    longer = torch.tensor(expected)[:, :10]  # go on where it stopped
    again = model.generate(longer, past_key_values=cache, max_new_tokens=5, eos_token_id=None, pad_token_id=3)
    assert again.tolist() == expected


def test_all_members_fail_and_one_error_is_raised() -> None:
    model, members = fakes()
    for role, member in members.items():
        member.fault = RuntimeError(role)
    with pytest.raises(RunError, match=r"^target_pt failed: RuntimeError: target_pt$"):
        last_logits(model, IDS)
    assert all(member.fault is None for member in members.values())  # all have run, none is left behind
    assert last_logits(model, IDS).isfinite().all()


def test_nan_in_a_thread_names_the_member() -> None:
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
    threads = threading.enumerate()
    cache = model.new_cache()
    last_logits(model, IDS, past_key_values=cache, use_cache=True)
    members[role].fault = fault
    with pytest.raises(type(fault)):
        last_logits(model, IDS[:, :1], past_key_values=cache, use_cache=True)
    assert set(cache.lengths().values()) == {6}
    assert threading.enumerate() == threads


@pytest.mark.parametrize("mode", ["no_grad", "inference", "grad", "autocast"])
def test_what_is_a_threads_own_is_handed_on(tmp_path: Path, mode: str) -> None:
    model = two_groups(tmp_path)
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
    logits = []
    for runner in (SerialRunner(), ThreadsRunner()):
        model.runner = runner
        with contexts[mode]():
            look()
            logits.append(model(IDS).logits)
    assert len(seen) == 6
    assert len(set(seen)) == 1
    assert torch.equal(*logits)
    assert logits[1].requires_grad == (mode in ("grad", "autocast"))
    assert logits[1].is_inference() == (mode == "inference")


def test_gradients_flow_through_threads(tmp_path: Path) -> None:
    model = two_groups(tmp_path)
    grads = []
    for runner in (SerialRunner(), ThreadsRunner()):
        model.runner = runner
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        grads.append(model.members["target_pt"].get_input_embeddings().weight.grad.clone())
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(*grads)


def test_one_model_in_two_roles_in_two_threads() -> None:
    shared = make_model("llama", 5)
    members = {"source_ft": make_model("qwen2", 1), "source_pt": shared, "target_pt": shared}
    model = EnsembleForCausalLM.from_members(rule="eft", alpha=0.5, members=members)
    expected = {mode: tokens(model, **options) for mode, options in MODES.items()}
    model.runner = ThreadsRunner()
    assert {mode: tokens(model, **options) for mode, options in MODES.items()} == expected


def test_the_runner_is_chosen_by_devices(trio: dict[str, PreTrainedModel]) -> None:
    on_meta = {**trio, "target_pt": make_model("gpt2", 3).to("meta")}
    assert isinstance(EnsembleForCausalLM.from_members(members=trio).runner, SerialRunner)
    model = EnsembleForCausalLM.from_members(members=on_meta)
    assert isinstance(model.runner, ThreadsRunner)
    assert isinstance(choose_runner(model.groups), ThreadsRunner)
    assert {str(forward.device) for group in model.groups for forward in group} == {"cpu", "meta"}


# -- out of memory ----------------------------------------------------------------------------------------------------

NO_MEMORY: dict[str, BaseException] = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has ..."),
    "host": MemoryError(),
    "torch on the host": RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
}


@pytest.mark.parametrize("kind", NO_MEMORY)
@pytest.mark.parametrize("runner", [SerialRunner, ThreadsRunner])
def test_out_of_memory_in_a_step(kind: str, runner: type) -> None:
    model, members = fakes(runner())
    members["source_pt"].fault = NO_MEMORY[kind]
    with pytest.raises(RunError, match=r"^source_pt ran out of memory on cpu for 2 rows; .*ensembler plan") as caught:
        last_logits(model, IDS)
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
