"""Faults that nobody would notice: lost updates, caches with two owners, weights that move, failed calls."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.graph_cases import greedy, make_trio, with_graphs
from helpers.tiny import make_model, make_tokenizer, random_ids, tables
from torch import Tensor, nn
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.logits_process import LogitsProcessor

from ensembler import EnsembleForCausalLM
from ensembler.decoding.decoder import Decoder
from ensembler.decoding.decoding_options import DecodingOptions
from ensembler.decoding.prompts import EncodedPrompt
from ensembler.decoding.texts import complete_prompts
from ensembler.engine.backbone import LayerAdapters, Routing
from ensembler.engine.distributed import World
from ensembler.engine.row_cache import ModelRowCache
from ensembler.errors import RunError

OPTIONS: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}


class Transposing(nn.Module):
    """A linear layer whose output is not contiguous."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight @ x.transpose(-1, -2)).transpose(-1, -2)


@torch.no_grad()
def test_an_update_is_added_to_an_output_of_any_layout() -> None:
    torch.manual_seed(0)
    routing, layer = Routing(), Transposing(8)
    down, up = torch.randn(2, 8), torch.randn(8, 2)
    LayerAdapters.of(layer, routing).add("tuned", down, up, 0.5)
    x = torch.randn(4, 3, 8)
    assert not layer(x).is_contiguous()
    with routing.through(("tuned", "plain"), 4):
        found = layer(x)
    expected = layer(x)
    expected[:2] += 0.5 * x[:2] @ down.T @ up.T
    torch.testing.assert_close(found, expected)
    assert (found[:2] - layer(x)[:2]).abs().max() > 0.1


def decoded(model: EnsembleForCausalLM) -> Iterator[tuple[int, list[int]]]:
    prompts = [EncodedPrompt(i, random_ids(1, 3 + 2 * i, seed=i)[0].tolist()) for i in range(3)]
    options = DecodingOptions(max_new_tokens=8, draft="none")
    for one in complete_prompts(model, make_tokenizer(), prompts, options, batch_size=1):
        yield one.number, one.samples[0].ids


@pytest.mark.parametrize("way", ["graphs", "compiled"])
def test_a_call_in_the_middle_of_another_gets_a_cache_of_its_own(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    model = make_trio()
    expected, other = dict(decoded(model)), greedy(model, 6, rows=2)
    if way == "graphs":
        with_graphs(model.member_set, monkeypatch)
    else:
        model.compile_members("eager")
    found = {}
    for number, ids in decoded(model):
        found[number] = ids
        assert greedy(model, 6, rows=2) == other
    assert found == expected


def test_a_copied_cache_is_no_longer_that_of_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way in which transformers' documentation reuses a prefix."""
    model, ids = make_trio(), random_ids(1, 6)
    with_graphs(model.member_set, monkeypatch)
    first = model.generate(ids, **OPTIONS, return_dict_in_generate=True)
    for seed in (1, 2, 3):
        longer = torch.cat([first.sequences, random_ids(1, 3, seed=seed)], dim=1)
        found = model.generate(longer, **OPTIONS, past_key_values=copy.deepcopy(first.past_key_values))
        assert found.tolist() == model.generate(longer, **OPTIONS, use_cache=False).tolist()
    assert first.past_key_values.lengths[0] == first.sequences.shape[1] - 1


def test_returning_a_cache_captures_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_trio()
    graphs = with_graphs(model.member_set, monkeypatch).graphs
    assert graphs is not None
    counts = []
    for _ in range(3):
        model.generate(random_ids(1, 6), **OPTIONS, return_dict_in_generate=True)
        counts.append(graphs.num_recorded)
    assert counts[0] == counts[1] == counts[2] > 0


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("boom")])
def test_a_call_that_fails_leaves_a_cache_that_was_given_as_it_was(error: BaseException) -> None:
    members = dict(zip(("source_ft", "source_pt", "target_pt"), tables(3), strict=True))
    model, ids = EnsembleForCausalLM.from_members(members=members), random_ids(1, 6)
    first = model.generate(ids, **OPTIONS, return_dict_in_generate=True)
    cache = first.past_key_values
    before = list(cache.lengths)
    longer = torch.cat([first.sequences, random_ids(1, 12, seed=4)], dim=1)
    seen = {**OPTIONS, "attention_mask": torch.ones_like(longer)}  # the text may hold the padding token

    def fail(module: Any, *_: Any) -> None:
        if module.num_forwards == start + 4:
            raise error

    start = members["target_pt"].num_forwards
    hook = members["target_pt"].register_forward_pre_hook(fail)
    with pytest.raises(RunError if isinstance(error, ValueError) else KeyboardInterrupt):
        model.generate(longer, **seen, past_key_values=cache)
    assert cache.lengths == before
    other = torch.cat([ids, random_ids(1, 12, seed=4)], dim=1)
    start = members["target_pt"].num_forwards
    with pytest.raises(RunError if isinstance(error, ValueError) else KeyboardInterrupt):
        model.generate(other, **OPTIONS, past_key_values=cache)
    hook.remove()
    assert cache.lengths == [6]  # of another text the cache keeps what it shares
    expected = model.generate(longer, **seen)
    assert model.generate(longer, **seen, past_key_values=cache).tolist() == expected.tolist()


