"""Adapters as people save them: with the base's own weights, untrained, from within wrappers of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import Run
from helpers.patch_cases import edit_json, edit_tensors, own_merge, peft_merged, save_lora, save_model, weights
from torch.testing import assert_close

from ensembler.errors import PatchError
from ensembler.patch.apply import apply_patches
from ensembler.patch.formats import read_patch
from ensembler.patch.geometry import inspect_patch
from ensembler.patch.patch_plan import plan_patches

PREFIX = "base_model.model."
FACTORS = "adapter_model.safetensors"
WHOLE = {"save": {"save_embedding_layers": True}}
ENDS = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"], ["q_proj", "embed_tokens"]], ids=len)
def test_embeddings_that_nothing_trained_stay_those_of_the_model(targets: list[str], tmp_path: Path) -> None:
    model, lora = save_model(tmp_path / "model", seed=2), save_lora(tmp_path / "lora", target_modules=targets, **WHOLE)
    expected = own_merge(model, lora)
    for scale in (1.0, 0.5):
        patch = read_patch(lora, scale=scale)
        assert not patch.replaced
        assert patch.carried.keys() == set(
            ENDS[:1] if "embed_tokens" in targets else ENDS[1:] if "lm_head" in targets else ENDS
        )
        assert "did not train" in " ".join(patch.notes)
        apply_patches([patch], model, tmp_path / f"out-{scale}")
    before = weights(model)
    for name, tensor in weights(tmp_path / "out-1.0").items():
        assert_close(tensor, expected[name], atol=1e-6, rtol=1e-6)
        assert torch.equal(tensor, before[name]) == (name not in patch.names), name


@pytest.mark.parametrize("size", [64, 66])
@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens", "lm_head"]], ids=len)
def test_trained_embeddings_replace_those_of_the_model_beside_the_untrained(
    saved: list[str], size: int, tmp_path: Path
) -> None:
    """PEFT saves each up to three times then: trained, original, and both under the plain name."""
    vocab = {"vocab_size": size}
    model = save_model(tmp_path / "model", seed=2, **vocab)
    lora = save_lora(tmp_path / "lora", size=vocab, target_modules=["q_proj"], modules_to_save=saved, **WHOLE)
    assert any(".original_module." in name for name in weights(lora))
    apply_patches([read_patch(lora)], model, tmp_path / "out")
    merged, before, written = peft_merged(model, lora), weights(model), weights(tmp_path / "out")
    for name, tensor in written.items():
        is_carried = name == ENDS[0] and "embed_tokens" not in saved
        assert_close(tensor, before[name] if is_carried else merged[name], atol=1e-6, rtol=1e-6)
    assert not torch.equal(written["lm_head.weight"], before["lm_head.weight"])


def test_a_classifier_is_trained_by_its_task(tmp_path: Path) -> None:
    """The first versions of PEFT did not write its modules_to_save down."""
    lora = save_lora(tmp_path / "lora", target_modules=["q_proj"])
    edit_tensors(lora / FACTORS, lambda tensors: {**tensors, f"{PREFIX}score.weight": torch.ones(3, 16)})
    assert set(read_patch(lora).carried) == {"score.weight"}
    edit_json(lora / "adapter_config.json", task_type="SEQ_CLS")
    assert set(read_patch(lora).replaced) == {"score.weight"}


def test_a_lora_of_zeros_changes_nothing(tmp_path: Path, run: Run) -> None:
    model, lora = save_model(tmp_path / "model", seed=2), save_lora(tmp_path / "lora", target_modules=["q_proj"])
    q_proj = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)]

    def zero(*layers: int) -> Any:
        ends = tuple(f"layers.{layer}.self_attn.q_proj.lora_B.weight" for layer in layers)
        return lambda tensors: {n: torch.zeros_like(v) if n.endswith(ends) else v for n, v in tensors.items()}

    edit_tensors(lora / FACTORS, zero(0))
    plan = plan_patches([read_patch(lora)], model)
    assert plan.names == q_proj[1:]
    assert [note for note in plan.notes if q_proj[0] in note and "is 0, as before training" in note]
    edit_tensors(lora / FACTORS, zero(0, 1))
    result = run("patch", "apply", str(lora), "--to", str(model), "--output", str(tmp_path / "out"))
    assert "0 of 21 tensors changed" in result.err
    assert "it changes nothing" in result.err
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert inspect_patch(read_patch(lora)).overall()["patch_frobenius"] == 0


WRAPPED = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "torch.compile inside": lambda name: name.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "compiled layers": lambda name: name.replace("self_attn.", "self_attn._orig_mod."),
    "FSDP": lambda name: name.replace("layers.", "_fsdp_wrapped_module.layers.").replace(
        "self_attn", "_fsdp_wrapped_module._checkpoint_wrapped_module.self_attn"
    ),
    "DDP": lambda name: f"module.{name}",
    "DDP inside": lambda name: name.replace(PREFIX, f"{PREFIX}module."),
    "DDP of compiled": lambda name: f"module._orig_mod.{name}",
    "compiled DDP": lambda name: f"_orig_mod.module.{name}",
    "twice PEFT": lambda name: PREFIX + name,
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_names_of_wrappers_are_left_out_where_that_is_asked_for(kind: str, tmp_path: Path, run: Run) -> None:
    model, lora = save_model(tmp_path / "model", seed=2), save_lora(tmp_path / "lora", modules_to_save=["lm_head"])
    expected = peft_merged(model, lora)
    edit_tensors(lora / FACTORS, lambda tensors: {WRAPPED[kind](name): tensor for name, tensor in tensors.items()})
    with pytest.raises(PatchError, match=r"was saved with the wrapper of .* --unwrap"):
        read_patch(lora)
    run("patch", "apply", str(lora), "--to", str(model), "--output", str(tmp_path / "out"), "--unwrap")
    for name, tensor in weights(tmp_path / "out").items():
        assert_close(tensor, expected[name], atol=1e-6, rtol=1e-6)


def test_the_name_of_the_adapter_may_stay_in(tmp_path: Path) -> None:
    """PEFT reads that as well."""
    model = save_model(tmp_path / "model", seed=2)
    lora = save_lora(tmp_path / "lora", target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    names = {"lora_A.weight": "lora_A.default.weight", "lora_B.weight": "lora_B.default.weight"}
    names |= {"embedding_A": "embedding_A.default", "embedding_B": "embedding_B.default"}
    names |= {"lm_head.weight": "lm_head.modules_to_save.default.weight"}
    before = read_patch(lora)

    def rename(tensors: dict[str, Any]) -> dict[str, Any]:
        for old, new in names.items():
            tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
        return tensors

    edit_tensors(lora / FACTORS, rename)
    assert sum(".default" in name for name in weights(lora)) == 7
    patch = read_patch(lora)
    assert (patch.low_rank.keys(), patch.replaced.keys()) == (before.low_rank.keys(), before.replaced.keys())
    apply_patches([patch], model, tmp_path / "out")
    expected = {
        **own_merge(model, lora),
        "lm_head.weight": weights(lora)[f"{PREFIX}lm_head.modules_to_save.default.weight"],
    }
    for name, tensor in weights(tmp_path / "out").items():
        assert_close(tensor, expected[name], atol=1e-6, rtol=1e-6)
