"""Patches of experts that do not fit a model, or not as they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.expert_cases import (
    EXPERTS,
    make_experts,
    save_experts,
    save_old_lora,
    save_stack_lora,
    stacks_of,
)
from helpers.patch_cases import edit_json, edit_tensors, save_lora_of, weights

from ensembler.errors import PatchError
from ensembler.patch.apply import apply_patches
from ensembler.patch.formats import read_patch
from ensembler.patch.patch_plan import plan_patches


@pytest.mark.parametrize("experts", [3, 5])
def test_another_number_of_experts(experts: int, tmp_path: Path) -> None:
    for as_loaded in (False, True):
        model = save_experts(make_experts("mixtral", 1), tmp_path / f"model-{as_loaded}", as_loaded=as_loaded)
        lora = save_old_lora("mixtral", tmp_path / f"old-{as_loaded}", experts=experts)
        with pytest.raises(PatchError, match=message_of(experts, as_loaded)):
            plan_patches([read_patch(lora)], model)
        other = make_experts("mixtral", 0, num_local_experts=experts, num_experts=experts)
        stacks = save_stack_lora(other, tmp_path / f"new-{as_loaded}")
        with pytest.raises(
            PatchError,
            match=rf"changes model.layers.0.mlp.experts.down_proj, which is of {experts} experts, and .* has 4 in",
        ):
            plan_patches([read_patch(stacks)], model)


def message_of(experts: int, as_loaded: bool) -> str:
    if experts > EXPERTS:
        return r"experts\.4\.w1\.weight, which is of expert 4, and .*mlp\.experts\.gate_up_proj has 4 experts in"
    if as_loaded:
        return r"holds LoRAs of 3 of the 4 experts in .*_proj of .*, and nothing for .*experts\.3\.w\d; it was made"
    return r"has 6 matrices that .* says it changes and holds nothing for: .*experts\.3\.w1"


def test_some_experts_alone_where_the_adapter_says_so(tmp_path: Path) -> None:
    model = save_experts(make_experts("mixtral", 1), tmp_path / "model", as_loaded=True)
    lora = save_old_lora("mixtral", tmp_path / "lora", experts=2, target_modules=r".*experts\.[01]\.w[123]")
    apply_patches([read_patch(lora)], model, tmp_path / "out")
    before, after = weights(model), weights(tmp_path / "out")
    for name in stacks_of(make_experts("mixtral", 1)):
        same = [torch.equal(before[name][expert], after[name][expert]) for expert in range(EXPERTS)]
        assert same == [False, False, True, True]


def test_ranks_that_do_not_fit_a_stack(tmp_path: Path) -> None:
    lora = save_stack_lora(make_experts("mixtral", 0), tmp_path / "lora")
    edit_json(lora / "adapter_config.json", r=3)
    with pytest.raises(
        PatchError, match=r"experts.* has lora_A of 8 rows, which is no multiple of the rank 3 that adapter_"
    ):
        read_patch(lora)
    edit_json(lora / "adapter_config.json", r=4)
    model = save_experts(make_experts("mixtral", 1), tmp_path / "model")
    edit_tensors(lora / "adapter_model.safetensors", lambda t: {n: v for n, v in t.items() if "experts" in n})
    with pytest.raises(PatchError, match=r"which is of 2 experts, and .* has 4"):
        plan_patches([read_patch(lora)], model)


def test_a_stack_and_a_single_expert_of_it(tmp_path: Path) -> None:
    model = save_experts(make_experts("mixtral", 1), tmp_path / "model")
    lora = save_stack_lora(make_experts("mixtral", 0), tmp_path / "lora")
    old = save_old_lora("mixtral", tmp_path / "old", layers=(0,), experts=1)
    edit_tensors(lora / "adapter_model.safetensors", lambda tensors: {**tensors, **weights(old)})
    with pytest.raises(PatchError, match=r"and both change .*experts\.0\.w\d\.weight"):
        plan_patches([read_patch(lora)], model)


def test_layers_of_one_expert_where_no_conversion_is_known(tmp_path: Path) -> None:
    model = save_experts(make_experts("llama4_text", 1), tmp_path / "model")
    lora = save_old_lora("mixtral", tmp_path / "lora")
    edit_json(lora / "adapter_config.json", target_modules=[])
    edit_tensors(
        lora / "adapter_model.safetensors",
        lambda t: {n.replace("block_sparse_moe", "feed_forward"): v for n, v in t.items()},
    )
    with pytest.raises(PatchError, match=r"does not have: model\.layers\.0\.feed_forward\.experts\.0\.w1\.weight"):
        plan_patches([read_patch(lora)], model)


def test_parameters_that_the_class_does_not_have(tmp_path: Path) -> None:
    lora = save_stack_lora(make_experts("mixtral", 0), tmp_path / "lora", target_modules=[])
    edit_tensors(lora / "adapter_model.safetensors", lambda t: {n.replace("mlp", "ffn"): v for n, v in t.items()})
    edit_json(lora / "adapter_config.json", target_parameters=["ffn.experts.gate_up_proj", "ffn.experts.down_proj"])
    model = save_experts(make_experts("mixtral", 1), tmp_path / "model")
    with pytest.raises(PatchError, match=r"holds 2 LoRAs of parameters in .*ffn\.experts, and .* has 0 of ffn"):
        plan_patches([read_patch(lora)], model)


def test_two_patches_that_write_one_tensor(tmp_path: Path) -> None:
    model = save_experts(make_experts("qwen3_moe", 1), tmp_path / "model", as_loaded=True)
    old = make_experts("qwen3_moe", 0)
    patches = [
        save_lora_of(old, tmp_path / str(number), target_modules=["o_proj"], modules_to_save=["mlp.gate"])
        for number in range(2)
    ]
    with pytest.raises(
        PatchError, match=r"0 replaces model\.layers\.0\.mlp\.gate\.weight, which another patch changes too"
    ):
        plan_patches([read_patch(patch) for patch in patches], model)


def test_patterns_that_match_nothing_are_warned_of(tmp_path: Path) -> None:
    model = save_experts(make_experts("qwen3_moe", 1), tmp_path / "model")
    lora = save_stack_lora(make_experts("qwen3_moe", 0), tmp_path / "lora")
    patterns = {"rank_pattern": {"expert.down_proj": 2}, "alpha_pattern": {"o_prj": 5, "o_proj": 3, "xyz": 1}}
    edit_json(lora / "adapter_config.json", **patterns)
    lines = plan_patches([read_patch(lora)], model).warnings
    assert len(lines) == 3
    assert (
        "'expert.down_proj' in rank_pattern matches no LoRA, so that it changes nothing; the nearest names are"
        in lines[0]
    )
    assert "down_proj" in lines[0].partition("nearest")[2]
    assert lines[1].endswith(
        "'o_prj' in alpha_pattern matches no LoRA, so that it changes nothing; the nearest names are o_proj, down_proj"
    )
    assert lines[2].endswith("'xyz' in alpha_pattern matches no LoRA, so that it changes nothing")
