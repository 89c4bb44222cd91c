"""Split projections on models that keep them in one matrix, and the reverse; text models alone and inside others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.patch_cases import (
    edit_json,
    edit_tensors,
    make_multimodal,
    peft_merged,
    save_lora_of,
    weights,
)
from helpers.quantized_models import quantize_folder, values_of
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    MllamaForCausalLM,
    PreTrainedModel,
)

from ensembler.errors import PatchError
from ensembler.patch.apply import apply_patches
from ensembler.patch.formats import read_patch
from ensembler.patch.patch_plan import plan_patches

HEADS, GROUPS, WIDTH, HIDDEN, INNER = 4, 2, 8, 32, 64
SIZE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": WIDTH,
    "max_position_embeddings": 64,
    "original_max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
}
PACKED = {
    "self_attn.qkv_proj": {"q_proj": HEADS * WIDTH, "k_proj": GROUPS * WIDTH, "v_proj": GROUPS * WIDTH},
    "mlp.gate_up_proj": {"gate_proj": INNER, "up_proj": INNER},
}


def make(kind: str, seed: int, **more: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZE, **more})).eval()
    return model


def split(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a Phi-3 model as those of a Llama."""
    found = {}
    for name, tensor in tensors.items():
        packed = next((each for each in PACKED if each in name), None)
        if packed is None:
            found[name] = tensor
            continue
        parent = packed.split(".")[0]
        for module, rows in zip(PACKED[packed], tensor.split(list(PACKED[packed].values())), strict=True):
            found[name.replace(packed, f"{parent}.{module}")] = rows.clone()
    return found


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A Phi-3 model, and a Llama that is the same function."""
    phi, llama = make("phi3", 1), make("llama", 2)
    llama.load_state_dict(split(dict(phi.state_dict())))
    ids = torch.tensor([[3, 5, 8, 13]])
    assert_close(phi(ids).logits, llama(ids).logits, atol=1e-5, rtol=1e-5)
    phi.save_pretrained(tmp_path / "phi")
    llama.save_pretrained(tmp_path / "llama")
    return tmp_path / "phi", tmp_path / "llama"


def applied(lora: Path, model: Path, **options: Any) -> dict[str, Tensor]:
    """Return the weights after `patch apply`, from files that load and generate."""
    out = model.parent / f"{model.name}-{lora.name}"
    apply_patches([read_patch(lora, **options)], model, out)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False).shape[1] >= 3
    return weights(out)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert_close(tensor, expected[name], atol=1e-6, rtol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    "targets", [["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], ["qkv_proj"], ["gate_up_proj"]], ids=len
)
def test_a_lora_of_phi_on_split_projections(targets: list[str], pair: tuple[Path, Path], tmp_path: Path) -> None:
    phi, llama = pair
    lora = save_lora_of(make("phi3", 0), tmp_path / "lora", target_modules=targets)
    assert_same(applied(lora, llama), split(peft_merged(phi, lora)))
    (note,) = plan_patches([read_patch(lora)], llama).notes
    modules = ("q_proj", "k_proj", "v_proj") if "qkv_proj" in targets else ("gate_proj", "up_proj")
    assert all(f".{module}.weight" in note for module in modules) or len(targets) > 1


@pytest.mark.parametrize(
    "targets",
    [["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], ["q_proj", "v_proj"], ["up_proj"]],
    ids=len,
)
def test_a_lora_of_split_projections_on_phi(targets: list[str], pair: tuple[Path, Path], tmp_path: Path) -> None:
    phi, llama = pair
    ranks = {"v_proj": 2} if "v_proj" in targets else {}
    lora = save_lora_of(make("llama", 0), tmp_path / "lora", target_modules=targets, rank_pattern=ranks)
    assert_same(split(applied(lora, phi)), peft_merged(llama, lora))


@pytest.mark.parametrize("kind", ["fp8-whole", "int4-rows", "gptq"])
def test_rows_of_a_quantised_matrix(kind: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Rows of a weight are columns where its scheme keeps it as (in, out); others stay as they were, codes and all."""
    phi, llama = pair
    model = quantize_folder(phi, tmp_path / "model", kind)
    lora = save_lora_of(make("llama", 0), tmp_path / "lora", target_modules=["k_proj"])
    applied = apply_patches([read_patch(lora)], model, tmp_path / "out")
    merged, base = peft_merged(llama, lora), weights(llama)
    before, after = weights(model), weights(tmp_path / "out")
    for layer in range(2):
        module, start = f"model.layers.{layer}.self_attn.qkv_proj", HEADS * WIDTH
        name = f"model.layers.{layer}.self_attn.k_proj.weight"
        exact = values_of(before, kind, module).double()
        exact[start : start + GROUPS * WIDTH] += merged[name].double() - base[name]
        found = values_of(after, kind, module).double()
        lost = (found - exact).norm() / (merged[name] - base[name]).norm()
        assert applied.losses[module] == pytest.approx(float(lost), rel=1e-3)
        assert lost < 0.3


