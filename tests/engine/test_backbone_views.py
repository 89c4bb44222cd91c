"""A member of a shared backbone is a model like any other: copied, cast, replaced, saved."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapter_cases import (
    IDS,
    MASK,
    MODES,
    PADDED,
    TOGETHER,
    GetPair,
    Pair,
    alone,
    assert_same,
    last_logits,
    make_pair,
    roles_of_forwards,
    save_adapter,
    save_base,
    tokens,
    weight_bytes,
)
from helpers.tiny import make_model, random_ids
from peft import LoraConfig
from torch.testing import assert_close
from transformers import PreTrainedModel

from ensembler import EnsembleCache, EnsembleForCausalLM, MemberConfig
from ensembler.errors import OutputError

# -- one copy of the weights ------------------------------------------------------------------------------------------


def test_weights_are_in_memory_once(pair: Pair) -> None:
    members = pair.shared.members
    layers = [members[role].model.layers[0] for role in ("source_ft", "source_pt")]
    assert layers[0].mlp.up_proj.weight.data_ptr() == layers[1].mlp.up_proj.weight.data_ptr()
    num_adapter = sum(4 * (a + b) for a, b in ((16, 16), (16, 16), (32, 16))) * 2  # r · (in + out), layers
    num_base = alone(pair.base).num_parameters()
    assert pair.shared.num_parameters() == num_base + num_adapter + members["target_pt"].num_parameters()
    state = pair.shared.state_dict()
    assert {name.rpartition(".")[2] for name in state if ".adapters." in name} == {"down_source_ft", "up_source_ft"}
    own = alone(pair.base).state_dict()
    assert own.keys() <= {name.removeprefix("members.source_pt.") for name in state}  # layers keep their names
    ranks = 4 * num_adapter
    assert weight_bytes(pair.shared) == weight_bytes(alone(pair.base)) + weight_bytes(members["target_pt"]) + ranks
    assert weight_bytes(pair.copies) == 2 * weight_bytes(alone(pair.base)) + weight_bytes(members["target_pt"])


COPIES: dict[str, Callable[[EnsembleForCausalLM], EnsembleForCausalLM]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("lora", ["plain", "dora"])
def test_copies_are_whole_and_independent(tmp_path: Path, pair_target: PreTrainedModel, how: str, lora: str) -> None:
    base = save_base(tmp_path / "base")
    pair = make_pair(base, save_adapter(base, tmp_path / "adapter", use_dora=lora == "dora"), pair_target)
    before = last_logits(pair.shared, IDS)
    made = COPIES[how](pair.shared)
    assert roles_of_forwards(made) == roles_of_forwards(pair.shared)
    assert torch.equal(last_logits(made, IDS), before)
    for role in made.members:
        assert_same(last_logits(made.members[role], IDS), last_logits(pair.copies.members[role], IDS))
    assert weight_bytes(made) == weight_bytes(pair.shared)
    for tensor in made.parameters():
        tensor.data.mul_(1.1)
    assert (last_logits(made, IDS) - before).abs().max() > 0.1
    assert torch.equal(last_logits(pair.shared, IDS), before)


# -- views ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["source_ft", "source_pt"])
def test_a_view_is_a_model_like_any_other(pair: Pair, role: str) -> None:
    view, plain = pair.shared.members[role], pair.copies.members[role]
    for mode in ("greedy", "sampling", "beams", "static"):
        assert tokens(view, PADDED, **MODES[mode]) == tokens(plain, PADDED, **MODES[mode])
    embeds = plain.get_input_embeddings()(IDS)
    with torch.no_grad():
        by_position, by_embeddings = view(IDS).logits, view(inputs_embeds=embeds).logits
        assert_close(by_position, plain(IDS).logits, atol=1e-5, rtol=1e-5)
        assert_close(by_embeddings, by_position, atol=1e-5, rtol=1e-5)
        hidden = [model(IDS, output_hidden_states=True).hidden_states[-1] for model in (view, plain)]
        assert_close(*hidden, atol=1e-5, rtol=1e-5)
    ids = random_ids(1, 6, seed=4)
    assert tokens(plain, ids, assistant_model=view) == tokens(plain, ids)
    assert tokens(view, ids, assistant_model=pair.shared) == tokens(plain, ids)


def test_generation_settings_of_views_are_their_own(pair: Pair) -> None:
    first, second = (pair.shared.members[role].generation_config for role in ("source_ft", "source_pt"))
    assert first is not second
    assert pair.shared.generation_config is not first


@pytest.mark.parametrize("role", ["source_ft", "source_pt", "target_pt"])
def test_a_replaced_member_is_the_one_that_runs(get_pair: GetPair, role: str) -> None:
    shared, copies = (copy.deepcopy(model) for model in (get_pair().shared, get_pair().copies))
    other = make_model("gpt_neox", 70)
    view = shared.members[role]
    shared.members[role] = copies.members[role] = other
    assert_close(last_logits(shared, IDS), last_logits(copies, IDS), atol=1e-5, rtol=1e-5)
    assert tokens(shared, PADDED, num_beams=3) == tokens(copies, PADDED, num_beams=3)
    shared.members[role] = view
    assert roles_of_forwards(shared) == TOGETHER
    assert_same(last_logits(shared, IDS), last_logits(get_pair().copies, IDS))


@pytest.mark.parametrize("compiled", [["source_ft"]], ids="+".join)
def test_compiled_views(get_pair: GetPair, compiled: list[str]) -> None:
    pair = get_pair()
    model = copy.deepcopy(pair.shared)
    cache = model.new_cache()
    for role in compiled:
        model.members[role] = torch.compile(model.members[role], backend="eager")
    assert_same(last_logits(model, IDS), last_logits(pair.copies, IDS))
    options = {"attention_mask": MASK[:1], "logits_to_keep": 1}
    assert_close(
        last_logits(model, PADDED[:1], **options), last_logits(pair.copies, PADDED[:1], **options), atol=1e-4, rtol=0
    )
    with pytest.raises(ValueError, match=r"the cache is for .*make one with new_cache"):
        model(IDS, past_key_values=cache, use_cache=True)


def test_to_casts_backbone_and_adapters(get_pair: GetPair) -> None:
    model = copy.deepcopy(get_pair().shared).to(torch.bfloat16)
    assert any("_source_ft" in name for name, _ in model.named_parameters())
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}
    expected = last_logits(get_pair().copies, IDS)
    assert (last_logits(model, IDS) - expected).norm() < 0.1 * expected.norm()


def test_to_casts_adapters_that_peft_runs(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "opt")
    adapter = save_adapter(base, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj"], bias="all"))
    members = {"reference": str(base), "aligned": MemberConfig(str(base), adapter=str(adapter))}
    model = EnsembleForCausalLM.from_members(rule="realign", alpha=0.5, members=members)
    expected = last_logits(model, IDS)
    assert (last_logits(model.to(torch.bfloat16), IDS) - expected).norm() < 0.1 * expected.norm()
    assert_close(last_logits(model.float(), IDS), expected, atol=1.0, rtol=0.2)


# -- saving -----------------------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[], Any]] = {
    "plain": lambda: None,
    "dora": lambda: LoraConfig(r=4, target_modules=["q_proj"], use_dora=True),
    "bias": lambda: LoraConfig(r=4, target_modules=["q_proj", "v_proj"], bias="all"),
    "lm_head": lambda: LoraConfig(r=4, target_modules=["lm_head"]),
}


@pytest.mark.parametrize("how", ["adapter", "as the model"])
@pytest.mark.parametrize("kind", KINDS)
def test_save_round_trips(tmp_path: Path, kind: str, how: str) -> None:
    """By reference and as copies; the copies need neither base nor adapter any more."""
    home = tmp_path / "home"
    base = save_base(home / "base", "qwen2")
    adapter = save_adapter(base, home / "adapter", KINDS[kind]())
    aligned = MemberConfig(str(base), adapter=str(adapter)) if how == "adapter" else MemberConfig(str(adapter))
    model = EnsembleForCausalLM.from_members(
        rule="realign", alpha=0.5, members={"reference": str(base), "aligned": aligned}
    )
    expected = last_logits(model, IDS)
    model.save_pretrained(tmp_path / "home" / "referenced")
    model.save_pretrained(tmp_path / "alone", copy_members=True)
    again = EnsembleForCausalLM.from_pretrained(home / "referenced")
    assert roles_of_forwards(again) == roles_of_forwards(model)
    assert torch.equal(last_logits(again, IDS), expected)
    if how == "adapter":  # relative paths: all of it can be moved together
        home.rename(tmp_path / "moved")
        assert_close(last_logits(EnsembleForCausalLM.from_pretrained(tmp_path / "moved" / "referenced"), IDS), expected)
    else:
        home.rename(tmp_path / "gone")
    saved = EnsembleForCausalLM.from_pretrained(tmp_path / "alone")
    assert not any((tmp_path / "alone" / role / "adapter_config.json").exists() for role in model.members)
    assert_close(last_logits(saved, IDS), expected, atol=1e-5, rtol=1e-5)
    assert not any(".adapters." in name for name in saved.state_dict())


def test_a_compiled_view_is_saved_whole(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    members = {"reference": str(base), "aligned": MemberConfig(str(base), adapter=str(adapter))}
    model = EnsembleForCausalLM.from_members(rule="realign", alpha=0.5, members=members)
    expected = last_logits(model, IDS)
    model.members["aligned"] = torch.compile(model.members["aligned"], backend="eager")
    model.save_pretrained(tmp_path / "alone", copy_members=True)
    assert_close(
        last_logits(EnsembleForCausalLM.from_pretrained(tmp_path / "alone"), IDS), expected, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("role", ["source_ft", "source_pt"])
def test_a_view_is_not_saved_by_itself(pair: Pair, tmp_path: Path, role: str) -> None:
    """Its layers have other names: what was written would be loaded with random weights in their place."""
    with pytest.raises(OutputError, match="copy_members=True"):
        pair.shared.members[role].save_pretrained(tmp_path / role)
    assert not (tmp_path / role).exists()


def test_a_cache_of_a_shared_backbone_is_not_one_of_two_copies(pair: Pair) -> None:
    with pytest.raises(ValueError, match=r"the cache is for source_ft, source_pt, target_pt; the members run as"):
        last_logits(pair.shared, IDS, past_key_values=pair.copies.new_cache(), use_cache=True)
    assert isinstance(pair.shared.new_cache(), EnsembleCache)
