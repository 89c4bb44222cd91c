"""The search for a placement: within budgets, quantised only where nothing else fits, as transformers would do it."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from itertools import product
from math import floor
from pathlib import Path

import pytest
import torch
from helpers.commands import SaveMember
from helpers.published import published
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations import accelerate
from transformers.quantizers import AutoHfQuantizer

from ensembler import EnsembleConfig, EnsembleForCausalLM, MemberConfig
from ensembler.errors import ConfigError, PlacementError
from ensembler.planning.member_sizes import measure, measure_model
from ensembler.planning.placement import HEADROOM, METHODS, Proposal, plan, propose
from ensembler.planning.sizes import Block, BlockSizes, GroupSizes, LayerCache, ModelSizes, logits_bytes
from ensembler.preflight import check_ensemble
from ensembler.quantization import Quantization

GIB = 2**30


@functools.cache
def model(name: str) -> ModelSizes:
    return measure_model(published(name), "bfloat16")


def group(name: str, *roles: str, **more: object) -> GroupSizes:
    anchor = "source_ft" in roles
    return GroupSizes(roles, name, model(name), adapters={}, is_anchor=anchor, **more)  # type: ignore[arg-type]


def proposed(groups: Sequence[GroupSizes], *gib: float, context: int = 2048, batch_size: int = 1) -> Proposal:
    budgets = {f"cuda:{number}": int(size * GIB) for number, size in enumerate(gib)}
    found = propose(groups, budgets, context=context, batch_size=batch_size)
    assert all(device.used <= device.usable <= device.budget for device in found.devices)
    return found


def placed(proposal: Proposal) -> dict[str, tuple[str | None, str | None]]:
    return {role: (group.device, group.quantization) for group in proposal.groups for role in group.roles}


SMALL = [group("Llama-2-7B", "source_ft"), group("Llama-2-7B", "source_pt")]
LARGE = group("Qwen2.5-32B", "target_pt")


def test_two_of_24_gib_hold_a_pair_of_7b_one_each() -> None:
    assert placed(proposed(SMALL, 24, 24)) == {"source_ft": ("cuda:0", None), "source_pt": ("cuda:1", None)}


def test_two_of_80_gib_hold_a_trio_with_32b_alone() -> None:
    trio = [*SMALL, LARGE]
    assert placed(proposed(trio, 80, 80)) == {
        "source_ft": ("cuda:0", None),
        "source_pt": ("cuda:0", None),
        "target_pt": ("cuda:1", None),
    }


def test_bytes_are_counted_as_by_hand() -> None:
    shared = group("Llama-2-7B", "source_ft", "source_pt")
    found = proposed([shared], 80, context=1000, batch_size=3).groups[0]
    assert found.weight_bytes == 2 * 6_738_415_616 + 512  # one copy
    assert found.cache_bytes == 2 * 3 * 1000 * 524_288  # rows of both
    assert found.logits_bytes == (2 + 1) * 3 * 32000 * 4  # both and the combination
    assert proposed([shared], 80, context=1000, batch_size=3).devices[0].used == sum(
        (found.weight_bytes, found.cache_bytes, found.logits_bytes)
    )


def test_one_that_fits_in_8_bits_only_and_one_in_4_bits_only() -> None:
    # 32.8e9 parameters: 61.0 GiB in bfloat16, 32.0 GiB in 8 bits (head and embedding apart), 18.4 GiB in nf4
    assert placed(proposed([LARGE], 80))["target_pt"] == ("cuda:0", None)
    assert placed(proposed([LARGE], 40))["target_pt"] == ("cuda:0", "bnb-8bit")
    assert placed(proposed([LARGE], 24))["target_pt"] == ("cuda:0", "bnb-nf4")
    assert proposed([LARGE], 24).groups[0].chosen


def test_as_few_bytes_as_possible_are_quantised() -> None:
    found = placed(proposed([*SMALL, LARGE], 80))
    assert found == {"source_ft": ("cuda:0", None), "source_pt": ("cuda:0", None), "target_pt": ("cuda:0", "bnb-8bit")}
    # usable: 36 GiB; KV caches: 2.5. All in 8 bits: 6.5 + 6.5 + 32.2 GiB. The large one has to be in 4 bits (19.3),
    # even if both small ones were (3.9 + 3.9 + 32.2); one small one in 16 bits (12.6) is too much beside it.
    found = placed(proposed([*SMALL, LARGE], 40))
    assert [method for _, method in found.values()] == ["bnb-8bit", "bnb-8bit", "bnb-nf4"]


def test_spread_is_tried_before_quantisation() -> None:
    found = proposed([LARGE], 40, 40)
    assert placed(found)["target_pt"] == ("sequential", None)
    assert set(found.groups[0].max_memory or {}) == {"cuda:0", "cuda:1"}
    assert "--max-memory" in found.flags()


def test_unlike_devices() -> None:
    # usable: 14.4 and 72 GiB. 13.6 on the small device; beside 61.5 on the large one 8 bits (7.5) fit and 16 do not
    found = placed(proposed([*SMALL, LARGE], 16, 80))
    assert found["target_pt"] == ("cuda:1", None)
    assert {found["source_ft"], found["source_pt"]} == {("cuda:0", None), ("cuda:1", "bnb-8bit")}
    assert placed(proposed([LARGE, SMALL[0]], 18, 80)) == {
        "target_pt": ("cuda:1", None),
        "source_ft": ("cuda:0", None),
    }


def test_what_does_not_fit_says_by_how_much() -> None:
    found = proposed([LARGE], 8, 8)
    assert not found.fits
    assert found.flags() == []
    assert {group.device for group in found.groups} == {None}
    more = found.missing_bytes / GIB
    assert proposed([LARGE], 8 + more, 8 + more).fits
    assert not proposed([LARGE], 8 + 0.999 * more, 8 + 0.999 * more).fits
    need = found.groups[0].weight_bytes + found.groups[0].cache_bytes + found.groups[0].logits_bytes
    assert found.offload_bytes == need - sum(device.usable for device in found.devices)
    with pytest.raises(PlacementError, match="do not fit, not even in 4 bits: each device lacks"):
        found.apply(EnsembleConfig(rule="eft", members=dict.fromkeys(("target_pt", "source_ft", "source_pt"), "x")))


def test_what_the_user_said_stays() -> None:
    mine = group("Llama-2-7B", "source_ft", quantization=Quantization("bnb-fp4"), device="cuda:1")
    found = proposed([mine, SMALL[1]], 80, 80)
    assert placed(found) == {"source_ft": ("cuda:1", "bnb-fp4"), "source_pt": ("cuda:0", None)}
    assert [group.chosen for group in found.groups] == [False, False]
    with pytest.raises(ConfigError, match="source_ft is placed on cuda:1, which has no budget; there are: cuda:0"):
        proposed([mine], 80)


def test_long_texts_move_the_choice() -> None:
    member = group("Llama-3.1-8B", "target_pt")
    assert placed(proposed([member], 20, context=2048))["target_pt"] == ("cuda:0", None)
    # 131,072 tokens x 131,072 B = 16 GiB beside 15 GiB of weights
    assert placed(proposed([member], 40, context=131_072))["target_pt"] == ("cuda:0", None)
    assert placed(proposed([member], 28, context=131_072))["target_pt"][1] == "bnb-8bit"


QUANTIZERS = {
    None: None,
    Quantization("bnb-8bit"): BitsAndBytesConfig(load_in_8bit=True),
    Quantization("bnb-nf4"): BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}


@pytest.mark.parametrize("name", ["Llama-2-13B", "Qwen2.5-32B"])
@pytest.mark.parametrize("method", QUANTIZERS, ids=str)
@pytest.mark.parametrize("unlike", [1.0, 2.5])
def test_transformers_spreads_as_was_planned(
    monkeypatch: pytest.MonkeyPatch, name: str, method: Quantization | None, unlike: float
) -> None:
    """Its own division of the model, within the limits of the plan, puts nothing elsewhere and keeps every budget."""
    sizes, context, rows = model(name), 4096, 2
    need = sizes.num_bytes(method) + rows * sizes.cache_bytes(context)
    room = {"cuda:0": int(0.55 * need), "cuda:1": int(0.6 * need * unlike), "cuda:2": int(0.3 * need)}
    shares = BlockSizes.of(sizes.blocks, method, context, rows).spread(room)
    assert shares is not None
    limits: dict[int, float] = {
        int(device[5:]): 2**10 * int(share.limit.removesuffix("KiB")) for device, share in shares.items()
    }
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(published(name), dtype=torch.bfloat16)
    others = {
        part: sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
        for part, module in empty.named_modules()
    }
    quantizer = None
    if method is not None:
        quantizer = AutoHfQuantizer.from_config(QUANTIZERS[method])
        quantizer._process_model_before_weight_loading(empty, device_map=None)
        limits = quantizer.adjust_max_memory(limits)
    monkeypatch.setattr(accelerate, "get_max_memory", lambda given=None: dict(given))  # it looks for real GPUs
    found = accelerate.infer_auto_device_map(
        empty,
        max_memory=dict(limits),
        no_split_module_classes=empty._no_split_modules,
        clean_result=False,
        hf_quantizer=quantizer,
    )
    assert set(found.values()) <= set(limits), found
    layer = next(block for block in sizes.blocks if block.cache)
    layer_bytes = layer.num_bytes(method) + rows * layer.cache_bytes(context)
    for number in limits:
        own = [part for part, place in found.items() if place == number]
        used = sum(layer_bytes if part.startswith("model.layers.") else others[part] for part in own)
        assert used <= room[f"cuda:{number}"], (used, own)


BLOCKS = st.builds(
    Block,
    plain=st.integers(10**5, 10**6),
    linear=st.lists(st.tuples(st.integers(10**5, 10**7), st.just(100)), max_size=2).map(tuple),
    itemsize=st.sampled_from([2, 4]),
    cache=st.lists(st.builds(LayerCache, st.integers(0, 2000), st.none() | st.just(50)), max_size=1).map(tuple),
)
MODELS = st.lists(BLOCKS, min_size=1, max_size=5).map(
    lambda blocks: ModelSizes(parameters=1, dtype="bfloat16", width=100, blocks=tuple(blocks))
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[GroupSizes], dict[str, int]]:
    budgets = {f"cuda:{i}": draw(st.integers(10**6, 10**8)) for i in range(draw(st.integers(1, 3)))}
    groups = [
        GroupSizes(
            roles=tuple(f"r{number}{member}" for member in range(draw(st.integers(1, 2)))),
            name="m",
            model=draw(MODELS),
            adapters=draw(st.sampled_from([{}, {f"r{number}0": 5000}])),
            quantization=draw(st.sampled_from([None, None, METHODS[1]])),
            device=draw(st.sampled_from([None, None, *budgets])),
            is_anchor=number == 0,
        )
        for number in range(draw(st.integers(1, 3)))
    ]
    return groups, budgets


@given(cases(), st.integers(1, 300), st.integers(1, 3))
@settings(max_examples=200, deadline=None)
def test_random_cases(case: tuple[list[GroupSizes], dict[str, int]], context: int, batch_size: int) -> None:
    """No budget is passed, each group is counted once, and brute force finds nothing with less quantisation or load."""
    groups, budgets = case
    found = propose(groups, budgets, context=context, batch_size=batch_size)
    logits = logits_bytes(groups, batch_size)
    usable = {device: floor(size * (1 - HEADROOM)) for device, size in budgets.items()}

    def need(group: GroupSizes, method: Quantization | None) -> int:
        return group.weight_bytes(method) + group.cache_bytes(context, batch_size) + logits[group.roles]

    def harm(methods: Sequence[Quantization | None]) -> tuple[int, int]:
        free = [(group, method) for group, method in zip(groups, methods, strict=True) if group.quantization is None]
        return tuple(  # type: ignore[return-value]
            sum(group.model.num_bytes() for group, method in free if method is not None and method.bits == bits)
            for bits in (4, 8)
        )

    whole = []  # (harm, largest load) of everything that fits on single devices
    options = [METHODS if group.quantization is None else (group.quantization,) for group in groups]
    for methods in product(*options):
        for places in product(budgets, repeat=len(groups)):
            loads = dict.fromkeys(budgets, 0)
            for group, method, place in zip(groups, methods, places, strict=True):
                loads[place] += need(group, method)
            kept = all(group.device in (None, place) for group, place in zip(groups, places, strict=True))
            if kept and all(loads[device] <= usable[device] for device in budgets):
                whole.append((harm(methods), max(loads.values())))

    if not found.fits:
        assert not whole
        more = {device: size + found.missing_bytes for device, size in budgets.items()}
        assert propose(groups, more, context=context, batch_size=batch_size).fits
        return
    methods = [None if group.quantization is None else Quantization.parse(group.quantization) for group in found.groups]
    loads = {device.device: device.used for device in found.devices}
    assert all(loads[device] <= usable[device] for device in budgets)
    assert all(group.device in (None, place.device) for group, place in zip(groups, found.groups, strict=True))
    if any(group.max_memory is not None for group in found.groups):
        assert all(other > harm(methods) for other, _ in whole)
    else:
        assert sum(loads.values()) == sum(need(group, method) for group, method in zip(groups, methods, strict=True))
        assert (harm(methods), max(loads.values())) == min(whole)


@pytest.fixture
def eft(folders: dict[str, Path]) -> EnsembleConfig:
    return EnsembleConfig(rule="eft", members={role: str(folder) for role, folder in folders.items()})


def test_a_plan_is_applied_to_a_configuration(eft: EnsembleConfig) -> None:
    checked = check_ensemble(eft)
    total = sum(group.weight_bytes() for group in measure(checked))
    found = plan(checked, {"cuda:0": total, "cuda:1": total}, context=16)
    found.apply(checked.config)
    assert {role: member.device for role, member in checked.config.members.items()} == {
        role: place for role, (place, _) in placed(found).items()
    }
    assert {member.device for member in checked.config.members.values()} == {"cuda:0", "cuda:1"}
    again = json.loads(json.dumps(found.to_dict()))
    assert again["fits"]
    assert again["devices"][0]["used"] == found.devices[0].used


def test_a_plan_on_the_cpu_runs(eft: EnsembleConfig) -> None:
    checked = check_ensemble(eft)
    found = plan(checked, {"cpu": 50_000 * 4}, context=16)
    assert found.fits
    assert found.flags()[:2] == ["--device", "cpu"]
    found.apply(checked.config)
    model = EnsembleForCausalLM.from_checked(checked)
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False).shape == (1, 5)


def test_limits_of_a_plan(eft: EnsembleConfig, save_member: SaveMember) -> None:
    checked = check_ensemble(eft)
    assert plan(checked, {"cpu": GIB}).context == 128
    with pytest.raises(ConfigError, match=r"a context of 129 tokens was asked for; that of \w+ ends at 128"):
        plan(checked, {"cpu": GIB}, context=129)
    checked.config.members["source_pt"] = MemberConfig(str(save_member("m")), device_map={"": "cpu"})
    with pytest.raises(ConfigError, match="source_pt is spread by hand already"):
        plan(checked, {"cpu": GIB})
