"""Mixtures of experts: LoRAs of whole stacks and of single experts, on files of stacks and of single experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.expert_cases import (
    FAMILIES,
    assert_applied_as_by_peft,
    assert_is,
    loaded_weights,
    make_experts,
    merged_by_peft,
    save_experts,
    save_old_lora,
    save_stack_lora,
    stacks_of,
)
from helpers.patch_cases import edit_json, edit_tensors, weights
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from ensembler.errors import PatchError
from ensembler.patch.apply import apply_patches
from ensembler.patch.formats import read_patch
from ensembler.patch.patch_plan import plan_patches
from ensembler.patch.verify import verify_applied

OLD = ("mixtral", "olmoe", "qwen3_moe")  # those whose old names PEFT knows


@pytest.mark.parametrize("kind", FAMILIES)
def test_loras_of_stacks_are_added_as_by_peft(kind: str, tmp_path: Path) -> None:
    new = make_experts(kind, 1)
    model = save_experts(new, tmp_path / "model")
    lora = save_stack_lora(make_experts(kind, 0), tmp_path / "lora")
    stacks = len(stacks_of(new))
    assert stacks >= 2
    assert_applied_as_by_peft(lora, model, tmp_path / "out", changed=2 + stacks)
    plan = plan_patches([read_patch(lora)], model)
    assert verify_applied(plan, tmp_path / "out").num_tensors == len(plan.model.tensors)


@pytest.mark.parametrize("as_loaded", [False, True], ids=["single", "stacks"])
@pytest.mark.parametrize("kind", OLD)
def test_loras_of_single_experts_are_added_as_by_peft(kind: str, as_loaded: bool, tmp_path: Path) -> None:
    """PEFT makes one LoRA of the stack out of them; here they stay, and go to rows of a stack or to a tensor."""
    model = save_experts(make_experts(kind, 1), tmp_path / "model", as_loaded=as_loaded)
    assert any(tensor.dim() == 3 for tensor in weights(model).values()) is as_loaded
    lora = save_old_lora(kind, tmp_path / "lora")
    assert_applied_as_by_peft(lora, model, tmp_path / "out", changed=4)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_a_lora_of_stacks_on_files_of_stacks(kind: str, tmp_path: Path) -> None:
    model = save_experts(make_experts(kind, 1), tmp_path / "model", as_loaded=True)
    lora = save_stack_lora(make_experts(kind, 0), tmp_path / "lora", use_rslora=True)
    assert_applied_as_by_peft(lora, model, tmp_path / "out", changed=6)


def test_the_notes_say_where_they_go(tmp_path: Path) -> None:
    single = save_experts(make_experts("mixtral", 1), tmp_path / "single")
    stacks = save_experts(make_experts("mixtral", 1), tmp_path / "stacks", as_loaded=True)
    old, new = save_old_lora("mixtral", tmp_path / "old"), save_stack_lora(make_experts("mixtral", 0), tmp_path / "new")
    (note,) = plan_patches([read_patch(old)], stacks).notes
    assert note == (
        f"{old}: the LoRA of model.layers.0.block_sparse_moe.experts.0.w1.weight is added to "
        f"model.layers.0.mlp.experts.gate_up_proj in {stacks} (24 LoRAs in all)"
    )
    (note,) = plan_patches([read_patch(new)], single).notes
    assert note.startswith(
        f"{new}: the LoRA of model.layers.0.mlp.experts.down_proj is added to "
        "model.layers.0.block_sparse_moe.experts.0.w2.weight, "
    )
    assert note.endswith(f"in {single} (4 LoRAs in all)")


def test_ranks_and_strengths_of_their_own(tmp_path: Path) -> None:
    model = save_experts(make_experts("qwen3_moe", 1), tmp_path / "model")
    patterns = {
        "rank_pattern": {"experts.gate_up_proj": 3},
        "alpha_pattern": {"0.mlp.experts.down_proj": 5, "o_proj": 2},
    }
    lora = save_stack_lora(make_experts("qwen3_moe", 0), tmp_path / "lora", **patterns)
    assert_applied_as_by_peft(lora, model, tmp_path / "out", changed=6)


@pytest.mark.parametrize("target", ["down_proj", "gate_up_proj"])
def test_one_stack_alone(target: str, tmp_path: Path) -> None:
    model = save_experts(make_experts("mixtral", 1), tmp_path / "model")
    for number, name in enumerate((f"experts.{target}", target)):  # PEFT takes a name without its module too
        lora = save_stack_lora(make_experts("mixtral", 0), tmp_path / f"lora-{number}", target_parameters=[name])
        assert_applied_as_by_peft(lora, model, tmp_path / f"out-{number}", changed=4)


def test_a_router_is_changed_by_its_own_lora_alone(tmp_path: Path) -> None:
    model = save_experts(make_experts("qwen3_moe", 1), tmp_path / "model")
    targets = ["gate.weight", "experts.down_proj"]
    lora = save_stack_lora(make_experts("qwen3_moe", 0), tmp_path / "lora", target_parameters=targets)
    assert_applied_as_by_peft(lora, model, tmp_path / "out", changed=6)
    router = "model.layers.0.mlp.gate.weight"
    assert not torch.equal(weights(tmp_path / "out")[router], weights(model)[router])


def test_shared_experts_and_dense_layers_beside_experts(tmp_path: Path) -> None:
    """DeepSeek: a dense first layer, then experts beside a shared one; PEFT leaves the two out of old LoRAs."""
    new = make_experts("deepseek_v3", 1)
    others = ("model.layers.0.mlp", "model.layers.1.mlp.shared_experts")
    lora = save_old_lora("deepseek_v3", tmp_path / "lora", layers=(1,), others=others)
    for as_loaded in (False, True):
        model = save_experts(new, tmp_path / f"model-{as_loaded}", as_loaded=as_loaded)
        out = tmp_path / f"out-{as_loaded}"
        apply_patches([read_patch(lora)], model, out)
        expected = {name: tensor.double() for name, tensor in loaded_weights(model).items()}
        for name, delta in deltas_of(lora, 1.5).items():
            before, is_expert, after = name.partition(".experts.")
            if is_expert:
                expert, module = after.removesuffix(".weight").split(".")
                stack = expected[f"{before}.experts.{'down_proj' if module == 'down_proj' else 'gate_up_proj'}"]
                half = stack.shape[1] // 2
                rows = {"gate_proj": slice(0, half), "up_proj": slice(half, None), "down_proj": slice(None)}[module]
                stack[int(expert), rows] += delta
            else:
                expected[name] += delta
        assert_is(out, expected, model, changed=3 + 3 + 2)


def deltas_of(lora: Path, scale: float) -> dict[str, Tensor]:
    factors = {name.removeprefix("base_model.model."): tensor.double() for name, tensor in weights(lora).items()}
    ends = (".lora_A.weight", ".lora_B.weight")
    modules = {name.removesuffix(ends[0]) for name in factors if name.endswith(ends[0])}
    return {f"{name}.weight": scale * factors[name + ends[1]] @ factors[name + ends[0]] for name in modules}


def test_two_patches_and_their_strengths(tmp_path: Path) -> None:
    """A LoRA of stacks and one of single experts on one model are the sum of both, in either layout."""
    old = save_old_lora("mixtral", tmp_path / "old")
    new = save_stack_lora(make_experts("mixtral", 0), tmp_path / "new")
    for as_loaded in (False, True):
        model = save_experts(make_experts("mixtral", 1), tmp_path / f"model-{as_loaded}", as_loaded=as_loaded)
        before = loaded_weights(model)
        deltas = [{n: t - before[n].double() for n, t in merged_by_peft(model, one).items()} for one in (old, new)]
        expected = {name: t.double() + 0.5 * deltas[0][name] - 2 * deltas[1][name] for name, t in before.items()}
        out = tmp_path / f"out-{as_loaded}"
        apply_patches([read_patch(old, scale=0.5), read_patch(new, scale=-2)], model, out)
        assert_is(out, expected, model, changed=6)


def test_zero_loras_change_nothing(tmp_path: Path) -> None:
    model = save_experts(make_experts("mixtral", 1), tmp_path / "model", as_loaded=True)
    lora = save_old_lora("mixtral", tmp_path / "lora")
    edit_tensors(
        lora / "adapter_model.safetensors",
        lambda t: {n: torch.zeros_like(v) if "layers.0" in n else v for n, v in t.items()},
    )
    plan = plan_patches([read_patch(lora)], model)
    assert set(plan.names) == {f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")}
    names = "model.layers.0.mlp.experts.gate_up_proj, model.layers.0.mlp.experts.down_proj"
    assert f"the LoRA of {names} is 0, as before training" in plan.notes[-1]


def test_what_peft_saves_of_a_lora_of_single_experts(tmp_path: Path) -> None:
    """PEFT makes LoRAs of stacks out of them, with names without a module and ranks in patterns."""
    model = save_experts(make_experts("mixtral", 1), tmp_path / "model")
    old = save_old_lora("mixtral", tmp_path / "old")
    base = AutoModelForCausalLM.from_pretrained(model)
    PeftModel.from_pretrained(base, old).save_pretrained(tmp_path / "new")
    assert len(weights(tmp_path / "new")) == 2 * 2 * 2
    for lora in (old, tmp_path / "new"):
        apply_patches([read_patch(lora)], model, tmp_path / f"out-{lora.name}")
        assert_is(tmp_path / f"out-{lora.name}", merged_by_peft(model, old), model, changed=4)
    assert not plan_patches([read_patch(tmp_path / "new")], model).warnings


def test_a_stack_of_a_class_that_transformers_lacks(tmp_path: Path) -> None:
    """One parameter of a module can be told from its name alone; the order of several is the class's."""
    model = save_experts(make_experts("mixtral", 1), tmp_path / "model", as_loaded=True)
    one = save_stack_lora(make_experts("mixtral", 0), tmp_path / "one", target_parameters=["experts.down_proj"])
    two = save_stack_lora(make_experts("mixtral", 0), tmp_path / "two")
    expected = merged_by_peft(model, one)
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit_json(model / "config.json", model_type="own", architectures=["OwnModel"], auto_map=own)
    apply_patches([read_patch(one)], model, tmp_path / "out")
    for name, values in weights(tmp_path / "out").items():
        torch.testing.assert_close(values.double(), expected[name], atol=1e-6, rtol=1e-6, msg=name)
    with pytest.raises(
        PatchError, match=r"changes several parameters of .*experts \(target_parameters\), and the class of"
    ):
        plan_patches([read_patch(two)], model)
