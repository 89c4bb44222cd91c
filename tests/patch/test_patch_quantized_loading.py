"""Patched models in FP8, bitsandbytes' 4 bits, compressed-tensors and MXFP4, as these libraries load them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.quantized_models import (
    CHANGED,
    KINDS,
    LAYERS,
    edit_config,
    mxfp4_values,
    peft_deltas,
    quantize_folder,
    quantize_mxfp4,
    read_tensors,
    save_tensors,
    values_of,
)
from helpers.tiny import random_ids
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ensembler.patch.apply import apply_patches
from ensembler.patch.extract import extract_patch
from ensembler.patch.formats import read_patch

SCALE = 0.05


@pytest.fixture(scope="module")
def deltas(plain: Path, lora: Path) -> dict[str, Tensor]:
    return peft_deltas(plain, lora)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=random_ids(2, 7)).logits
    return found.float()


def with_values(plain: Path, values: dict[str, Tensor]) -> Any:
    """Return the plain model with these weights."""
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    model.load_state_dict({**model.state_dict(), **{name: each.float() for name, each in values.items()}})
    return model


def loaded_values(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Return the weights of a quantised model as plain ones."""
    endings = tuple(KINDS[kind].names.values())
    modules = {name.removesuffix(ending) for name in tensors for ending in endings if name.endswith(ending)}
    plain = {name: each for name, each in tensors.items() if not re.search(r"_proj\.", name)}
    kept = {
        name: each for name, each in tensors.items() if each.dtype == torch.bfloat16 and name.endswith("proj.weight")
    }
    modules = {module for module in modules if module.endswith("_proj") and f"{module}.weight" not in kept}
    return {**plain, **kept, **{f"{module}.weight": values_of(tensors, kind, module) for module in modules}}


@pytest.mark.parametrize("keep", [(), ("down_proj",)], ids=len)
def test_fp8_loads_in_transformers(keep: tuple[str, ...], plain: Path, lora: Path, tmp_path: Path) -> None:
    """Without a GPU that turns it into bfloat16, which rounds."""
    pytest.importorskip("accelerate")
    model = quantize_folder(plain, tmp_path / "model", "fp8-blocks")
    apply_patches([read_patch(lora, scale=SCALE)], model, tmp_path / "out", keep_bf16=keep)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    found = loaded.state_dict()
    for name, value in loaded_values(read_tensors(tmp_path / "out"), "fp8-blocks").items():
        assert ((found[name].float() - value).abs() <= 2**-8 * value.abs()).all(), name
    assert loaded.generate(random_ids(1, 4), max_new_tokens=3, min_new_tokens=3).shape == (1, 7)


