"""Ties of two layers to one tensor: known from the class and the config, whatever the tensors are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.patch_cases import edit_json, edit_tensors, peft_merged, save_lora, save_lora_of, save_model, weights
from helpers.tiny import make_model, random_ids
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ensembler.adapters import check_adapter
from ensembler.errors import PatchError
from ensembler.patch.addition import merge_adapter
from ensembler.patch.apply import apply_patches
from ensembler.patch.extract import extract_patch
from ensembler.patch.formats import read_patch
from ensembler.patch.patch_plan import plan_patches

IDS = random_ids(2, 9)
EMBEDDINGS = {
    "llama": "embed_tokens",
    "gemma2": "embed_tokens",
    "gpt2": "wte",
    "opt": "embed_tokens",
    "bloom": "word_embeddings",
    "gpt_neox": "embed_in",
    "gpt_bigcode": "wte",
    "mpt": "wte",
}


def make(family: str, seed: int) -> PreTrainedModel:
    """A tiny tied model."""
    if family not in ("gpt_bigcode", "mpt"):
        return make_model(family, seed, tie_word_embeddings=True)
    size = (
        {"n_heads": 2, "d_model": 16, "n_layers": 2} if family == "mpt" else {"n_embd": 16, "n_layer": 2, "n_head": 2}
    )
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, vocab_size=64, tie_word_embeddings=True, initializer_range=0.3, **size)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return model


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        found: Tensor = AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits
    return found


def copy_of_head(name: str) -> Any:
    return lambda tensors: {**tensors, "lm_head.weight": tensors[name].clone()}


@pytest.mark.parametrize("kind", ["embedding", "embedding, whole", "head", "head, whole"])
@pytest.mark.parametrize("family", EMBEDDINGS)
def test_one_of_two_tied_layers_is_refused(family: str, kind: str, tmp_path: Path) -> None:
    make(family, 2).save_pretrained(tmp_path / "new")
    module = "lm_head" if kind.startswith("head") else EMBEDDINGS[family]
    change: dict[str, Any] = {"target_modules": [module]}
    if kind.endswith("whole"):
        change = {"modules_to_save": [module]}
    lora = save_lora_of(make(family, 1), tmp_path / "lora", **change)
    with pytest.raises(PatchError, match=rf"changes \S*{module}\.weight, and .* ties it to \S+\.weight, so both"):
        plan_patches([read_patch(lora)], tmp_path / "new")


def test_files_of_the_base_model_alone_are_tied_once_they_get_a_head(tmp_path: Path) -> None:
    for family, module in (("gemma2", "embed_tokens"), ("gpt2", "wte")):
        make(family, 2).base_model.save_pretrained(tmp_path / family)
        lora = save_lora_of(make(family, 1), tmp_path / f"lora-{family}", target_modules=[module])
        with pytest.raises(PatchError, match=rf"changes \S*{module}\.weight, and .* ties it to lm_head\.weight"):
            plan_patches([read_patch(lora)], tmp_path / family)


@pytest.mark.parametrize("whole", [False, True])
def test_positions_are_tied_to_nothing(whole: bool, tmp_path: Path) -> None:
    for family, module in (("opt", "embed_positions"), ("gpt2", "wpe")):
        new = save_model(tmp_path / family, family, 2)
        change: dict[str, Any] = {"modules_to_save": [module]} if whole else {"target_modules": [module]}
        lora = save_lora(tmp_path / f"lora-{family}", family, **change)
        apply_patches([read_patch(lora)], new, tmp_path / f"out-{family}")
        expected = peft_merged(new, lora)
        written, before = weights(tmp_path / f"out-{family}"), weights(new)
        (changed,) = (name for name in before if module in name)
        assert (written[changed] - before[changed]).abs().max() > 0.1
        for name, tensor in written.items():
            assert_close(tensor, expected[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("family", "name"), [("gemma2", "model.embed_tokens"), ("falcon", "transformer.word_embeddings")]
)
def test_a_class_that_ties_by_default_does_so_beside_its_copy(family: str, name: str, tmp_path: Path) -> None:
    """A head of its own on disk and no word in config.json: it is tied all the same."""
    torch.manual_seed(1)
    size = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    size |= {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 24} if family == "gemma2" else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **size))
    model.save_pretrained(tmp_path / "new")
    edit_tensors(tmp_path / "new" / "model.safetensors", copy_of_head(f"{name}.weight"))
    edit_json(tmp_path / "new" / "config.json", tie_word_embeddings=None)
    config = (tmp_path / "new" / "config.json").read_text().replace('"tie_word_embeddings": null, ', "")
    (tmp_path / "new" / "config.json").write_text(config.replace(', "tie_word_embeddings": null', ""))
    assert "tie_word_embeddings" not in (tmp_path / "new" / "config.json").read_text()
    lora = save_lora_of(model, tmp_path / "lora", target_modules=["lm_head"])
    with pytest.raises(PatchError, match=r"ties it to .* false in its config\.json keeps them apart"):
        plan_patches([read_patch(lora)], tmp_path / "new")
    edit_json(tmp_path / "new" / "config.json", tie_word_embeddings=False)
    apply_patches([read_patch(lora)], tmp_path / "new", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not torch.equal(loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight)
    assert torch.equal(loaded.get_output_embeddings().weight, weights(tmp_path / "out")["lm_head.weight"])


@pytest.mark.parametrize("copies", ["", "model", "tuned", "base", "model base tuned"])
def test_deltas_of_a_tied_tensor_go_to_every_copy(copies: str, tmp_path: Path) -> None:
    """The delta of the tied tensor goes to every copy of it: transformers would load two that differ apart."""
    folders = {}
    for seed, name in enumerate(("base", "tuned", "model")):
        folders[name] = save_model(tmp_path / name, "qwen2", seed, tie_word_embeddings=True)
    base, tuned, new = (weights(folder) for folder in folders.values())
    total = {name: weight + tuned[name] - base[name] for name, weight in new.items()}
    for name in copies.split():
        edit_tensors(folders[name] / "model.safetensors", copy_of_head("model.embed_tokens.weight"))
    extract_patch(folders["base"], folders["tuned"], tmp_path / "patch", full=True)
    apply_patches([read_patch(tmp_path / "patch")], folders["model"], tmp_path / "out")
    written = weights(tmp_path / "out")
    assert written.keys() == weights(folders["model"]).keys()
    for name, tensor in total.items():
        assert_close(written[name], tensor, atol=1e-6, rtol=1e-6)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight)
    assert (logits(tmp_path / "out") - logits(folders["model"])).abs().max() > 0.1
    model = AutoModelForCausalLM.from_pretrained(folders["model"])
    merge_adapter(model, check_adapter("x", str(tmp_path / "patch"), str(folders["model"]), model.config))
    assert all(torch.equal(weight, written[name]) for name, weight in model.named_parameters())


def test_a_quantised_copy_of_a_tied_head_is_one(tmp_path: Path) -> None:
    """Copies are told by their bytes, in a dtype that has no arithmetic here too."""
    for name, copies in (("base", False), ("tuned", True)):
        save_model(tmp_path / name, "qwen2", tie_word_embeddings=True)

        def stored_as_int8(tensors: dict[str, Tensor], copies: bool = copies) -> dict[str, Tensor]:
            rows = tensors["model.embed_tokens.weight"].mul(9).to(torch.int8)
            head = {"lm_head.weight": rows.clone()} if copies else {}
            norm = tensors["model.norm.weight"] + copies
            return {**tensors, "model.embed_tokens.weight": rows, **head, "model.norm.weight": norm}

        edit_tensors(tmp_path / name / "model.safetensors", stored_as_int8)
    found = extract_patch(tmp_path / "base", tmp_path / "tuned", tmp_path / "patch", full=True)
    assert [kept.name for kept in found.kept] == ["model.norm.weight"]


def test_a_head_that_is_no_copy_is_not_taken_for_one(tmp_path: Path) -> None:
    base, tuned = (save_model(tmp_path / name, "qwen2", tie_word_embeddings=True) for name in ("base", "tuned"))
    edit_tensors(tuned / "model.safetensors", copy_of_head("model.embed_tokens.weight"))
    edit_tensors(tuned / "model.safetensors", lambda t: {**t, "lm_head.weight": 2 * t["lm_head.weight"]})
    with pytest.raises(PatchError, match=r"base has no lm_head\.weight, which the other model has"):
        extract_patch(base, tuned, tmp_path / "patch", full=True)
