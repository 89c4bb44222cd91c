"""The caches of all members as one: what transformers does to it, and steps that fail half-way."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from helpers.tiny import TableModel, make_model, random_ids, tables
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedModel,
    QuantizedCache,
    StaticCache,
)

from ensembler import EnsembleCache, EnsembleForCausalLM
from ensembler.errors import EnsemblerError, InputError, LogitsError, RunError

IDS = random_ids(2, 4, seed=5)
MORE = random_ids(2, 1, seed=6)
ROLES = ("source_ft", "source_pt", "target_pt")


def lengths(cache: EnsembleCache) -> list[int]:
    """The lengths of all layers, member after member."""
    return [int(layer.get_seq_length()) for layer in cache.layers]


@torch.no_grad()
def step(model: EnsembleForCausalLM, ids: Tensor, cache: EnsembleCache | None = None) -> tuple[Tensor, EnsembleCache]:
    output = model(ids, past_key_values=cache, use_cache=True)
    return output.logits[:, -1], output.past_key_values


def test_layers_are_those_of_all_members(base_change: EnsembleForCausalLM) -> None:
    _, cache = step(base_change, IDS)
    assert list(cache.caches) == [(role,) for role in base_change.members]
    assert len(cache.layers) == 2 + 1 + 3
    assert lengths(cache) == [4] * 6
    assert cache.get_seq_length() == 4
    assert not cache.is_compileable
    assert cache.is_sliding.count(True) == 1


CHANGES: dict[str, tuple[Any, Any]] = {  # what is done to the cache, and the same to the tokens
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), lambda ids: ids[[1, 1]]),
    "crop": (lambda cache: cache.crop(-2), lambda ids: ids[:, :-2]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(3), lambda ids: ids.repeat_interleave(3, 0)),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), lambda ids: ids[[1]]),
    "reset": (lambda cache: cache.reset(), lambda ids: ids[:, :0]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_act_on_every_member(base_change: EnsembleForCausalLM, change: str) -> None:
    on_cache, on_ids = CHANGES[change]
    _, cache = step(base_change, IDS)
    on_cache(cache)
    past = on_ids(IDS)
    token = random_ids(past.shape[0], 1, seed=8)
    logits, cache = step(base_change, token, cache)
    expected, _ = step(base_change, torch.cat([past, token], 1))
    assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert set(lengths(cache)) == {past.shape[1] + 1}


def test_a_copy_is_independent(base_change: EnsembleForCausalLM) -> None:
    """Prompt caching: prefill once, deepcopy for each continuation."""
    _, cache = step(base_change, IDS)
    for seed in (1, 2):
        token = random_ids(2, 1, seed=seed)
        logits, _ = step(base_change, token, copy.deepcopy(cache))
        expected, _ = step(base_change, torch.cat([IDS, token], 1))
        assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert set(lengths(cache)) == {4}


def test_a_sliding_window_beside_full_attention(base_change: EnsembleForCausalLM) -> None:
    """Far beyond the window of 6: token by token, in chunks, and all at once."""
    ids = random_ids(1, 20, seed=3)
    with torch.no_grad():
        expected = base_change(ids).logits
        for sizes in ([1] * 20, [4] * 5, [7, 1, 1, 7, 4], [19, 1]):
            cache, parts = None, []
            for chunk in ids.split(sizes, dim=1):
                output = base_change(chunk, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                parts.append(output.logits)
            assert_close(torch.cat(parts, 1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("made_by", ["dynamic", "hand", "hand without configs"])
def test_a_given_cache_is_continued_over_two_calls(base_change: EnsembleForCausalLM, made_by: str) -> None:
    if made_by == "dynamic":
        cache = base_change.new_cache()
    elif made_by == "hand":
        cache = EnsembleCache({(role,): DynamicCache(config=m.config) for role, m in base_change.members.items()})
    else:
        cache = EnsembleCache({(role,): DynamicCache() for role in base_change.members})
    options = {"eos_token_id": None, "pad_token_id": 3}
    first = base_change.generate(IDS[:1], past_key_values=cache, max_new_tokens=4, **options)
    longer = torch.cat([first, random_ids(1, 3, seed=9)], 1)
    second = base_change.generate(longer, past_key_values=cache, max_new_tokens=5, **options)
    assert second.tolist() == base_change.generate(longer, max_new_tokens=5, use_cache=False, **options).tolist()
    assert set(lengths(cache)) == {second.shape[1] - 1}


def test_a_cache_without_configs_is_reordered(base_change: EnsembleForCausalLM) -> None:
    """DynamicCache() makes its layers at the first update; beams must reach them."""
    options = {"num_beams": 3, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 3}
    cache = EnsembleCache({(role,): DynamicCache() for role in base_change.members})
    expected = base_change.generate(IDS[:1], use_cache=False, **options).tolist()
    assert base_change.generate(IDS[:1], past_key_values=cache, **options).tolist() == expected


@pytest.mark.parametrize("roles", [[("source_ft",)], [("a",), ("b",)], [("source_ft", "source_pt"), ("target_pt",)]])
def test_a_cache_of_other_roles_is_refused(base_change: EnsembleForCausalLM, roles: list[tuple[str, ...]]) -> None:
    with pytest.raises(EnsemblerError, match=r"the cache is for .*make one with new_cache"):
        step(base_change, IDS, EnsembleCache({part: DynamicCache() for part in roles}))


def test_a_plain_cache_is_refused_by_generate(base_change: EnsembleForCausalLM) -> None:
    with pytest.raises(InputError, match="is a DynamicCache; an ensemble takes what its generate"):
        base_change.generate(IDS, past_key_values=DynamicCache(), max_new_tokens=2)


def fakes() -> tuple[EnsembleForCausalLM, dict[str, TableModel]]:
    members = dict(zip(ROLES, tables(3), strict=True))
    return EnsembleForCausalLM.from_members(rule="eft", alpha=0.5, members=members), members


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("fault", [RuntimeError("boom"), KeyboardInterrupt(), torch.OutOfMemoryError("big"), math.nan])
def test_a_member_that_fails_leaves_all_caches_where_they_were(role: str, fault: BaseException | float) -> None:
    model, members = fakes()
    _, cache = step(model, IDS)
    expected, _ = step(model, torch.cat([IDS, MORE], 1))
    members[role].fault = fault
    kind = LogitsError if isinstance(fault, float) else RunError if isinstance(fault, Exception) else type(fault)
    with pytest.raises(kind, match=role if kind in (LogitsError, RunError) else None):
        step(model, MORE, cache)
    assert lengths(cache) == [4, 4, 4]
    logits, cache = step(model, MORE, cache)
    assert_close(logits, expected)
    assert lengths(cache) == [5, 5, 5]


def test_a_member_that_fails_between_its_layers(fresh: EnsembleForCausalLM) -> None:
    """Layer 0 of the last member has the token, its layers 1 and 2 have not: a retry is right all the same."""
    _, cache = step(fresh, IDS)
    block = fresh.members["target_pt"].transformer.h[1]
    handle = block.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("boom")))
    try:
        with pytest.raises(RunError, match="failed: RuntimeError: boom"):
            step(fresh, MORE, cache)
    finally:
        handle.remove()
    assert set(lengths(cache)) == {4}
    logits, _ = step(fresh, MORE, cache)
    expected, _ = step(fresh, torch.cat([IDS, MORE], 1))
    assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_the_first_step_can_fail_too() -> None:
    model, members = fakes()
    cache = model.new_cache()
    members["source_ft"].fault = RuntimeError("boom")
    with pytest.raises(RunError, match="failed: RuntimeError: boom"):
        step(model, IDS, cache)
    assert lengths(cache) == [0, 0, 0]
    logits, _ = step(model, IDS, cache)
    assert_close(logits, step(model, IDS)[0])


def recurrent() -> PreTrainedModel:
    """A recurrent state and a growing key-value cache in one layer: the state cannot go back."""
    settings = {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}
    settings.update(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = AutoConfig.for_model("falcon_h1", vocab_size=64, num_key_value_heads=2, initializer_range=0.5, **settings)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", ["recurrent", "fp8", "static"])
def test_a_failed_step_is_undone_or_the_cache_is_refused(kind: str) -> None:
    """Layers of another kind than the growing one: never a wrong result, never lengths that are not true."""
    members: dict[str, PreTrainedModel] = {"reference": make_model("llama", 1), "aligned": tables(1)[0]}
    if kind == "recurrent":
        members["reference"] = recurrent()
    model = EnsembleForCausalLM.from_members(rule="realign", alpha=0.5, members=members)
    config = members["reference"].config
    kinds: dict[str, Any] = {
        "recurrent": lambda: DynamicCache(config=config),
        "fp8": lambda: QuantizedCache("fp8", config),
        "static": lambda: StaticCache(config, max_cache_len=16),
    }
    made = [
        EnsembleCache({("reference",): kinds[kind](), ("aligned",): DynamicCache(config=members["aligned"].config)})
        for _ in "ab"
    ]
    for cache in made:
        step(model, IDS, cache)
    expected, _ = step(model, MORE, made[0])
    members["aligned"].fault = RuntimeError("boom")
    with pytest.raises(RunError, match="failed: RuntimeError: boom"):
        step(model, MORE, made[1])
    try:
        logits, _ = step(model, MORE, made[1])
    except RunError:
        return
    assert_close(logits, expected)


@pytest.mark.parametrize("length", [4, 5, 6, 9])
def test_a_sliding_window_that_cannot_go_back_is_refused(length: int) -> None:
    """The window holds 6. A step that leaves it whole can be undone; one beyond it marks the cache as broken."""
    members: dict[str, PreTrainedModel] = {"reference": make_model("mistral", 1), "aligned": tables(1)[0]}
    model = EnsembleForCausalLM.from_members(rule="realign", alpha=0.5, members=members)
    past = random_ids(2, length, seed=7)
    _, cache = step(model, past)
    members["aligned"].fault = RuntimeError("boom")
    with pytest.raises(RunError, match="failed: RuntimeError: boom"):
        step(model, MORE, cache)
    if length + 1 < 6:
        logits, _ = step(model, MORE, cache)
        assert_close(logits, step(model, torch.cat([past, MORE], 1))[0], atol=1e-4, rtol=1e-4)
        return
    for _ in range(2):
        with pytest.raises(RunError, match="uneven by a failed step"):
            step(model, MORE, cache)


def test_a_reset_mends_a_broken_cache() -> None:
    """After reset() nothing is left of the failed step."""
    members: dict[str, PreTrainedModel] = {"reference": make_model("mistral", 1), "aligned": tables(1)[0]}
    model = EnsembleForCausalLM.from_members(rule="realign", alpha=0.5, members=members)
    _, cache = step(model, random_ids(2, 9))
    members["aligned"].fault = RuntimeError("boom")
    with pytest.raises(RunError, match="failed: RuntimeError: boom"):
        step(model, MORE, cache)
    cache.reset()
    assert_close(step(model, IDS, cache)[0], step(model, IDS)[0])
