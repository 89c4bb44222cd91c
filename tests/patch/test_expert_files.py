"""LoRAs of experts on quantised files, on turned stacks, in models of images, in memory; and their measures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.expert_cases import (
    EXPERTS,
    loaded_weights,
    make_experts,
    merged_by_peft,
    save_experts,
    save_old_lora,
    save_stack_lora,
)
from helpers.patch_cases import edit_json, edit_tensors, weights
from helpers.quantized_models import mxfp4_values, quantize_folder, quantize_mxfp4, values_of
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from ensembler.adapters import check_adapter
from ensembler.errors import PatchError
from ensembler.patch.addition import merge_adapter
from ensembler.patch.apply import apply_patches
from ensembler.patch.extract import extract_patch
from ensembler.patch.formats import read_patch
from ensembler.patch.geometry import inspect_patch


def test_mxfp4_experts(tmp_path: Path) -> None:
    """gpt-oss: stacks of (in, out) when loaded, and of (out, in) in MXFP4; the loss is that of the scheme alone."""
    small = make_experts("gpt_oss", 1, hidden_size=32, intermediate_size=32, head_dim=16)
    lora = save_stack_lora(
        make_experts("gpt_oss", 0, hidden_size=32, intermediate_size=32, head_dim=16), tmp_path / "lora"
    )
    plain = save_experts(small, tmp_path / "plain")
    tensors: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for name, tensor in weights(plain).items():
        if tensor.dim() != 3:
            tensors[name] = tensor
            continue
        blocks, scales = quantize_mxfp4(tensor)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        values[name] = mxfp4_values(blocks, scales).contiguous()
    model = tmp_path / "model"
    save_experts(small, model)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    edit_json(
        model / "config.json", quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    )
    applied = apply_patches([read_patch(lora)], model, tmp_path / "out")
    save_file({**weights(plain), **values}, plain / "model.safetensors", metadata={"format": "pt"})
    expected, found = merged_by_peft(plain, lora), weights(tmp_path / "out")
    for name, before in values.items():
        after = mxfp4_values(found[f"{name}_blocks"], found[f"{name}_scales"]).double()
        delta = expected[name] - before.double()
        lost = (after - expected[name]).norm() / delta.norm()
        assert applied.losses[name] == pytest.approx(float(lost), rel=1e-4)
        assert lost < 0.5
    kept = apply_patches([read_patch(lora)], model, tmp_path / "kept", keep_bf16=["experts.*"])
    assert len(kept.kept) == 4
    for name in values:
        torch.testing.assert_close(weights(tmp_path / "kept")[name].double(), expected[name], rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("kind", ["fp8-whole", "int4-rows", "gptq"])
@pytest.mark.parametrize("form", ["single", "stacks"])
def test_quantised_experts(kind: str, form: str, tmp_path: Path) -> None:
    """Single experts in FP8, INT4, and INT4 that lies as (in, out): the loss is that of the scheme alone."""
    size = {"hidden_size": 32, "moe_intermediate_size": 64, "head_dim": 16}
    plain = save_experts(make_experts("qwen3_moe", 1, **size), tmp_path / "plain")
    model = quantize_folder(plain, tmp_path / "model", kind)
    if form == "stacks":
        lora = save_stack_lora(make_experts("qwen3_moe", 0, **size), tmp_path / "lora")
    else:
        lora = save_old_lora("qwen3_moe", tmp_path / "lora", size=(32, 64))
    applied = apply_patches([read_patch(lora)], model, tmp_path / "out")
    base, merged = loaded_weights(plain), merged_by_peft(plain, lora)
    before, after = weights(model), weights(tmp_path / "out")
    modules = {name.removesuffix(".weight") for name in weights(plain) if ".experts." in name}
    assert modules == {name for name in applied.losses if ".experts." in name}
    assert len(modules) == 2 * 3 * EXPERTS
    for module in modules:
        parent, expert, name = module.rsplit(".", 2)
        stack = f"{parent}.{'down_proj' if name == 'down_proj' else 'gate_up_proj'}"
        delta = (merged[stack] - base[stack].double())[int(expert)]
        rows = {"gate_proj": slice(0, 64), "up_proj": slice(64, None), "down_proj": slice(None)}[name]
        exact = values_of(before, kind, module).double() + delta[rows]
        lost = (values_of(after, kind, module).double() - exact).norm() / delta[rows].norm()
        assert applied.losses[module] == pytest.approx(float(lost), rel=1e-3), module
        assert lost < 0.3, module


def test_experts_that_a_member_has_are_merged_when_it_is_loaded(tmp_path: Path) -> None:
    """`merge_adapter` gives the values of `patch apply`, for LoRAs of stacks and of single experts."""
    model = save_experts(make_experts("mixtral", 1), tmp_path / "model")
    old, new = save_old_lora("mixtral", tmp_path / "old"), save_stack_lora(make_experts("mixtral", 0), tmp_path / "new")
    config = AutoConfig.from_pretrained(model)
    checked = check_adapter("target_pt", str(new), str(model), config)
    for adapter in (checked, replace(checked, folder=old, patch=read_patch(old))):
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        merged = merge_adapter(base, adapter).state_dict()
        apply_patches([read_patch(adapter.folder)], model, tmp_path / f"out-{adapter.folder.name}")
        for name, tensor in loaded_weights(tmp_path / f"out-{adapter.folder.name}").items():
            assert torch.equal(merged[name], tensor), name


def test_stacks_that_files_keep_the_other_way_round(tmp_path: Path) -> None:
    """Qwen3-VL: files of old have (in, out), and are turned when they are loaded."""
    model = make_pictured(1)
    model.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "turned")

    def turn(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: v.mT.contiguous() if ".experts." in name else v for name, v in tensors.items()}

    edit_tensors(tmp_path / "turned" / "model.safetensors", turn)
    lora = save_stack_lora(
        make_pictured(0), tmp_path / "lora", target_modules=r".*language_model.*o_proj", task_type=None
    )
    for name in ("model", "turned"):
        apply_patches([read_patch(lora)], tmp_path / name, tmp_path / f"out-{name}")
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "turned", dtype=torch.float64)
    expected = PeftModel.from_pretrained(base, lora).double().merge_and_unload().state_dict()
    for name in ("model", "turned"):
        found = AutoModelForImageTextToText.from_pretrained(tmp_path / f"out-{name}").state_dict()
        for weight, values in found.items():
            torch.testing.assert_close(values.double(), expected[weight], atol=1e-6, rtol=1e-6, msg=weight)
    assert_same_files(turn(weights(tmp_path / "out-model")), weights(tmp_path / "out-turned"))


def assert_same_files(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, values in found.items():
        torch.testing.assert_close(values, expected[name], atol=1e-6, rtol=1e-6, msg=name)


def make_pictured(seed: int) -> PreTrainedModel:
    text = {
        **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "num_experts_per_tok"), 2),
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "moe_intermediate_size": 24,
        "head_dim": 8,
        "num_experts": EXPERTS,
        "pad_token_id": 0,
        "initializer_range": 0.3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    }
    eye = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": 14,
        "out_hidden_size": 16,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    torch.manual_seed(seed)
    config = AutoConfig.for_model("qwen3_vl_moe", text_config=text, vision_config=eye)
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config).eval()
    return model


def test_experts_of_a_text_model_inside_one_of_images(tmp_path: Path) -> None:
    """Llama 4 has a text model with a head of its own inside; LoRAs of both kinds of model fit both."""
    text, whole = make_experts("llama4_text", 1), make_llama4(1)
    whole.language_model.load_state_dict(text.state_dict())
    save_experts(text, tmp_path / "text")
    whole.save_pretrained(tmp_path / "whole")
    common = {"task_type": None, "save": {"save_embedding_layers": False}}
    targets = ["o_proj", "lm_head"]
    inner = save_stack_lora(make_experts("llama4_text", 0), tmp_path / "inner", target_modules=targets, **common)
    regex = r"language_model\.(.*\.o_proj|lm_head)"
    outer = save_stack_lora(make_llama4(0), tmp_path / "outer", target_modules=regex, **common)
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole", dtype=torch.float64)
    merged = PeftModel.from_pretrained(base, outer).double().merge_and_unload().language_model.state_dict()
    for lora, expected in ((inner, merged_by_peft(tmp_path / "text", inner)), (outer, merged)):
        for model, auto in (("text", AutoModelForCausalLM), ("whole", AutoModelForImageTextToText)):
            apply_patches([read_patch(lora)], tmp_path / model, tmp_path / f"{model}-{lora.name}")
            found = auto.from_pretrained(tmp_path / f"{model}-{lora.name}")
            for name, values in getattr(found, "language_model", found).state_dict().items():
                torch.testing.assert_close(values.double(), expected[name], atol=1e-6, rtol=1e-6, msg=name)


def make_llama4(seed: int) -> PreTrainedModel:
    text = make_experts("llama4_text", seed).config.to_dict()
    eye = {
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "pixel_shuffle_ratio": 0.5,
        "vision_output_dim": 16,
        "projector_input_dim": 16,
        "projector_output_dim": 16,
    }
    tokens = {"boi_token_index": 5, "eoi_token_index": 6, "image_token_index": 7}
    torch.manual_seed(seed)
    config = AutoConfig.for_model("llama4", text_config=text, vision_config=eye, **tokens)
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config).eval()
    return model


def test_inspect_measures_experts(tmp_path: Path) -> None:
    """Alone, on files of single experts and on stacks: one patch, so one norm of all together."""
    loras = (save_old_lora("mixtral", tmp_path / "old"), save_stack_lora(make_experts("mixtral", 0), tmp_path / "new"))
    models = [
        save_experts(make_experts("mixtral", 1), tmp_path / str(number), as_loaded=bool(number)) for number in (0, 1)
    ]
    before = loaded_weights(models[0])
    for lora in loras:
        merged = merged_by_peft(models[0], lora)
        norm = sum(float((merged[name] - before[name].double()).norm()) ** 2 for name in before) ** 0.5
        reports = [inspect_patch(read_patch(lora)), *(inspect_patch(read_patch(lora), model=one) for one in models)]
        reports.append(inspect_patch(read_patch(lora), model=models[1], base=models[1]))
        for report in reports:
            assert report.overall()["patch_frobenius"] == pytest.approx(norm, rel=1e-5)
        assert reports[-1].overall()["update_frobenius"] == 0
        with pytest.raises(PatchError, match=r"0 does not keep .*experts.* in one tensor as the model does"):
            inspect_patch(read_patch(lora), model=models[1], base=models[0])
    with pytest.raises(PatchError, match="change different tensors"):
        inspect_patch(read_patch(loras[0]), model=models[1], other=read_patch(loras[1]))


def test_what_extract_makes_of_single_experts_fits_stacks(tmp_path: Path) -> None:
    old, new = (save_experts(make_experts("mixtral", seed), tmp_path / str(seed)) for seed in (1, 2))
    extract_patch(old, new, tmp_path / "patch", rank=16)
    stacks = save_experts(make_experts("mixtral", 1), tmp_path / "stacks", as_loaded=True)
    apply_patches([read_patch(tmp_path / "patch")], stacks, tmp_path / "out")
    expected = loaded_weights(new)
    for name, values in loaded_weights(tmp_path / "out").items():
        torch.testing.assert_close(values, expected[name], atol=1e-5, rtol=1e-5, msg=name)