def test_rows_of_other_sizes_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Without grouped heads k has as many rows as q."""
    phi, llama = pair
    lora = save_lora_of(make("llama", 0, num_key_value_heads=HEADS), tmp_path / "split", target_modules=["k_proj"])
    with pytest.raises(
        PatchError,
        match=r"k_proj\.weight, which has shape \(32, 32\), and its rows in .*qkv_proj\.weight have \(16, 32\)",
    ):
        plan_patches([read_patch(lora)], phi)
    lora = save_lora_of(make("phi3", 0, num_key_value_heads=HEADS), tmp_path / "one", target_modules=["qkv_proj"])
    with pytest.raises(
        PatchError, match=r"qkv_proj\.weight, which has shape \(96, 32\), and .*v_proj\.weight have \(64, 32\) together"
    ):
        plan_patches([read_patch(lora)], llama)


def test_an_order_of_rows_that_is_not_known(tmp_path: Path) -> None:
    """CodeGen's qkv_proj has its rows in another order."""
    size = {"n_embd": 16, "n_layer": 1, "n_head": 4, "vocab_size": 64, "n_positions": 64, "rotary_dim": 4}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("codegen", **size))
    model.save_pretrained(tmp_path / "model")
    lora = save_lora_of(model, tmp_path / "lora", target_modules=["qkv_proj"])
    edit_json(lora / "adapter_config.json", target_modules=["q_proj"])

    def first_rows(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name.replace("qkv_proj", "q_proj"): tensor[:16] for name, tensor in tensors.items()}

    edit_tensors(lora / "adapter_model.safetensors", first_rows)
    with pytest.raises(
        PatchError,
        match=r"which may be in .*qkv_proj.weight, whose order of rows in a model of type 'codegen' is not known in",
    ):
        plan_patches([read_patch(lora)], tmp_path / "model")


def test_both_names_of_a_row_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    phi, _ = pair
    one = save_lora_of(make("phi3", 0), tmp_path / "one", target_modules=["qkv_proj"])
    lora = save_lora_of(make("llama", 0), tmp_path / "lora", target_modules=["q_proj"])
    save_file({**weights(one), **weights(lora)}, lora / "adapter_model.safetensors")
    with pytest.raises(
        PatchError, match=r"holds .*q_proj\.weight and .*qkv_proj\.weight, and both change .*qkv_proj\.weight in"
    ):
        plan_patches([read_patch(lora)], phi)


TEXT = {"gemma3": "gemma3_text", "llava": "llama", "mistral3": "mistral", "qwen2_5_vl": "qwen2", "paligemma": "gemma"}
MLLAMA: dict[str, Any] = {
    "text_config": {
        **{key: SIZE[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")},
        "num_key_value_heads": GROUPS,
        "num_hidden_layers": 2,
        "cross_attention_layers": [1],
        "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "vision_output_dim": 32,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1]],
    },
}


def text_alone(kind: str, whole: PreTrainedModel) -> PreTrainedModel:
    """Return the text model of a model of images and text as a model of its own, with its weights."""
    if kind == "mllama":
        text = MllamaForCausalLM(whole.config.text_config).eval()
    else:
        settings = {**whole.config.text_config.to_dict(), "model_type": TEXT[kind], "tie_word_embeddings": False}
        settings.pop("architectures", None)
        settings.pop("layer_types", None)
        text = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).eval()
    text.model.load_state_dict(whole.model.language_model.state_dict(), strict=False)
    model: PreTrainedModel = text
    return model


def make_whole(kind: str, seed: int) -> PreTrainedModel:
    if kind != "mllama":
        return make_multimodal(kind, seed)
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **MLLAMA)).eval()
    return model


@pytest.mark.parametrize("kind", [*TEXT, "mllama"])
def test_a_lora_of_a_text_model_on_one_of_images_and_back(kind: str, tmp_path: Path) -> None:
    """The same text model alone and inside; PEFT merges into each under its own names."""
    whole = make_whole(kind, 1)
    whole.save_pretrained(tmp_path / "whole")
    text_alone(kind, whole).save_pretrained(tmp_path / "text")
    old = make_whole(kind, 0)
    targets = ["q_proj", "down_proj"]
    inner = save_lora_of(text_alone(kind, old), tmp_path / "inner", target_modules=targets)
    outer = save_lora_of(old, tmp_path / "outer", target_modules=r".*language_model.*\.(q|down)_proj", task_type=None)
    names = {
        "inner": ("text", MllamaForCausalLM if kind == "mllama" else AutoModelForCausalLM),
        "outer": ("whole", AutoModelForImageTextToText),
    }
    for lora in (inner, outer):
        folder, auto = names[lora.name]
        own = peft_merged(tmp_path / folder, lora, auto)
        other = tmp_path / ("whole" if folder == "text" else "text")
        out = tmp_path / f"out-{lora.name}"
        apply_patches([read_patch(lora)], other, out)
        before, after = weights(other), weights(out)
        ending = {
            name.rpartition("layers.")[2]: tensor
            for name, tensor in own.items()
            if "vision" not in name and "visual" not in name
        }
        changed = [name for name in after if not torch.equal(before[name], after[name])]
        assert len(changed) == 4
        for name in changed:
            assert_close(after[name], ending[name.rpartition("layers.")[2]], atol=1e-6, rtol=1e-6)
        notes = plan_patches([read_patch(lora)], other).notes
        assert kind == "qwen2_5_vl" or "(4 names in all)" in notes[0]  # whose files have the names of the text model
