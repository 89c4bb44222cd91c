"""Graphs that are kept for steps: which go, what a capture that fails comes to, and who is captured."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.graph_cases import ROLES, FakeRecorder, greedy, make_trio, recorder_of, with_graphs
from helpers.tiny import make_model, random_ids
from torch import Tensor
from transformers import PreTrainedModel

from ensembler import EnsembleForCausalLM
from ensembler.engine.cuda_graphs import StepGraphs, why_not_captured
from ensembler.engine.model_runner import Step
from ensembler.errors import LogitsError, RunError

CPU = torch.device("cpu")


def doubled(values: Tensor) -> dict[str, Tensor]:
    return {"out": 2 * values}


def test_the_graph_used_longest_ago_goes() -> None:
    graphs = StepGraphs(FakeRecorder, most=2)
    counts = []
    for number, key in enumerate("abacabcc"):
        found = graphs.run(key, doubled, [torch.full((2, 3), number)], CPU)["out"]
        assert found.tolist() == [[2 * number] * 3] * 2
        counts.append(graphs.num_recorded)
    assert counts == [1, 2, 2, 3, 3, 4, 5, 5]


def test_a_replay_reads_what_it_is_given_and_keeps_none_of_it() -> None:
    graphs = StepGraphs(FakeRecorder)
    given = torch.tensor([1.0, 2.0])
    first = graphs.run("key", doubled, [given], CPU)["out"]
    given.fill_(7)
    assert first.tolist() == [2, 4]
    second = graphs.run("key", doubled, [torch.tensor([3.0, 4.0])], CPU)["out"]
    assert second.data_ptr() == first.data_ptr()  # the next run overwrites it
    assert second.tolist() == [6, 8]
    graphs.clear()
    assert graphs.run("key", doubled, [given], CPU)["out"].tolist() == [14, 14]
    assert graphs.num_recorded == 2


class Keys:
    """Stands for StepGraphs, keeps nothing alive, and notes the keys."""

    reason = None

    def __init__(self) -> None:
        self.keys: list[Hashable] = []

    def run(self, key: Hashable, function: Any, inputs: Sequence[Tensor], device: torch.device) -> dict[str, Tensor]:
        self.keys.append(key)
        found: dict[str, Tensor] = function(*inputs)
        return found

    def clear(self) -> None: ...


def test_a_new_cache_never_has_the_graphs_of_one_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python gives the address of an object that is gone to the next one."""
    model = make_trio()
    members = with_graphs(model.member_set, monkeypatch)
    members.graphs = keys = Keys()  # type: ignore[assignment]
    for _ in range(20):
        cache = members.row_cache(2, 100)
        members.logits(Step(random_ids(2, 1), position_ids=torch.zeros(2, 1, dtype=torch.int64)), cache)
        del cache
    assert len(set(keys.keys)) == 20


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_capture_that_fails_is_said_once(
    monkeypatch: pytest.MonkeyPatch, said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = make_trio()
    expected = greedy(model, 9), greedy(model, 5, 3)
    members = with_graphs(model.member_set, monkeypatch)
    recorder_of(members).error = RuntimeError("not permitted when a stream is capturing\nmore of it")
    with caplog.at_level(logging.WARNING, "ensembler"):
        assert (greedy(model, 9), greedy(model, 5, 3)) == expected
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    (line,) = said
    assert "not permitted when a stream is capturing" in line
    assert "\n" not in line
    reasons = members.why_eager()
    assert set(reasons) == set(ROLES)
    assert all("could not be captured (not permitted" in reason for reason in reasons.values())
    assert members.graphs.num_recorded == 0
    assert not members.is_static


@pytest.mark.parametrize("error", [RuntimeError("not while capturing"), NotImplementedError("no such graph")], ids=str)
def test_a_member_that_fails_only_while_it_is_captured(
    monkeypatch: pytest.MonkeyPatch, said: list[str], error: Exception
) -> None:
    """As one that asks for a value of a tensor: the line names it, and the text is there all the same."""
    model = make_trio()
    expected = greedy(model, 9)
    members = with_graphs(model.member_set, monkeypatch)
    recorder = recorder_of(members)
    is_capturing = False
    record = recorder.record

    def capturing(*args: Any) -> Any:
        nonlocal is_capturing
        is_capturing = True
        try:
            return record(*args)
        finally:
            is_capturing = False

    def fail(*_: Any) -> None:
        if is_capturing:
            raise error

    monkeypatch.setattr(recorder, "record", capturing)
    model.members["source_pt"].register_forward_pre_hook(fail)
    assert greedy(model, 9) == expected
    (line,) = said
    assert "source_pt failed" in line
    assert set(members.why_eager()) == set(ROLES)


def test_a_member_that_always_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_trio()
    members = with_graphs(model.member_set, monkeypatch)
    greedy(model, 9)

    def fail(*_: Any) -> None:
        raise ValueError("boom")

    hook = model.members["source_pt"].register_forward_pre_hook(fail)
    with pytest.raises(RunError, match=r"^source_pt failed: ValueError: boom"):
        members.logits(
            Step(random_ids(4, 1), position_ids=torch.ones(4, 1, dtype=torch.int64)), members.row_cache(4, 9)
        )
    hook.remove()


def test_nan_in_a_graph_names_its_member_and_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_trio()
    with_graphs(model.member_set, monkeypatch)
    expected = greedy(model, 9)
    weight = model.members["target_pt"].get_input_embeddings().weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
    with pytest.raises(LogitsError, match=r"^target_pt computed NaN"):
        greedy(model, 9)
    with torch.no_grad():
        weight.copy_(before)
    assert greedy(model, 9) == expected


# -- who is captured --------------------------------------------------------------------------------------------------


class SomeExperts:
    """Named as those of transformers are."""


def on_a_gpu(**more: Any) -> Any:
    """What is looked at of a model on a GPU."""
    config = SimpleNamespace(**more.pop("config", {}))
    config.get_text_config = lambda decoder: config
    modules = more.pop("modules", [])
    return SimpleNamespace(device=torch.device("cuda"), config=config, modules=lambda: modules, **more)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (on_a_gpu(), None),
        (on_a_gpu(hf_device_map={"": 0}), None),
        (on_a_gpu(hf_device_map={"model": 0, "lm_head": 1}), "spread over devices"),
        (on_a_gpu(modules=[SimpleNamespace(_hf_hook=None)]), "accelerate has put hooks"),
        (on_a_gpu(config={"_experts_implementation": "eager"}), None),  # transformers says so of dense models, too
        (on_a_gpu(modules=[SomeExperts()], config={"_experts_implementation": "eager"}), "'grouped_mm'"),
        (on_a_gpu(modules=[SomeExperts()], config={"_experts_implementation": "grouped_mm"}), None),
    ],
)
def test_who_is_captured(model: Any, reason: str | None) -> None:
    found = why_not_captured(model)
    assert found is None if reason is None else reason in str(found)


@pytest.mark.parametrize(
    ("family", "reason"), [("llama", None), ("gpt2", None), ("gemma2", None), ("mixtral", "its experts run in a loop")]
)
def test_real_models_on_a_gpu_that_is_none(monkeypatch: pytest.MonkeyPatch, family: str, reason: str | None) -> None:
    model = make_model(family, 1)
    model.config._experts_implementation = "eager"  # where there are none, too: transformers sets it for all
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    found = why_not_captured(model)
    assert found is None if reason is None else reason in str(found)


def test_members_on_a_cpu_are_launched(trio: dict[str, PreTrainedModel]) -> None:
    assert {why_not_captured(member) for member in trio.values()} == {"it is on cpu"}
    model = EnsembleForCausalLM.from_members(members=trio)
    assert not model.member_set.is_static
    model.member_set.graphs = StepGraphs(FakeRecorder)
    assert not model.member_set.is_static
    assert model.member_set.why_eager() == dict.fromkeys(ROLES, "it is on cpu")
