"""Names in patches and in files: those of the loaded model, of older classes, of text models, of what is not loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.patch_cases import (
    MULTIMODAL,
    edit_json,
    edit_tensors,
    make_multimodal,
    own_merge,
    peft_merged,
    save_lora,
    save_lora_of,
    save_model,
    weights,
)
from helpers.tiny import make_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ensembler.errors import PatchError
from ensembler.patch.apply import apply_patches
from ensembler.patch.extract import extract_patch
from ensembler.patch.formats import read_patch
from ensembler.patch.model_layout import read_layouts
from ensembler.patch.patch_plan import plan_patches
from ensembler.safetensors_files import read_model

FAMILIES = ("llama", "gpt2", "gpt_neox", "opt", "bloom", "gemma2", "mixtral")
MOE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
}
QWEN = {**MOE, "num_experts": 4, "shared_expert_intermediate_size": 24}
GLM = {**MOE, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}


def make(kind: str, seed: int, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    return model


def assert_applied(lora: Path, model: Path, expected: dict[str, Tensor], *, atol: float = 1e-6) -> None:
    """`patch apply` writes the expected tensors, and keeps all others of the model; some have changed."""
    before = weights(model)
    out = model.parent / f"out-{lora.name}"
    apply_patches([read_patch(lora)], model, out)
    written = weights(out)
    assert written.keys() == before.keys() >= expected.keys()
    for name, tensor in written.items():
        assert_close(tensor, expected.get(name, before[name]), atol=atol, rtol=1e-6, msg=name)
    assert any((written[name] - before[name]).abs().max() > 1e-3 for name in expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_class_knows_ties_kinds_and_names(family: str, tmp_path: Path) -> None:
    """All that a layout says of a folder is so in the model that transformers loads from it."""
    for tied in (True, False):
        folder = save_model(tmp_path / str(tied), family, tie_word_embeddings=tied)
        (layout,) = read_layouts(read_model(folder))
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        parameters = dict(loaded.named_parameters(remove_duplicate=False))
        assert parameters.keys() <= layout.weights.keys()
        same = {n: tuple(m for m in parameters if parameters[m] is parameters[n]) for n in parameters}
        assert layout.tied == {name: names for name, names in same.items() if len(names) > 1}
        assert bool(layout.tied) is tied
        on_disk = weights(folder)
        for name, disk in layout.stored.items():
            assert torch.equal(loaded.state_dict()[name], on_disk[disk]), name
        assert not layout.fused & set(layout.stored.values())
        assert layout.fused | set(layout.stored.values()) == on_disk.keys()
        kinds = {"linear": nn.Linear, "transposed": Conv1D, "embedding": nn.Embedding}
        for name, kind in layout.kinds.items():
            assert isinstance(loaded.get_submodule(name.removesuffix(".weight")), kinds[kind])
        ends = [loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight]
        assert layout.token_weights == {n for n, weight in parameters.items() if any(weight is end for end in ends)}


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*language_model.*\.(q|up)_proj"], ids=["all", "text"])
@pytest.mark.parametrize("kind", MULTIMODAL)
def test_models_of_images_and_text(kind: str, targets: Any, tmp_path: Path) -> None:
    """Their files have names that no class uses."""
    old, new = make_multimodal(kind, 0), make_multimodal(kind, 1)
    new.save_pretrained(tmp_path / "new")
    lora = save_lora_of(old, tmp_path / "lora", target_modules=targets, task_type=None)
    assert_applied(lora, tmp_path / "new", peft_merged(tmp_path / "new", lora, AutoModelForImageTextToText))


@pytest.mark.parametrize("kind", ["gemma3", "llava", "qwen2_5_vl"])
def test_a_lora_of_the_text_model_alone_and_one_with_older_names(kind: str, tmp_path: Path) -> None:
    new = make_multimodal(kind, 1)
    new.save_pretrained(tmp_path / "new")
    targets = r".*language_model.*(q_proj|down_proj)"
    lora = save_lora_of(make_multimodal(kind, 0), tmp_path / "lora", target_modules=targets, task_type=None)
    expected = peft_merged(tmp_path / "new", lora, AutoModelForImageTextToText)
    edit_json(lora / "adapter_config.json", target_modules=["q_proj", "down_proj"])
    file = lora / "adapter_model.safetensors"
    edit_tensors(file, lambda t: {name.replace("model.language_model.", "model.", 1): v for name, v in t.items()})
    assert_applied(lora, tmp_path / "new", expected)
    older = "model" if kind.startswith("qwen") else "language_model.model"
    edit_tensors(file, lambda t: {n.replace("model.model.model.", f"model.model.{older}."): v for n, v in t.items()})
    assert_applied(lora.rename(tmp_path / "older"), tmp_path / "new", expected)


@pytest.mark.parametrize(
    ("kind", "settings", "extra"),
    [
        ("llama", MOE, "mtp.layers.0."),
        ("qwen3_moe", QWEN, "mtp.layers.0."),
        ("glm4_moe", GLM, "model.layers.2."),
    ],
)
def test_layers_that_are_not_built_and_buffers_of_old_are_kept_as_they_are(
    kind: str, settings: dict[str, Any], extra: str, tmp_path: Path
) -> None:
    make(kind, 1, **settings).save_pretrained(tmp_path / "new")

    def more(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        last = "model.layers.1."
        again = {name.replace(last, extra): 1 + v for name, v in tensors.items() if name.startswith(last)}
        return {**tensors, **again, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}

    edit_tensors(tmp_path / "new" / "model.safetensors", more)
    lora = save_lora_of(make(kind, 0, **settings), tmp_path / "lora", target_modules=["q_proj", "o_proj"])
    assert_applied(lora, tmp_path / "new", peft_merged(tmp_path / "new", lora))


def test_shared_experts_alone(tmp_path: Path) -> None:
    """PEFT finds no layer in fused experts, whatever they are called on disk; experts by name are of older classes."""
    make("qwen2_moe", 1, **QWEN).save_pretrained(tmp_path / "new")
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    lora = save_lora_of(make("qwen2_moe", 0, **QWEN), tmp_path / "lora", target_modules=targets)
    assert_applied(lora, tmp_path / "new", peft_merged(tmp_path / "new", lora))
    up_proj = "base_model.model.model.layers.0.mlp.experts.0.up_proj"
    one = {f"{up_proj}.lora_A.weight": torch.ones(4, 16), f"{up_proj}.lora_B.weight": torch.ones(24, 4)}
    edit_tensors(lora / "adapter_model.safetensors", lambda tensors: {**tensors, **one})
    with pytest.raises(PatchError, match=r"has 23 matrices .* holds nothing for: model\.layers\.\d\.mlp\.experts"):
        plan_patches([read_patch(lora)], tmp_path / "new")


def test_files_without_the_prefix_of_the_class_and_heads_of_other_names(tmp_path: Path) -> None:
    """A base model saved without its head, and gpt_neox's head, which is embed_out on disk."""
    for family, prefix in (("llama", "model."), ("gpt2", "transformer.")):
        lora, whole = save_lora(tmp_path / family, family), save_model(tmp_path / f"{family}-whole", family, 2)
        make_model(family, 2).base_model.save_pretrained(tmp_path / f"{family}-bare")
        merged = peft_merged(whole, lora)
        expected = {name.removeprefix(prefix): tensor for name, tensor in merged.items() if name.startswith(prefix)}
        assert_applied(lora, tmp_path / f"{family}-bare", expected)
    neox = save_model(tmp_path / "neox", "gpt_neox", 2)
    lora = save_lora(tmp_path / "head", "gpt_neox", target_modules=["lm_head"])
    assert_applied(lora, neox, own_merge(neox, lora))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layers_lie_as_the_class_has_them_whatever_the_adapter_says(family: str, tmp_path: Path) -> None:
    model, lora = save_model(tmp_path / "model", family, 2), save_lora(tmp_path / "lora", family)
    expected = peft_merged(model, lora)
    edit_json(lora / "adapter_config.json", fan_in_fan_out=family == "llama")
    assert_applied(lora, model, expected)


