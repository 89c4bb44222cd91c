"""Adding patches: against PEFT's merge and against float64, over families, dtypes, shards and LoRA settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.patch_cases import FAMILIES, edit_json, exact, peft_merged, save_lora, save_model, weights
from helpers.tiny import make_model, make_tokenizer, random_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ensembler.errors import OutputError, PatchError, RunError
from ensembler.patch.addition import WeightUpdate, load_update, patched, read_tensor
from ensembler.patch.apply import apply_patches
from ensembler.patch.extract import extract_patch
from ensembler.patch.formats import read_patch
from ensembler.patch.patch_plan import plan_patches


def apply(tmp_path: Path, model: Path, *patches: Path, scale: float = 1.0, **options: Any) -> Path:
    out = tmp_path / "out"
    apply_patches([read_patch(patch, scale=scale) for patch in patches], model, out, **options)
    return out


def same_bits(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first.view(torch.uint8), second.view(torch.uint8))


@pytest.mark.parametrize("shards", [False, True], ids=["one-file", "shards"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_equals_the_merge_of_peft(family: str, shards: bool, tmp_path: Path) -> None:
    model, lora = save_model(tmp_path / "model", family, 1, shards=shards), save_lora(tmp_path / "lora", family, 2)
    assert len(list(model.glob("*.safetensors"))) > 1 or not shards
    out = apply(tmp_path, model, lora)
    merged, found, before = peft_merged(model, lora), weights(out), weights(model)
    assert list(found) == list(before)
    for name, weight in found.items():
        assert (weight - merged[name]).abs().max() <= 1e-6, name
    assert sum(not same_bits(found[name], before[name]) for name in found) == len(weights(lora)) // 2
    ids = random_ids(2, 9)
    patched_model = AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        logits = patched_model(ids).logits
        reference = PeftModel.from_pretrained(make_model(family, 1), lora).eval()
        assert (logits - reference(ids).logits).abs().max() < 1e-3 * logits.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_one_rounding_from_float64_and_no_further_than_peft(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, lora = save_model(tmp_path / "model", family, 1, dtype=dtype), save_lora(tmp_path / "lora", family, 2)
    found, truth, merged = weights(apply(tmp_path, model, lora)), exact(model, lora), peft_merged(model, lora)
    for name, weight in found.items():
        assert weight.dtype == dtype
        error = (weight.double() - truth[name]).abs()
        spacing = truth[name].abs() * torch.finfo(dtype).eps + torch.finfo(dtype).smallest_normal
        assert (error <= spacing).all(), name
        slack = 1e-6 * truth[name].abs().max()  # fp32 arithmetic decides what lies between two values either way
        assert (error <= (merged[name].double() - truth[name]).abs() + slack).all(), name


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    rank=st.integers(1, 6),
    scale=st.floats(-4, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 10_000),
)
def test_any_rows_of_a_weight_are_the_rounded_sum(
    rows: int, columns: int, rank: int, scale: float, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    left, right = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    truth = weight.double() + scale * left.double() @ right.double()
    update = WeightUpdate(left * scale, right)
    found = patched(weight.clone(), update, dtype=dtype)
    tolerance = torch.finfo(dtype).eps / 2 * truth.abs() + 1e-5
    assert ((found.double() - truth).abs() <= tolerance).all()
    start = seed % rows
    assert (patched(weight[start:].clone(), update, dtype=dtype, start=start) - found[start:]).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"lora_alpha": 3, "alpha_pattern": {"q_proj": 20, r"layers\.1\..*down_proj": 1}},
        {"rank_pattern": {"v_proj": 1, "model.layers.0.mlp.up_proj": 7}},
        {"target_modules": r".*layers\.1\.(self_attn|mlp)\.(q|up)_proj"},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]},
        {"target_modules": ["v_proj"], "use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"1.*": 9}},
    ],
    ids=lambda config: "-".join(config),
)
def test_settings_of_peft(config: dict[str, Any], tmp_path: Path) -> None:
    model, lora = save_model(tmp_path / "model"), save_lora(tmp_path / "lora", seed=1, **config)
    found, merged = weights(apply(tmp_path, model, lora)), peft_merged(model, lora)
    for name, weight in found.items():
        assert (weight - merged[name]).abs().max() <= 1e-6, name


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_replace_those_of_the_model(bias: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "qwen2", 1)
    lora = save_lora(tmp_path / "lora", "qwen2", 1, target_modules=["q_proj"], bias=bias)
    found, merged = weights(apply(tmp_path, model, lora)), peft_merged(model, lora)
    name = "model.layers.1.self_attn.q_proj.bias"
    assert not torch.equal(found[name], weights(model)[name])
    for name, weight in found.items():
        assert (weight - merged[name]).abs().max() <= 1e-6, name


def test_transposed_weights_of_gpt2(tmp_path: Path) -> None:
    model, lora = save_model(tmp_path / "model", "gpt2"), save_lora(tmp_path / "lora", "gpt2", 1)
    assert json.loads((lora / "adapter_config.json").read_text())["fan_in_fan_out"]
    found, merged = weights(apply(tmp_path, model, lora)), peft_merged(model, lora)
    assert not torch.equal(
        found["transformer.h.0.attn.c_proj.weight"], weights(model)["transformer.h.0.attn.c_proj.weight"]
    )
    for name, weight in found.items():
        assert (weight - merged[name]).abs().max() <= 1e-6, name


def test_strengths_and_several_patches_add_up(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    first, second = save_lora(tmp_path / "a", seed=1), save_lora(tmp_path / "b", seed=2, r=2)
    apply_patches([read_patch(first, scale=0.5), read_patch(second, scale=-2.0)], model, tmp_path / "out")
    base, found = weights(model), weights(tmp_path / "out")
    a, b = exact(model, first, 0.5), exact(model, second, -2.0)
    for name, weight in found.items():
        assert (weight.double() - (a[name] + b[name] - base[name].double())).abs().max() <= 1e-6, name


def test_scale_zero_and_the_opposite_patch(tmp_path: Path) -> None:
    model, lora = save_model(tmp_path / "model"), save_lora(tmp_path / "lora")
    for name, weight in weights(apply(tmp_path, model, lora, scale=0.0)).items():
        assert same_bits(weight, weights(model)[name])
    apply_patches([read_patch(lora), read_patch(lora, scale=-1.0)], model, tmp_path / "both")
    for name, weight in weights(tmp_path / "both").items():
        assert (weight - weights(model)[name]).abs().max() <= 1e-6


def test_dtype_rounds_once(tmp_path: Path) -> None:
    model, lora = save_model(tmp_path / "model", shards=True), save_lora(tmp_path / "lora")
    out = apply(tmp_path, model, lora, dtype="bfloat16")
    for name, weight in weights(out).items():
        assert weight.dtype == torch.bfloat16
        truth = exact(model, lora)[name]
        assert (weight.double() - truth).abs().max() <= truth.abs().max() * 2**-8
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in weights(out).values())
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16
    with safe_open(sorted(out.glob("*.safetensors"))[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_value_too_large_for_float16(tmp_path: Path) -> None:
    model, lora = save_model(tmp_path / "model"), save_lora(tmp_path / "lora")
    with pytest.raises(RunError, match="too large for float16"):
        apply(tmp_path, model, lora, scale=1e7, dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora", "model"]


def test_tensors_without_a_patch_are_copied_as_bytes(tmp_path: Path) -> None:
    """Integers and NaN with a payload too."""
    model, lora = save_model(tmp_path / "model"), save_lora(tmp_path / "lora", target_modules=["q_proj"])
    state = weights(model)
    state["model.norm.weight"] = torch.tensor([0x7FC12345] * 16, dtype=torch.int32).view(torch.float32)
    state |= {"counts": torch.arange(5), "empty": torch.empty(0, 3), "one": torch.tensor(2.5)}
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    found = weights(apply(tmp_path, model, lora))
    for name in state:
        assert same_bits(found[name].reshape(-1), state[name].reshape(-1)) != name.endswith("q_proj.weight"), name


def test_other_files_come_along_and_other_weights_do_not(tmp_path: Path) -> None:
    model, lora = save_model(tmp_path / "model"), save_lora(tmp_path / "lora")
    make_tokenizer().save_pretrained(model)
    (model / "extra").mkdir()
    (model / "extra" / "template.jinja").write_text("x")
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\nold")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "model.gguf", ".gitattributes"):
        (model / name).write_bytes(b"old")
    out = apply(tmp_path, model, lora)
    names = {str(path.relative_to(model)) for path in model.rglob("*") if path.is_file()}
    left = {"pytorch_model.bin", "consolidated.safetensors", "model.gguf", ".gitattributes"}
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == names - left
    assert AutoTokenizer.from_pretrained(out)("abc")["input_ids"] == make_tokenizer()("abc")["input_ids"]
    card = (out / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "base_model: model" in card
    assert "14 of 21 tensors changed" in card
    assert str(tmp_path) not in card


def test_one_function_gives_a_loader_what_apply_writes(tmp_path: Path) -> None:
    model, lora = save_model(tmp_path / "model", dtype=torch.bfloat16), save_lora(tmp_path / "lora")
    found = weights(apply(tmp_path, model, lora))
    plan = plan_patches([read_patch(lora)], model)
    assert len(plan.names) == 14
    for name in plan.names:
        weight = read_tensor(plan.model.tensors[name])
        assert same_bits(patched(weight, load_update(plan.patches, name), dtype=torch.bfloat16), found[name])


def test_large_tensors_go_in_many_blocks(tmp_path: Path) -> None:
    size = {"hidden_size": 512, "intermediate_size": 1536, "num_layers": 1, "vocab_size": 1024}
    model = save_model(tmp_path / "model", dtype=torch.bfloat16, **size)
    lora = save_lora(tmp_path / "lora", size=size)
    found, truth = weights(apply(tmp_path, model, lora)), exact(model, lora)
    for name, weight in found.items():
        assert (weight.double() - truth[name]).abs().max() <= truth[name].abs().max() * 2**-8, name


def test_several_threads_write_what_one_writes(tmp_path: Path) -> None:
    model, lora = save_model(tmp_path / "model", shards=True), save_lora(tmp_path / "lora")
    one = weights(apply(tmp_path, model, lora))
    torch.set_num_threads(4)
    try:
        apply_patches([read_patch(lora)], model, tmp_path / "four")
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(1)
    for name, weight in weights(tmp_path / "four").items():
        assert same_bits(weight, one[name])


def test_outputs_that_exist_are_left_alone(tmp_path: Path) -> None:
    model, lora = save_model(tmp_path / "model"), save_lora(tmp_path / "lora")
    (tmp_path / "out").mkdir()
    apply(tmp_path, model, lora)  # an empty folder is as good as none
    before = weights(tmp_path / "out")
    with pytest.raises(OutputError, match="exists already"):
        apply(tmp_path, model, lora, scale=2.0)
    assert all(same_bits(weights(tmp_path / "out")[name], before[name]) for name in before)


def test_overwriting_replaces_a_result_and_nothing_else(tmp_path: Path) -> None:
    model, lora = save_model(tmp_path / "model"), save_lora(tmp_path / "lora")
    expected = weights(apply(tmp_path, model, lora, scale=2.0))
    apply_patches([read_patch(lora)], model, tmp_path / "again")
    (tmp_path / "again" / "stale.txt").write_text("x")
    apply_patches([read_patch(lora, scale=2.0)], model, tmp_path / "again", overwrite=True)
    assert all(same_bits(weight, expected[name]) for name, weight in weights(tmp_path / "again").items())
    assert not (tmp_path / "again" / "stale.txt").exists()
    other = save_model(tmp_path / "other")
    before = weights(other)
    with pytest.raises(OutputError, match="something else than a result"):
        apply_patches([read_patch(lora)], model, other, overwrite=True)
    assert all(same_bits(weights(other)[name], before[name]) for name in before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "lora", "model", "other", "out"]


def test_a_result_is_not_replaced_by_what_is_made_of_it(tmp_path: Path) -> None:
    model, lora = save_model(tmp_path / "model"), save_lora(tmp_path / "lora")
    tuned = apply(tmp_path, model, lora)
    extract_patch(model, tuned, tmp_path / "patch", rank=4)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match=rf"{tuned} is {tuned}, which this command reads"):
        apply_patches([read_patch(lora)], tuned, tuned, overwrite=True)
    with pytest.raises(OutputError, match=r"patch/\.\./patch is .*/patch, which this command reads"):
        apply_patches([read_patch(tmp_path / "patch")], model, tmp_path / "patch/../patch", overwrite=True)
    for base, finetuned in ((model, tuned), (tuned, model)):
        with pytest.raises(OutputError, match=rf"{tuned} is {tuned}, which this command reads"):
            extract_patch(base, finetuned, tuned, rank=4, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_pickle_is_read_only_where_it_is_allowed(tmp_path: Path) -> None:
    model, lora = save_model(tmp_path / "model"), save_lora(tmp_path / "lora")
    expected = weights(apply(tmp_path, model, lora))
    torch.save(weights(lora), lora / "adapter_model.bin")
    (lora / "adapter_model.safetensors").unlink()
    with pytest.raises(PatchError, match="--allow-pickle"):
        plan_patches([read_patch(lora)], model)
    apply_patches([read_patch(lora, allow_pickle=True)], model, tmp_path / "again")
    for name, weight in weights(tmp_path / "again").items():
        assert same_bits(weight, expected[name])


def test_a_patch_for_another_base_is_said_with_both_names(tmp_path: Path) -> None:
    model, lora = save_model(tmp_path / "model"), save_lora(tmp_path / "lora")
    assert plan_patches([read_patch(lora)], model).warnings == ()  # it names no base
    edit_json(lora / "adapter_config.json", base_model_name_or_path="org/old-model")
    (line,) = plan_patches([read_patch(lora)], model).warnings
    assert "org/old-model" in line
    assert str(model) in line
    edit_json(lora / "adapter_config.json", base_model_name_or_path="org/model")
    assert plan_patches([read_patch(lora)], model).warnings == ()