def test_a_cache_that_finds_no_room_to_grow_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_trio()
    cache = model.generate(random_ids(2, 6), **OPTIONS, return_dict_in_generate=True).past_key_values
    state = cache.num_rows, cache.room, cache.version, list(cache.lengths)
    with monkeypatch.context() as patch:
        patch.setattr(ModelRowCache, "_allocate", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none left")))
        with pytest.raises(torch.OutOfMemoryError):
            cache.reserve(16, 500)
    assert (cache.num_rows, cache.room, cache.version, list(cache.lengths)) == state
    cache.reserve(16, 500)
    assert cache.num_rows == 16
    assert cache.room >= 500


@pytest.mark.parametrize("way", ["graphs", "compiled"])
def test_weights_that_move_are_found_where_they_are(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    model = make_trio()
    if way == "graphs":
        with_graphs(model.member_set, monkeypatch)
    else:
        model.compile_members("eager")
    greedy(model, 6)
    model.to(torch.bfloat16)
    assert greedy(model, 6) == greedy(make_trio().to(torch.bfloat16), 6)


class Budgets(StoppingCriteria):
    """Ends each row of the whole batch at a length of its own."""

    def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Tensor:
        return input_ids.shape[1] >= torch.tensor([7, 10, 12])[: input_ids.shape[0]]


class Counting(LogitsProcessor):
    """Forbids another token in each call."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.num_calls += 1
        return scores.index_fill(1, torch.tensor([self.num_calls % 60]), -torch.inf)


def test_processors_and_criteria_of_the_callers_own_see_the_whole_batch(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = make_trio(), random_ids(3, 5)
    for make in (
        lambda: {"stopping_criteria": StoppingCriteriaList([Budgets()])},
        lambda: {"logits_processor": LogitsProcessorList([Counting()])},
    ):
        caplog.clear()
        with caplog.at_level("INFO", logger="ensembler.decoding.decoder"):
            found = model.generate(ids, **OPTIONS, **make())
        assert found.tolist() == model.generate(ids, **OPTIONS, use_cache=False, **make()).tolist()
        assert "may look at the whole batch" in caplog.text


def test_nan_behind_a_rejected_draft_is_nobodys_fault() -> None:
    """The anchor computes NaN after a token that only the draft would ever choose."""
    first, second, third = tables(3)
    model = EnsembleForCausalLM.from_members(
        alpha=1.0, members={"source_ft": first, "source_pt": second, "target_pt": third}
    )
    ids = random_ids(1, 4)
    expected = model.generate(ids, **OPTIONS)
    drafts = [int(second.table[token].argmax()) for token in expected[0, 3:].tolist()]
    wrong = next(token for token in drafts if token not in expected[0].tolist())
    with torch.no_grad():
        first.table[wrong] = float("nan")
    decoder = Decoder("source_pt", num_positions=3, is_fixed=True)
    assert model.generate(ids, **OPTIONS, custom_generate=decoder).tolist() == expected.tolist()
    assert decoder.stats.num_rounds > 0


def test_ranks_are_divided_by_bytes() -> None:
    def owners(sizes: list[int], size: int) -> list[list[int]]:
        found = []
        for rank in range(size):
            world = object.__new__(World)
            world.rank, world.size, world.owners = rank, size, []
            found.append(world.divide([[f"m{index}"] for index in range(len(sizes))], sizes))
        return found

    assert owners([14, 2, 26, 2], 2) == [[2], [0, 1, 3]]
    assert owners([1, 1, 26], 2) == [[2], [0, 1]]
    assert owners([0, 0, 0], 3) == [[0], [1], [2]]
    first, second = owners([5, 4, 3, 3, 3], 2)
    assert sorted([*first, *second]) == [0, 1, 2, 3, 4]


def test_only_the_layers_of_an_adapter_are_changed(tmp_path: Any) -> None:
    from helpers.adapter_cases import make_pair, save_adapter, save_base

    base = save_base(tmp_path / "base")
    pair = make_pair(base, save_adapter(base, tmp_path / "adapter"), make_model("gpt2", 3))
    changed = {
        name.rpartition(".")[2]
        for name, module in pair.shared.members["source_pt"].named_modules()
        if isinstance(getattr(module, "adapters", None), LayerAdapters)
    }
    assert changed == {"q_proj", "v_proj", "down_proj"}
