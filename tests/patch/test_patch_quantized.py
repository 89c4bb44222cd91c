"""Patches on quantised models: dequantise, add, quantise again, against the same in fp64; what is kept in bfloat16."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from helpers.patch_cases import save_lora, save_model
from helpers.quantized_models import (
    CHANGED,
    KINDS,
    LAYERS,
    SIZE,
    bits,
    parts_of,
    peft_deltas,
    quantize_folder,
    read_tensors,
    save_tensors,
    values_of,
)
from torch import Tensor

from ensembler.patch.apply import apply_patches
from ensembler.patch.extract import extract_patch
from ensembler.patch.formats import read_patch
from ensembler.patch.patch_plan import PatchPlan, plan_patches
from ensembler.patch.requantize import kept_weights
from ensembler.patch.schemes.quantization_settings import leave_alone
from ensembler.patch.verify import verify_applied
from ensembler.safetensors_files import read_model

SCALE = 0.05
ONE_EACH = ("fp8-blocks", "fp8-whole", "int4-rows", "gptq", "awq", "nf4-double")


@pytest.fixture(scope="module")
def deltas(plain: Path, lora: Path) -> dict[str, Tensor]:
    return peft_deltas(plain, lora)


def decoded(tensors: dict[str, Tensor], kind: str, module: str) -> Tensor:
    return values_of(tensors, kind, module).double()


def check_requantized(
    before: dict[str, Tensor], after: dict[str, Tensor], kind: str, module: str, exact: Tensor
) -> None:
    """Check that a module on disk is `exact` (out, in) quantised: fp32 may decide a tie of fp64 otherwise, no more."""
    scheme, parts = parts_of(before, kind, module)
    values = (exact.T if scheme.is_transposed else exact).float().contiguous()
    wanted = scheme.dequantize({**parts, **scheme.quantize(values.clone(), parts, float(values.abs().max()))}).double()
    wanted = wanted.T if scheme.is_transposed else wanted
    found = decoded(after, kind, module)
    differ = (found - wanted).abs() > 1e-6 * wanted.abs()
    assert differ.double().mean() <= 2e-3, module
    slack = 1e-5 * exact.abs().max()
    assert ((found - exact).abs()[differ] <= (wanted - exact).abs()[differ] + slack).all(), module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_result_is_the_sum_quantised_again(
    kind: str, dtype: torch.dtype, plain: Path, lora: Path, deltas: dict[str, Tensor], tmp_path: Path
) -> None:
    model = quantize_folder(plain, tmp_path / "model", kind, dtype=dtype)
    applied = apply_patches([read_patch(lora, scale=SCALE)], model, tmp_path / "out")
    before, after = read_tensors(model), read_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert applied.losses.keys() == set(CHANGED)
    for module in CHANGED:
        delta = SCALE * deltas[f"{module}.weight"]
        exact = decoded(before, kind, module) + delta
        check_requantized(before, after, kind, module, exact)
        lost = (decoded(after, kind, module) - exact).norm() / delta.norm()
        assert applied.losses[module] == pytest.approx(float(lost), rel=1e-3), module
    head = before["lm_head.weight"].double() + SCALE * deltas["lm_head.weight"]
    assert after["lm_head.weight"].dtype == dtype
    assert ((after["lm_head.weight"] - head).abs() <= torch.finfo(dtype).eps * head.abs() + 1e-7).all()
    for name, tensor in after.items():
        assert (tensor.dtype, tensor.shape) == (before[name].dtype, before[name].shape)
        if name != "lm_head.weight" and not name.startswith(tuple(f"{module}." for module in CHANGED)):
            assert torch.equal(bits(tensor), bits(before[name])), name
    assert (tmp_path / "out" / "config.json").read_text() == (model / "config.json").read_text()


@pytest.mark.parametrize("kind", ["fp8-blocks", "int4-rows-zeros", "gptq", "nf4-double"])
def test_parts_of_a_weight_in_several_files(kind: str, plain: Path, lora: Path, tmp_path: Path) -> None:
    one = quantize_folder(plain, tmp_path / "one", kind)
    several = quantize_folder(plain, tmp_path / "several", kind, num_files=3)
    for model in (one, several):
        apply_patches([read_patch(lora, scale=SCALE)], model, tmp_path / f"{model.name}-out")
    wanted, found = read_tensors(tmp_path / "one-out"), read_tensors(tmp_path / "several-out")
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        assert torch.equal(bits(tensor), bits(found[name])), name
    assert len(list((tmp_path / "several-out").glob("*.safetensors"))) == 3


@pytest.mark.parametrize("kind", ONE_EACH)
def test_several_patches_with_full_deltas_and_new_values(kind: str, plain: Path, lora: Path, tmp_path: Path) -> None:
    """A LoRA, a full delta of every weight, and a patch that replaces one: each arrives, at its strength."""
    model = quantize_folder(plain, tmp_path / "model", kind)
    tuned = save_model(tmp_path / "tuned", seed=2, **SIZE)
    extract_patch(plain, tuned, tmp_path / "full", full=True)
    patches = [read_patch(lora, scale=SCALE), read_patch(tmp_path / "full", scale=0.1)]
    apply_patches(patches, model, tmp_path / "out")
    before, after = read_tensors(model), read_tensors(tmp_path / "out")
    first, second, added = read_tensors(plain), read_tensors(tuned), peft_deltas(plain, lora)
    for module in [*CHANGED, f"{LAYERS[1]}mlp.up_proj"]:
        name = f"{module}.weight"
        delta = SCALE * added[name] + 0.1 * (second[name].double() - first[name].double())
        check_requantized(before, after, kind, module, decoded(before, kind, module) + delta)

    whole = save_lora(tmp_path / "whole", size=SIZE, target_modules=["q_proj"], modules_to_save=["down_proj"])
    new = read_tensors(whole)
    apply_patches([read_patch(whole)], model, tmp_path / "replaced")
    after = read_tensors(tmp_path / "replaced")
    for layer in LAYERS:
        module = f"{layer}mlp.down_proj"
        check_requantized(before, after, kind, module, new[f"base_model.model.{module}.weight"].double())


@pytest.mark.parametrize(("config", "option"), [("float16", None), ("float32", "float16"), ("bfloat16", "float32")])
def test_kept_modules_have_the_dtype_that_the_model_is_loaded_in(
    config: str, option: str | None, plain: Path, lora: Path, tmp_path: Path
) -> None:
    """transformers does not cast them with the rest."""
    model = quantize_folder(plain, tmp_path / "model", "gptq", dtype=getattr(torch, config))
    apply_patches([read_patch(lora, scale=SCALE)], model, tmp_path / "out", keep_bf16=["down_proj"], dtype=option)
    after = read_tensors(tmp_path / "out")
    dtype = getattr(torch, option or config)
    assert after[f"{LAYERS[0]}mlp.down_proj.weight"].dtype == after["lm_head.weight"].dtype == dtype


@pytest.mark.parametrize("kind", ["fp8-blocks", "fp8-rows", "int4-rows", "gptq", "nf4-double"])
def test_another_dtype_leaves_schemes_alone(kind: str, plain: Path, lora: Path, tmp_path: Path) -> None:
    model = quantize_folder(plain, tmp_path / "model", kind)
    static = {f"{LAYERS[0]}self_attn.q_proj.input_scale": torch.tensor([0.123456789])}  # as for static activations
    save_tensors({**read_tensors(model), **static}, model)
    for name, dtype in (("same", None), ("cast", "float16")):
        apply_patches([read_patch(lora, scale=SCALE)], model, tmp_path / name, dtype=dtype)
    same, cast = read_tensors(tmp_path / "same"), read_tensors(tmp_path / "cast")
    for name, tensor in same.items():
        is_plain = not re.search(r"_proj\.", name)
        assert cast[name].dtype == (torch.float16 if is_plain else tensor.dtype), name
        if not is_plain:
            assert torch.equal(bits(cast[name]), bits(tensor)), name


@pytest.mark.parametrize("kind", KINDS)
def test_modules_that_stay_in_bfloat16(
    kind: str, plain: Path, lora: Path, deltas: dict[str, Tensor], tmp_path: Path
) -> None:
    model = quantize_folder(plain, tmp_path / "model", kind)
    patch = read_patch(lora, scale=SCALE)
    patterns = ["layers.0.mlp.down_proj", "model.layers.1.*.q_proj"]
    applied = apply_patches([patch], model, tmp_path / "out", keep_bf16=patterns)
    apply_patches([patch], model, tmp_path / "same")
    alone = {f"{LAYERS[0]}mlp.down_proj", *(f"{LAYERS[1]}self_attn.{one}_proj" for one in "qkv")}
    assert set(applied.kept) == alone  # q, k and v run as one, so they are kept together
    before, after, same = (read_tensors(folder) for folder in (model, tmp_path / "out", tmp_path / "same"))
    for module in alone:
        weight = after.pop(f"{module}.weight")
        exact = decoded(before, kind, module) + SCALE * deltas[f"{module}.weight"]
        assert weight.dtype == torch.bfloat16
        assert (weight != exact.bfloat16()).double().mean() <= 1e-2, module
        assert ((weight - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all(), module
        for name in [name for name in same if name.startswith(f"{module}.")]:
            del same[name]
    assert after.keys() == same.keys()
    for name, tensor in same.items():
        assert torch.equal(bits(after[name]), bits(tensor)), name
    assert applied.num_bytes == read_model(tmp_path / "out").num_bytes
    assert set(applied.losses) == set(CHANGED) - alone


def test_modules_that_stay_in_bfloat16_have_no_scales_of_inputs(plain: Path, lora: Path, tmp_path: Path) -> None:
    """Servers know no tensors of static activations in a plain layer; those of keys and values are another matter."""
    model = quantize_folder(plain, tmp_path / "model", "fp8-rows")
    modules = [f"{LAYERS[0]}self_attn.q_proj", f"{LAYERS[0]}mlp.down_proj"]
    scales = {f"{module}.input_scale": torch.tensor([0.1]) for module in modules}
    scales |= {f"{LAYERS[0]}self_attn.k_proj.output_scale": torch.tensor([0.2])}
    save_tensors({**read_tensors(model), **scales}, model)
    patch = read_patch(lora, scale=SCALE)
    apply_patches([patch], model, tmp_path / "out", keep_bf16=["layers.0.self_attn.q_proj"])
    kept = [name for name in read_tensors(tmp_path / "out") if name in scales]
    assert sorted(kept) == [f"{LAYERS[0]}mlp.down_proj.input_scale", f"{LAYERS[0]}self_attn.k_proj.output_scale"]
    verify_applied(plan_patches([patch], model), tmp_path / "out")


def test_kept_modules_are_ignored_by_name(plain: Path, lora: Path, tmp_path: Path) -> None:
    """List what the method left alone by itself, too, if its list was empty: it no longer does."""
    kept = f"{LAYERS[0]}mlp.down_proj"
    for kind in ONE_EACH:
        model = quantize_folder(plain, tmp_path / kind, kind)
        out = tmp_path / f"{kind}-out"
        apply_patches([read_patch(lora, scale=SCALE)], model, out, keep_bf16=["layers.0.mlp.down_proj"])
        old, new = (json.loads((folder / "config.json").read_text()) for folder in (model, out))
        settings, before = new.pop("quantization_config"), old.pop("quantization_config")
        assert new == old
        key = {"compressed-tensors": "ignore", "bitsandbytes": "llm_int8_skip_modules", "gptq": "dynamic"}.get(
            settings["quant_method"], "modules_to_not_convert"
        )
        ignored = settings.pop(key)
        if key == "dynamic":
            assert ignored == {r"-:^model\.layers\.0\.mlp\.down_proj$": {}}
        else:
            assert ignored == [*(before.get(key) or ["lm_head", "model.embed_tokens"]), kept]
        before.pop(key, None)
        assert settings == before


def test_rules_of_gptq_name_what_servers_fuse(plain: Path, lora: Path, tmp_path: Path) -> None:
    model = quantize_folder(plain, tmp_path / "model", "gptq")
    apply_patches([read_patch(lora, scale=SCALE)], model, tmp_path / "out", keep_bf16=["layers.0.self_attn.q_proj"])
    rules = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["dynamic"]
    names = [f"model.layers.0.self_attn.{one}_proj" for one in ("q", "k", "v", "qkv")]
    for name in names:
        assert any(re.match(rule.removeprefix("-:"), name) for rule in rules), name
    assert not any(re.match(rule.removeprefix("-:"), "model.layers.0.self_attn.o_proj") for rule in rules)


def test_kept_modules_in_several_files(plain: Path, lora: Path, tmp_path: Path) -> None:
    model = quantize_folder(plain, tmp_path / "model", "nf4-double", num_files=3)
    applied = apply_patches([read_patch(lora, scale=SCALE)], model, tmp_path / "out", keep_bf16=["down_proj"])
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found = read_model(tmp_path / "out")
    assert index["weight_map"] == {name: tensor.file.name for name, tensor in found.tensors.items()}
    assert index["metadata"]["total_size"] == applied.num_bytes == found.num_bytes


def test_experts_of_a_layer_are_kept_together() -> None:
    """Servers run all experts of a layer as one; shared experts stand apart."""
    layers = [f"model.layers.{layer}.mlp" for layer in range(2)]
    modules = [f"experts.{expert}.{one}_proj" for expert in range(2) for one in ("gate", "up", "down")]
    names = [f"{layer}.{module}.weight" for layer in layers for module in [*modules, "shared_experts.down_proj"]]
    plan = cast(PatchPlan, SimpleNamespace(names=names, quantized=dict.fromkeys(names)))
    assert kept_weights(plan, ["layers.1.mlp.experts.0.up_proj"]) == names[7:13]
    assert kept_weights(plan, ["layers.0.*.shared_experts.*"]) == names[6:7]
    assert kept_weights(plan, ["experts.1.down_proj"]) == [*names[:6], *names[7:13]]
    settings = {"quant_method": "fp8", "ignored_layers": ["lm_head"], "modules_to_not_convert": ["lm_head"]}
    leave_alone(settings, [name.removesuffix(".weight") for name in names[:6]], [])
    expected = ["lm_head", f"{layers[0]}.experts", *sorted(name.removesuffix(".weight") for name in names[:6])]
    assert settings["ignored_layers"] == settings["modules_to_not_convert"] == expected