@pytest.mark.parametrize("keep", [(), ("down_proj",)], ids=len)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("has_second", [False, True])
def test_a_model_that_bitsandbytes_quantised(
    quant_type: str, has_second: bool, keep: tuple[str, ...], plain: Path, lora: Path, deltas: Any, tmp_path: Path
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=has_second,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(plain, quantization_config=settings, dtype=torch.float32)
    base.save_pretrained(tmp_path / "model")

    def values(model: Any, module: str) -> Tensor:
        weight = model.get_submodule(module).weight
        state = getattr(weight, "quant_state", None)
        found = weight if state is None else functional.dequantize_4bit(weight.data, state)
        return found.detach().double()

    applied = apply_patches([read_patch(lora, scale=SCALE)], tmp_path / "model", tmp_path / "out", keep_bf16=keep)
    result = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert len(applied.losses) == len(CHANGED) - 2 * len(keep)
    for module in CHANGED:
        old, delta = values(base, module), SCALE * deltas[f"{module}.weight"]
        error = (values(result, module) - (old + delta)).norm()
        if module in applied.losses:
            assert float(error / delta.norm()) == pytest.approx(applied.losses[module], rel=1e-3)
            assert applied.losses[module] < 1
        else:
            assert error <= 2**-8 * (old + delta).norm()
    unchanged = f"{LAYERS[0]}mlp.up_proj"
    assert torch.equal(values(result, unchanged), values(base, unchanged))
    assert result.generate(random_ids(1, 4), max_new_tokens=3, min_new_tokens=3).shape == (1, 7)


@pytest.mark.parametrize("kind", ["int4-rows", "int4-rows-zeros", "fp8-rows", "fp8-whole"])
def test_compressed_tensors_decodes_the_same_values(kind: str, plain: Path, lora: Path, tmp_path: Path) -> None:
    """The library itself, and the model that transformers loads with it."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import FloatQuantizationCompressor, PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    model = quantize_folder(plain, tmp_path / "model", kind)
    apply_patches([read_patch(lora, scale=SCALE)], model, tmp_path / "out", keep_bf16=["layers.0.mlp.down_proj"])
    tensors = read_tensors(tmp_path / "out")
    settings = KINDS[kind].settings["config_groups"]["group_0"]
    compressor = PackedQuantizationCompressor if kind.startswith("int4") else FloatQuantizationCompressor
    values = loaded_values(tensors, kind)
    for module in CHANGED:
        state = {
            name.removeprefix(f"{module}."): each for name, each in tensors.items() if name.startswith(f"{module}.")
        }
        if state.keys() != {"weight"}:
            found = compressor.decompress(state, QuantizationScheme(**settings))["weight"]
            value = values[f"{module}.weight"]
            assert ((found.float() - value).abs() <= torch.finfo(found.dtype).eps * value.abs()).all(), module
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    wanted = logits(with_values(plain, values))
    assert (logits(loaded) - wanted).abs().max() <= 2e-2 * wanted.abs().max()
    assert loaded.generate(random_ids(1, 4), max_new_tokens=3, min_new_tokens=3).shape == (1, 7)


def save_gpt_oss(folder: Path, seed: int) -> Path:
    """Save a tiny gpt-oss with plain experts."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "gpt_oss",
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        head_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        pad_token_id=3,
        eos_token_id=2,
        bos_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("keep", [(), ("layers.1.mlp.experts.gate_up_proj",)], ids=len)
def test_experts_in_mxfp4(keep: tuple[str, ...], tmp_path: Path) -> None:
    base, tuned = save_gpt_oss(tmp_path / "base", 1), save_gpt_oss(tmp_path / "tuned", 2)
    extract_patch(base, tuned, tmp_path / "patch", full=True)
    first, second = read_tensors(base), read_tensors(tuned)
    experts = [f"model.layers.{layer}.mlp.experts.{one}_proj" for layer in range(2) for one in ("gate_up", "down")]
    tensors = dict(first)
    for name in experts:
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = quantize_mxfp4(tensors.pop(name).float())
    save_tensors(tensors, base)
    edit_config(base, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens"]})
    applied = apply_patches([read_patch(tmp_path / "patch", scale=0.5)], base, tmp_path / "out", keep_bf16=keep)
    after = read_tensors(tmp_path / "out")
    kept = experts[2:] if keep else []
    assert sorted(applied.kept) == sorted(kept)
    wanted: dict[str, Tensor] = {}
    for name in experts:
        delta = 0.5 * (second[name].double() - first[name].double())
        exact = mxfp4_values(tensors[f"{name}_blocks"], tensors[f"{name}_scales"]).double() + delta
        if name in kept:
            wanted[name] = after[name]
            assert ((after[name] - exact).abs() <= 2**-8 * exact.abs() + 1e-7).all(), name
            continue
        wanted[name] = mxfp4_values(after[f"{name}_blocks"], after[f"{name}_scales"])
        error = (wanted[name] - exact).norm() / delta.norm()
        assert applied.losses[name] == pytest.approx(float(error), rel=1e-3)
        direct = mxfp4_values(*quantize_mxfp4(exact.float()))
        assert (wanted[name] - exact).norm() <= (direct - exact).norm() * (1 + 1e-6)  # or the old exponent, if nearer
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    for name, value in wanted.items():
        assert torch.equal(loaded.state_dict()[name].float(), value.float()), name
    assert loaded.generate(random_ids(1, 4), max_new_tokens=3, min_new_tokens=3).shape == (1, 7)
    if keep:
        settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        assert "model.layers.1.mlp.experts" in settings["modules_to_not_convert"]
        assert "model.layers.0.mlp.experts" not in settings["modules_to_not_convert"]