def test_a_class_that_transformers_lacks_is_taken_by_its_files(tmp_path: Path) -> None:
    """Code of its own is not run; names have to be those on disk, and a head with values of its own is not tied."""
    model = save_model(tmp_path / "model", "llama", 2)
    lora = save_lora(tmp_path / "lora", target_modules=["q_proj", "lm_head"])
    q_proj = save_lora(tmp_path / "q_proj", target_modules=["q_proj"])
    expected, q_expected = own_merge(model, lora), peft_merged(model, q_proj)
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit_json(model / "config.json", model_type="own", architectures=["OwnModel"], auto_map=own)
    (model / "own.py").write_text("raise SystemExit('run')")
    assert_applied(q_proj, model, q_expected)
    (layout,) = read_layouts(read_model(model))
    assert not layout.is_known
    apply_patches([read_patch(lora)], model, tmp_path / "with-head")
    assert_close(weights(tmp_path / "with-head")["lm_head.weight"], expected["lm_head.weight"])
    edit_json(model / "config.json", tie_word_embeddings=None)
    plan_patches([read_patch(lora)], model)
    cure = r'lm_head\.weight, and .* ties it to .*: where it does not .* "tie_word_embeddings": false in its config'
    edit_json(model / "config.json", tie_word_embeddings=True)
    with pytest.raises(PatchError, match=cure):
        plan_patches([read_patch(lora)], model)
    edit_json(model / "config.json", tie_word_embeddings=None)
    edit_tensors(model / "model.safetensors", lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})
    with pytest.raises(PatchError, match=cure):
        plan_patches([read_patch(lora)], model)
    edit_tensors(model / "model.safetensors", lambda t: {f"own.{name}": v for name, v in t.items()})
    with pytest.raises(PatchError, match="the class of model is not one of transformers"):
        plan_patches([read_patch(q_proj)], model)


