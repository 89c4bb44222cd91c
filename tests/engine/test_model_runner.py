"""One forward of the ensemble, its α, and what users do to a model besides generating."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny import make_model, member_logits, random_ids, tables
from torch.testing import assert_close
from transformers import DynamicCache, PreTrainedModel

from ensembler import EnsembleCache, EnsembleForCausalLM
from ensembler.errors import ConfigError, EnsemblerError, InputError, LogitsError

IDS = random_ids(2, 9)


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf, -0.5, True, "1", None, torch.tensor(math.nan)])
def test_alpha_refused(fresh: EnsembleForCausalLM, alpha: Any) -> None:
    with pytest.raises(ConfigError, match="alpha is"):
        fresh.alpha = alpha
    assert fresh.alpha == 0.7


@pytest.mark.parametrize("values", [[], [0.1, math.nan], [0.1, -1.0], [math.inf], [[0.1, 0.2]], [[[0.1]]]])
def test_alpha_tensors_refused(fresh: EnsembleForCausalLM, values: list[Any]) -> None:
    with pytest.raises(ConfigError, match="alpha"):
        fresh.alpha = torch.tensor(values)
    assert fresh.alpha == 0.7


@pytest.mark.parametrize("count", [3, 4])
def test_alpha_of_another_number_of_rows(fresh: EnsembleForCausalLM, count: int) -> None:
    fresh.alpha = torch.full((count,), 0.5)
    with pytest.raises(InputError, match=f"alpha has {count} values for 2 rows"):
        fresh(IDS)


@pytest.mark.parametrize("number", [0.25, np.float64(0.25), np.float32(0.25), torch.tensor(0.25)])
def test_any_real_number_is_an_alpha(fresh: EnsembleForCausalLM, number: Any) -> None:
    """α grids come from numpy and torch as well."""
    fresh.alpha = number
    assert fresh.alpha == 0.25


def test_negative_alpha_belongs_to_linear() -> None:
    a, b = make_model(seed=1), make_model(seed=2)
    model = EnsembleForCausalLM.from_members(
        rule="linear", alpha=-0.5, members={"a": a, "b": b}, constant={"a": 1.0}, slope={"b": 1.0}
    )
    with torch.no_grad():
        assert_close(
            model(IDS).logits.double(), member_logits(a, IDS) - 0.5 * member_logits(b, IDS), atol=1e-4, rtol=1e-5
        )


def test_alpha_of_the_config_is_the_alpha_in_use(fresh: EnsembleForCausalLM) -> None:
    fresh.alpha = 0.25
    assert fresh.config.alpha == 0.25


@pytest.mark.parametrize("kept", [0, 1, 3, torch.tensor([0, 4]), torch.tensor([8])])
def test_logits_to_keep_slices(base_change: EnsembleForCausalLM, kept: int | torch.Tensor) -> None:
    with torch.no_grad():
        full = base_change(IDS).logits
        some = base_change(IDS, logits_to_keep=kept).logits
    expected = full[:, kept] if isinstance(kept, torch.Tensor) else full[:, -kept:]
    assert_close(some, expected, atol=1e-5, rtol=1e-5)


def test_loss_is_the_cross_entropy(base_change: EnsembleForCausalLM) -> None:
    labels = IDS.clone()
    labels[0, :4] = -100
    with torch.no_grad():
        output = base_change(IDS, labels=labels, logits_to_keep=1)
    log_probs = output.logits.double().log_softmax(-1)
    picked = [log_probs[r, t - 1, labels[r, t]] for r in range(2) for t in range(1, 9) if labels[r, t] != -100]
    assert_close(output.loss.double(), -torch.stack(picked).mean(), atol=1e-5, rtol=1e-5)


def test_return_dict_and_use_cache(base_change: EnsembleForCausalLM) -> None:
    with torch.no_grad():
        output = base_change(IDS, use_cache=True)
        as_tuple = base_change(IDS, return_dict=False)
        assert base_change(IDS, use_cache=False).past_key_values is None
    assert isinstance(output.past_key_values, EnsembleCache)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], output.logits)


@pytest.mark.parametrize(
    "inputs",
    [
        {"input_ids": IDS, "output_hidden_states": True},
        {"input_ids": IDS, "output_attentions": True},
        {"input_ids": IDS, "inputs_embeds": torch.zeros(2, 9, 16)},
        {"input_ids": IDS, "a_typing_error": 1},
        {"inputs_embeds": torch.zeros(2, 9, 16)},
        {"input_ids": IDS, "past_key_values": DynamicCache()},
        {"input_ids": IDS, "past_key_values": ((torch.zeros(1),),)},
    ],
    ids=lambda inputs: "+".join(inputs),
)
def test_inputs_refused_in_one_line(base_change: EnsembleForCausalLM, inputs: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        base_change(**inputs)
    assert "\n" not in str(caught.value)


def test_what_asks_for_nothing_is_taken(base_change: EnsembleForCausalLM) -> None:
    with torch.no_grad():
        actual = base_change(IDS, output_hidden_states=False, inputs_embeds=None).logits
        assert torch.equal(actual, base_change(IDS).logits)


@pytest.mark.parametrize("role", ["source_ft", "source_pt", "target_pt"])
def test_nan_names_the_member(role: str) -> None:
    members = dict(zip(("source_ft", "source_pt", "target_pt"), tables(3), strict=True))
    model = EnsembleForCausalLM.from_members(rule="eft", alpha=0.0, members=members)
    members[role].fault = math.nan
    with pytest.raises(LogitsError, match=f"^{role} computed NaN logits in torch.float32"):
        model(IDS)


def test_members_of_different_dtypes() -> None:
    members = {"reference": make_model("llama", 1).bfloat16(), "aligned": make_model("qwen2", 2).half()}
    model = EnsembleForCausalLM.from_members(rule="realign", alpha=0.5, members=members)
    with torch.no_grad():
        logits = model(IDS).logits
    assert logits.dtype == torch.float32
    expected = 0.5 * sum(member_logits(member, IDS) for member in members.values())
    assert_close(logits.double(), expected, atol=1e-5, rtol=1e-5)
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_are_independent(fresh: EnsembleForCausalLM, how: Any) -> None:
    made = how(fresh)
    with torch.no_grad():
        assert torch.equal(made(IDS).logits, fresh(IDS).logits)
        for parameter in made.members["source_ft"].parameters():
            parameter.zero_()
        made.alpha = 0.0
        assert not made(IDS).logits.any()
        assert fresh.alpha == 0.7
        assert fresh(IDS).logits.any()


def test_to_moves_and_casts_all_members(trio: dict[str, PreTrainedModel]) -> None:
    model = copy.deepcopy(EnsembleForCausalLM.from_members(members=trio)).to(torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert model(IDS).logits.dtype == torch.float32


def test_a_member_that_is_replaced_is_the_one_that_runs(fresh: EnsembleForCausalLM) -> None:
    """`model.members[role] = torch.compile(...)`, or another checkpoint, must not be ignored."""
    other = make_model("llama", 77)
    fresh.members["source_ft"] = other
    fresh.alpha = 0.0
    with torch.no_grad():
        assert_close(fresh(IDS).logits, other(IDS).logits)


def test_a_compiled_member_still_gets_mask_and_positions(fresh: EnsembleForCausalLM) -> None:
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    mask[0, :2] = 0
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0), "logits_to_keep": 1}
    with torch.no_grad():
        expected = fresh(ids, **inputs).logits
        fresh.members["source_ft"] = torch.compile(fresh.members["source_ft"], backend="eager")
        assert_close(fresh(ids, **inputs).logits, expected)


def test_generation_config_is_not_shared_with_the_anchor(trio: dict[str, PreTrainedModel]) -> None:
    model = EnsembleForCausalLM.from_members(rule="eft", members=trio)
    before = trio["target_pt"].generation_config.max_length
    model.generation_config.max_length = 77
    after, trio["target_pt"].generation_config.max_length = trio["target_pt"].generation_config.max_length, before
    assert after == before


def test_accelerate_hooks_and_gradient_flags(fresh: EnsembleForCausalLM) -> None:
    from accelerate import Accelerator
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    with torch.no_grad():
        expected = fresh(IDS).logits
        add_hook_to_module(fresh.members["source_ft"], ModelHook())
        assert torch.equal(fresh(IDS).logits, expected)
        remove_hook_from_module(fresh.members["source_ft"])
        assert torch.equal(Accelerator(cpu=True).prepare(fresh)(IDS).logits, expected)
    with pytest.raises(ValueError, match="does not support"):
        fresh.gradient_checkpointing_enable()
    fresh.train()
    assert all(member.training for member in fresh.members.values())
    fresh.eval()


def test_it_looks_like_a_model(base_change: EnsembleForCausalLM) -> None:
    assert base_change.can_generate()
    assert base_change.num_parameters() == sum(m.num_parameters() for m in base_change.members.values())
    assert base_change.config.get_text_config().vocab_size == 64
    assert base_change.config.max_position_embeddings == 128
    assert base_change.get_output_embeddings() is None


def test_members_that_are_no_transformers_models_are_refused_in_one_line(trio: dict[str, PreTrainedModel]) -> None:
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(make_model(seed=1), LoraConfig(r=2, target_modules=["q_proj"]))
    for member in (tuned, torch.nn.Sequential(torch.nn.Linear(1, 1)), 3):
        with pytest.raises(EnsemblerError) as caught:
            EnsembleForCausalLM.from_members(rule="eft", members={**trio, "source_ft": member})
        assert "\n" not in str(caught.value), str(caught.value)[:300]


@pytest.mark.parametrize("changes", [{"extra": None}, {"source_ft": None}], ids=["unknown", "missing"])
def test_roles_must_fit_the_rule(trio: dict[str, PreTrainedModel], changes: dict[str, Any]) -> None:
    members = {**trio, "extra": trio["source_pt"]} if "extra" in changes else {"source_pt": trio["source_pt"]}
    with pytest.raises(ConfigError, match=r"unknown role 'extra'|needs a member"):
        EnsembleForCausalLM.from_members(rule="eft", members=members)
