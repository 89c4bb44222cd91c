"""Graphs without a GPU: a recorder that replays by calling the function again, and looks that nothing has moved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers.tiny import make_model, random_ids
from torch import Tensor

from ensembler import EnsembleForCausalLM
from ensembler.engine import cuda_graphs, model_runner
from ensembler.engine.cuda_graphs import Function, Outputs, StepGraphs
from ensembler.engine.member_set import MemberSet
from ensembler.engine.row_cache import ModelRowCache

ROLES = ("source_ft", "source_pt", "target_pt")


def make_trio() -> EnsembleForCausalLM:
    """With a window, and a member that is light enough to draft."""
    members = {
        "source_ft": make_model("llama", 1),
        "source_pt": make_model("mistral", 2, hidden_size=8, num_layers=1),
        "target_pt": make_model("gpt2", 3, hidden_size=32, num_layers=3),
    }
    model = EnsembleForCausalLM.from_members(alpha=0.7, members=members)
    model.generation_config.eos_token_id = [5, 9, 23]  # texts end at different steps
    return model


def greedy(model: EnsembleForCausalLM, length: int, rows: int = 1, **more: Any) -> list[list[int]]:
    options = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 3, "do_sample": False, **more}
    found: list[list[int]] = model.generate(random_ids(rows, length, seed=length), **options).tolist()
    return found


class FakeRecorder:
    """Records as a graph does, on buffers, caches and outputs that stay where they are; a replay fails where not.

    `error` is raised instead of a capture; `touched` are the addresses of keys and values that forwards have written.
    """

    def __init__(self) -> None:
        self.num_replayed = 0
        self.error: RuntimeError | None = None
        self.touched: list[tuple[int, int]] = []

    def record(
        self, function: Function, buffers: Sequence[Tensor], device: torch.device
    ) -> tuple[Callable[[], None], Outputs]:
        if self.error is not None:
            raise self.error
        function(*buffers)  # to warm up: caches are allocated in it
        outputs, caches = self._run(function, buffers)
        places = [values.data_ptr() for values in (*buffers, *outputs.values())]

        def replay() -> None:
            self.num_replayed += 1
            found, touched = self._run(function, buffers)
            assert touched == caches, "a cache has moved since the capture"
            for role, values in found.items():
                assert outputs[role].shape == values.shape
                outputs[role].copy_(values)
            assert [values.data_ptr() for values in (*buffers, *outputs.values())] == places

        return replay, outputs

    def _run(self, function: Function, buffers: Sequence[Tensor]) -> tuple[Outputs, list[tuple[int, int]]]:
        self.touched = []
        outputs = function(*buffers)
        with torch.inference_mode(mode=False):  # what a graph fills knows no modes
            return {role: values.clone() for role, values in outputs.items()}, self.touched


def with_graphs(members: MemberSet, monkeypatch: pytest.MonkeyPatch, most: int = 48) -> MemberSet:
    """The same members with graphs on the CPU, recorded by a FakeRecorder."""
    for module in (cuda_graphs, model_runner):
        monkeypatch.setattr(module, "why_not_captured", lambda model: None)
    recorder = FakeRecorder()
    members.graphs = StepGraphs(lambda: recorder, most)
    update = ModelRowCache.update

    def noting(self: ModelRowCache, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **more: Any) -> Any:
        found = update(self, keys, values, layer_idx, *args, **more)
        layer = self.layers[layer_idx]
        recorder.touched.append((layer.keys.data_ptr(), layer.values.data_ptr()))
        return found

    monkeypatch.setattr(ModelRowCache, "update", noting)
    return members


def recorder_of(members: MemberSet) -> FakeRecorder:
    """What records for them."""
    assert members.graphs is not None
    recorder = members.graphs._recorder
    assert isinstance(recorder, FakeRecorder)
    return recorder
