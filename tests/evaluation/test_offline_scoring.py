"""Scores with one member in memory at a time are those of all members together."""

from __future__ import annotations

import gc
import math
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.scoring_cases import (
    ALPHAS,
    CASES,
    REQUESTS,
    Case,
    alone,
    offline,
    together,
)
from helpers.tiny import make_model, tables
from torch import nn

from ensembler import EnsembleForCausalLM
from ensembler.engine.grid import make_grid
from ensembler.engine.model_runner import ModelRunner
from ensembler.errors import ConfigError, LogitsError, OutputError, RunError
from ensembler.evaluation import offline as offline_module
from ensembler.evaluation.offline import LogitsFolder, OfflineScorer
from ensembler.evaluation.request_batches import make_batches
from ensembler.evaluation.requests import ScoringRequest
from ensembler.evaluation.scoring import run_settings
from ensembler.files import digest
from ensembler.preflight import check_ensemble


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.mark.parametrize("name", ["base-change", "lora"])
def test_one_group_of_members_is_in_memory_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    weights: list[list[weakref.ref[nn.Parameter]]] = []
    load = offline_module.load_members

    def watched(files: Any) -> Any:
        assert not [ref for refs in weights for ref in refs if ref() is not None], "members of before are alive"
        models, backbones = load(files)
        weights.append([weakref.ref(p) for model in models.values() for p in model.parameters()])
        return models, backbones

    monkeypatch.setattr(offline_module, "load_members", watched)
    gc.disable()  # freeing must not wait for a collection by chance
    try:
        offline(check_ensemble(CASES[name].config(tmp_path)), LogitsFolder(tmp_path / "out.members", {"seed": 1}), 4)
    finally:
        gc.enable()
    assert len(weights) == (2 if name == "lora" else 3)
    assert not [ref for refs in weights for ref in refs if ref() is not None]


def test_the_folder_holds_as_many_bytes_as_was_said(case: Case, tmp_path: Path) -> None:
    checked = check_ensemble(case.config(tmp_path))
    folder = LogitsFolder(tmp_path / "out.members", {"seed": 1})
    scorer, batches = OfflineScorer(checked, folder), make_batches(REQUESTS, 3)
    expected = scorer.check_space(batches)
    next(scorer.score(batches, make_grid([checked.config.get_rule().name], ALPHAS)))
    assert scorer.check_space(batches) == expected
    stored = [folder.read(path.name) for path in folder.path.glob("*.safetensors")]
    assert expected == sum(t.numel() * t.element_size() for tensors in stored for t in tensors.values())
    roles = {role: tensor.dtype for tensors in stored for role, tensor in tensors.items()}
    members = EnsembleForCausalLM.from_checked(checked).members
    assert roles == {role: member.dtype for role, member in members.items()}