def test_extract_goes_by_what_is_loaded(tmp_path: Path) -> None:
    """Old buffers and layers that are not built are in one of two versions alone, or in both and then kept in full.

    Their deltas go to them, and never to the layers of the same number that are built.
    """
    base, tuned = save_model(tmp_path / "base"), save_model(tmp_path / "tuned", seed=2)
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    edit_tensors(base / "model.safetensors", lambda tensors: {**tensors, **buffer})
    extract_patch(base, tuned, tmp_path / "patch", rank=16)
    assert_applied(tmp_path / "patch", base, weights(tuned), atol=1e-5)
    first = "model.layers.0."
    built = {name.removeprefix(first): v for name, v in weights(tuned).items() if name.startswith(first)}
    extra = {f"mtp.layers.0.{name}": torch.ones_like(v) for name, v in built.items()}
    edit_tensors(base / "model.safetensors", lambda tensors: {**tensors, **extra})
    for old, new in ((base, tuned), (tuned, base)):  # transformers saves a fine-tuned model without them
        extract_patch(old, new, tmp_path / "alone", rank=16, overwrite=True)
        assert not extra.keys() & weights(tmp_path / "alone").keys()
    apply_patches([read_patch(tmp_path / "patch")], base, tmp_path / "ported")
    assert_tensors(weights(tmp_path / "ported"), {**weights(base), **weights(tuned)})
    edit_tensors(tuned / "model.safetensors", lambda tensors: {**tensors, **{n: 3 * v for n, v in extra.items()}})
    for full in (False, True):
        kept: dict[str, Any] = {"full": True} if full else {"rank": 16}
        extract_patch(base, tuned, tmp_path / "patch", overwrite=True, **kept)
        assert extra.keys() <= weights(tmp_path / "patch").keys()
        apply_patches([read_patch(tmp_path / "patch")], base, tmp_path / "out", overwrite=True)
        assert_tensors(weights(tmp_path / "out"), {**weights(base), **weights(tuned)})


def assert_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert_close(tensor, expected[name], atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("is_on_disk", [False, True])
@pytest.mark.parametrize("prefix", ["decoder_x.", "mtp.", "model.mtp.", "language_model.", "transformer."])
def test_a_name_of_another_module_is_no_layer_of_the_model(prefix: str, is_on_disk: bool, tmp_path: Path) -> None:
    """A LoRA of layer 0 elsewhere: refused, or added to the tensor of that very name, and never to layer 0."""
    model, lora = save_model(tmp_path / "model", seed=2), save_lora(tmp_path / "lora", target_modules=["q_proj"])
    edit_json(lora / "adapter_config.json", target_modules=[])
    other = f"{prefix}layers.0.self_attn.q_proj"
    factors = weights(lora)
    for end in ("A", "B"):
        factor = factors.pop(f"base_model.model.model.layers.0.self_attn.q_proj.lora_{end}.weight")
        factors[f"base_model.model.{other}.lora_{end}.weight"] = factor
    edit_tensors(lora / "adapter_model.safetensors", lambda tensors: factors)
    if is_on_disk:
        edit_tensors(model / "model.safetensors", lambda t: {**t, f"{other}.weight": torch.zeros(16, 16)})
        assert_applied(lora, model, own_merge(model, lora))
    else:
        with pytest.raises(PatchError, match=rf"1 of 2 tensors that .* does not have: {other}\.weight"):
            plan_patches([read_patch(lora)], model)


@pytest.mark.parametrize("kind", ["low rank", "full", "both"])
def test_two_names_of_one_weight_are_refused(kind: str, tmp_path: Path) -> None:
    """An older name and today's, or the text model's and the whole one's."""
    model = make_multimodal("gemma3", 1)
    model.save_pretrained(tmp_path / "model")
    text, whole = ("model.layers.0.self_attn.q_proj", "model.language_model.layers.0.self_attn.q_proj")
    shape = model.get_parameter(f"{whole}.weight").shape
    lora = save_lora_of(model, tmp_path / "lora", target_modules=r".*language_model.*layers\.0.*\.q_proj")
    edit_json(lora / "adapter_config.json", target_modules=[])
    factors = weights(lora)
    again = {name.replace(whole, text): 2 * factor for name, factor in factors.items()}
    if kind == "low rank":
        save_file({**factors, **again}, lora / "adapter_model.safetensors")
    elif kind == "full":
        (lora / "adapter_config.json").unlink()
        save_file({f"{name}.weight": torch.ones(shape) for name in (text, whole)}, lora / "deltas.safetensors")
    else:
        save_file({f"{text}.weight": torch.ones(shape)}, lora / "deltas.safetensors")
    with pytest.raises(PatchError, match=rf"holds {whole}\.weight and {text}\.weight, and both are {whole}\.weight in"):
        plan_patches([read_patch(lora)], tmp_path / "model")