class Interruption:
    """Counts the forwards by role, and raises in the one that is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts = Counter[str]()
        self.at: tuple[str, int] | None = None
        self.error: BaseException = KeyboardInterrupt()
        run = ModelRunner.run

        def counted(runner: ModelRunner, *inputs: Any) -> Any:
            name = "+".join(runner.roles)
            self.counts[name] += 1
            if (name, self.counts[name]) == self.at:
                raise self.error
            return run(runner, *inputs)

        monkeypatch.setattr(ModelRunner, "run", counted)


@pytest.fixture
def interruption(monkeypatch: pytest.MonkeyPatch) -> Interruption:
    return Interruption(monkeypatch)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a fault"), RunError("out of memory")])
def test_what_an_interruption_left_is_not_computed_again(
    tmp_path: Path, interruption: Interruption, error: BaseException
) -> None:
    config = CASES["base-change"].config(tmp_path)
    whole = offline(check_ensemble(config.replaced()), LogitsFolder(tmp_path / "whole.members", {"seed": 1}), 3)
    num_passes = interruption.counts["source_pt"]
    assert interruption.counts == dict.fromkeys(("source_ft", "source_pt", "target_pt"), num_passes)
    assert num_passes > 4

    path = tmp_path / "out.members"
    interruption.counts.clear()
    interruption.at, interruption.error = (list(config.members)[1], 4), error
    with pytest.raises(type(error)):
        offline(check_ensemble(config.replaced()), LogitsFolder(path, {"seed": 1}), 3)
    first, second, third = config.members
    assert interruption.counts == {first: num_passes, second: 4}
    interruption.counts.clear()
    interruption.at = None
    resumed = offline(check_ensemble(config.replaced()), LogitsFolder(path, {"seed": 1}), 3)
    assert resumed == whole
    assert interruption.counts == {second: num_passes - 3, third: num_passes}
    assert not path.exists()


def test_an_interruption_while_combining_needs_no_forward_again(tmp_path: Path, interruption: Interruption) -> None:
    checked = check_ensemble(CASES["base-change"].config(tmp_path))
    batches = make_batches(REQUESTS, 3)
    grid = make_grid([checked.config.get_rule().name], ALPHAS)
    path = tmp_path / "out.members"
    begun = OfflineScorer(checked, LogitsFolder(path, {"seed": 1})).score(batches, grid)
    first = next(begun)
    begun.close()
    interruption.counts.clear()
    counted: list[int] = []
    scorer = OfflineScorer(checked, LogitsFolder(path, {"seed": 1}))
    rest = scorer.score(batches[1:], grid, counted.append)
    numbers = [one.request.number for batch in rest for one in batch]
    assert sum(counted) == scorer.num_rounds * len(numbers)
    assert sorted([*numbers, *(one.request.number for one in first)]) == list(range(len(REQUESTS)))
    assert not interruption.counts
    assert not path.exists()


@pytest.mark.parametrize(
    "files",
    [
        {"precious": "mine"},
        {"run.json": '{"seed": 1}', "precious": "mine"},
        {"run.json": '{"seed": 1}'},
        {"run.json": "a log"},
        {"run.json": '{"format": "ensembler-logits", "seed": 1}', "precious": "mine"},
        {"x.safetensors": "mine"},
    ],
    ids=["no mark", "of another program", "of another program alone", "no JSON", "ours and another file", "weights"],
)
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, files: dict[str, str]) -> None:
    path = tmp_path / "out.members"
    path.mkdir()
    for name, content in files.items():
        (path / name).write_text(content)
    for options in ({}, {"overwrite": True}):
        with pytest.raises(OutputError, match="holds something else"):
            LogitsFolder(path, {"seed": 1}, **options)
    assert {file.name: file.read_text() for file in path.iterdir()} == files


def test_a_folder_of_another_run_is_refused_or_replaced(tmp_path: Path) -> None:
    path = tmp_path / "out.members"
    folder = LogitsFolder(path, {"seed": 1})
    folder.open()
    folder.write("x.safetensors", {"role": torch.ones(2)})
    assert LogitsFolder(path, {"seed": 1}).has("x.safetensors")
    with pytest.raises(OutputError, match="begun with other settings: seed was 1, now 2; choose another --output"):
        LogitsFolder(path, {"seed": 2})
    again = LogitsFolder(path, {"seed": 2}, overwrite=True)
    assert not again.has("x.safetensors")
    assert folder.has("x.safetensors")  # nothing is removed before the run begins
    again.open()
    assert [entry.name for entry in path.iterdir()] == ["run.json"]


def test_removing_leaves_what_was_put_into_the_folder_meanwhile(tmp_path: Path) -> None:
    folder = LogitsFolder(tmp_path / "out.members", {"seed": 1})
    folder.open()
    folder.write("x.safetensors", {"role": torch.ones(2)})
    (folder.path / "precious").write_text("mine")
    folder.remove()
    assert [entry.name for entry in folder.path.iterdir()] == ["precious"]


def test_members_that_are_loaded_already_are_refused(trio: Any, tmp_path: Path) -> None:
    config = CASES["base-change"].config(tmp_path)
    checked = check_ensemble(config, {"source_pt": trio["source_pt"]})
    with pytest.raises(ConfigError, match="source_pt is loaded already"):
        OfflineScorer(checked, LogitsFolder(tmp_path / "out.members", {"seed": 1}))


@pytest.mark.parametrize("way", ["together", "offline"])
def test_nan_names_the_member(tmp_path: Path, way: str) -> None:
    config = CASES["base-change"].config(tmp_path)
    model = make_model("mistral", 2)
    with torch.no_grad():
        model.get_output_embeddings().weight[9] = float("nan")
    model.save_pretrained(tmp_path / "source_pt")
    checked = check_ensemble(config)
    folder = LogitsFolder(tmp_path / "out.members", {"seed": 1})
    run = {
        "offline": lambda: offline(checked, folder, 3),
        "together": lambda: together(EnsembleForCausalLM.from_checked(checked), 3),
    }[way]
    with pytest.raises(LogitsError, match="source_pt computed NaN"):
        run()


def test_a_row_without_any_possible_token_names_its_lines() -> None:
    anchor, other = tables(2)
    with torch.no_grad():
        anchor.table[5] = -math.inf
    model = EnsembleForCausalLM.from_members(
        rule="contrastive", alpha=0.5, members={"expert": anchor, "amateur": other}
    )
    request = ScoringRequest(0, (5,), ((7,),), "data.jsonl:1")
    with pytest.raises(RunError, match=r"in the batch of data\.jsonl:1: target 0 has no log-prob at point 0"):
        alone(model, request, [0.5])


def test_a_run_is_told_apart_by_all_that_its_scores_depend_on(tmp_path: Path) -> None:
    config = check_ensemble(CASES["base-change"].config(tmp_path)).config
    grid = make_grid(["base-change"], ALPHAS)
    runs = [
        run_settings(config, REQUESTS, grid, {"batch_size": 2}),
        run_settings(config, REQUESTS[:-1], grid, {"batch_size": 2}),
        run_settings(config, REQUESTS, grid[:-1], {"batch_size": 2}),
        run_settings(config, REQUESTS, make_grid(["eft"], ALPHAS), {"batch_size": 2}),
        run_settings(config, REQUESTS, grid, {"batch_size": 3}),
        run_settings(config, REQUESTS, grid, {"batch_size": 2, "per_token": True}),
        run_settings(config.replaced(rule="eft"), REQUESTS, grid, {"batch_size": 2}),
    ]
    assert run_settings(config, REQUESTS, grid, {"batch_size": 2}) == runs[0]
    assert len(set(map(digest, runs))) == len(runs)
