"""Patches at the edges: layers of two kinds, values out of range, folders that may only be read, names that moved."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.patch_cases import edit_json, edit_tensors, peft_merged, save_lora, save_model, weights
from helpers.tiny import make_model, random_ids
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from ensembler.errors import MemberError, OutputError, PatchError, RunError
from ensembler.patch import apply as applying
from ensembler.patch.addition import fill
from ensembler.patch.apply import apply_patches
from ensembler.patch.extract import extract_patch
from ensembler.patch.formats import read_patch
from ensembler.patch.geometry import inspect_patch
from ensembler.patch.patch_plan import plan_patches

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("targets", [["attn.c_proj", "lm_head"], ["c_attn", "c_proj", "c_fc", "lm_head"]], ids=len)
def test_a_lora_on_layers_that_lie_both_ways(targets: list[str], tmp_path: Path) -> None:
    """PEFT saves one fan_in_fan_out for all, that of the last layer; a square matrix would be turned unseen."""
    size = {"tie_word_embeddings": False}
    model = save_model(tmp_path / "model", "gpt2", 1, **size)
    lora = save_lora(tmp_path / "lora", "gpt2", 1, size=size, target_modules=targets)
    assert json.loads((lora / "adapter_config.json").read_text())["fan_in_fan_out"] is False
    apply_patches([read_patch(lora)], model, tmp_path / "out")
    merged = peft_merged(model, lora)
    for name, weight in weights(tmp_path / "out").items():
        assert (weight - merged[name]).abs().max() <= 1e-6, name
    inspected = inspect_patch(read_patch(lora), model=model)
    assert {row.shape for row in inspected.modules} == {tuple(merged[row.name].shape) for row in inspected.modules}


@pytest.mark.parametrize("scale", [1e39, -1e39, 3e38, 1e300])
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_sums_out_of_range_are_said_and_leave_nothing(scale: float, dtype: str | None, tmp_path: Path) -> None:
    model, lora = save_model(tmp_path / "model"), save_lora(tmp_path / "lora")
    with pytest.raises(RunError, match=f"too large for {dtype or 'float32'}"):
        apply_patches([read_patch(lora, scale=scale)], model, tmp_path / "out", dtype=dtype)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora", "model"]


def test_what_a_model_holds_where_it_is_not_patched_is_only_cast(tmp_path: Path) -> None:
    model, lora = save_model(tmp_path / "model"), save_lora(tmp_path / "lora", target_modules=["q_proj"])
    mask = torch.tensor([-math.inf, 0.0, math.nan] + [0.0] * 13)
    edit_tensors(model / "model.safetensors", lambda state: {**state, "model.norm.weight": mask})
    apply_patches([read_patch(lora)], model, tmp_path / "out", dtype="bfloat16")
    assert torch.equal(weights(tmp_path / "out")["model.norm.weight"].isfinite(), mask.isfinite())


def test_a_model_that_may_only_be_read(tmp_path: Path) -> None:
    model, lora = save_model(tmp_path / "model", shards=True), save_lora(tmp_path / "lora")
    for path in [*model.iterdir(), model]:
        path.chmod(0o555)
    apply_patches([read_patch(lora)], model, tmp_path / "out", dtype="bfloat16")
    for path in [*(tmp_path / "out").iterdir(), tmp_path / "out"]:
        assert path.stat().st_mode & 0o200, path


def test_an_adapter_in_the_folder_of_the_model_stays_behind(tmp_path: Path) -> None:
    """With its configuration in the folder, transformers would load the adapter's base and not the result."""
    model, lora = save_model(tmp_path / "model"), save_lora(tmp_path / "lora")
    for file in lora.glob("adapter*"):
        shutil.copy(file, model)
    apply_patches([read_patch(model)], model, tmp_path / "out")
    assert not list((tmp_path / "out").glob("adapter*"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert torch.equal(loaded[Q], weights(tmp_path / "out")[Q])


def test_a_file_that_cannot_be_carried_shows_before_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, lora = save_model(tmp_path / "model"), save_lora(tmp_path / "lora")
    (model / "notes.txt").symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr(applying, "_write_weights", lambda *args: pytest.fail("weights were written"))
    with pytest.raises(MemberError, match=r"model/notes\.txt cannot be read \(No such file or directory\)"):
        apply_patches([read_patch(lora)], model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_is_no_place_for_a_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, lora = save_model(tmp_path / "model"), save_lora(tmp_path / "lora")
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: True)
    with pytest.raises(OutputError, match="name a new folder in it"):
        apply_patches([read_patch(lora)], model, tmp_path / "disk")


def test_a_read_that_gives_less_is_read_on(tmp_path: Path) -> None:
    """As Linux does beyond 2 GiB: an embedding of a 70B model in fp32."""

    class Short(io.FileIO):
        def readinto(self, buffer: Any) -> int | None:
            return super().readinto(memoryview(buffer)[:7])

    stored = plan_patches([read_patch(save_lora(tmp_path / "lora"))], save_model(tmp_path / "model")).model.tensors[Q]
    data = stored.file.read_bytes()
    buffer = bytearray(100)
    with Short(stored.file) as file:
        fill(memoryview(buffer), file, stored)
        assert bytes(buffer) == data[:100]
        file.seek(len(data) - 50)
        with pytest.raises(RunError, match=r"q_proj\.weight ended early"):
            fill(memoryview(buffer), file, stored)


def test_a_quantised_model_without_the_tensors_is_called_quantised(tmp_path: Path) -> None:
    model, lora = save_model(tmp_path / "model"), save_lora(tmp_path / "lora")
    edit_tensors(
        model / "model.safetensors", lambda state: {k.replace("q_proj.w", "q_proj.qw"): v for k, v in state.items()}
    )
    edit_json(model / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(
        PatchError,
        match=r"model is quantised \(quant_method 'gptq' in its config\.json\), and no .*; give the model before that",
    ):
        plan_patches([read_patch(lora)], model)


def test_adapters_in_folders_below_are_named(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    adapters = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"]), adapter_name="first")
    adapters.add_adapter("second", LoraConfig(target_modules=["q_proj"]))
    adapters.save_pretrained(tmp_path / "lora")
    with pytest.raises(PatchError, match="its folders first, second hold one"):
        plan_patches([read_patch(tmp_path / "lora")], model)
    assert len(plan_patches([read_patch(tmp_path / "lora" / "second")], model).patches[0].names) == 2


@pytest.mark.parametrize("place", ["below", ".."])
def test_shards_lie_beside_their_index(place: str, tmp_path: Path) -> None:
    model, lora = save_model(tmp_path / "model", shards=True), save_lora(tmp_path / "lora")
    index = model / "model.safetensors.index.json"
    (model / place).mkdir(exist_ok=True)
    for file in model.glob("*.safetensors"):
        file.rename(model / place / file.name)
    names = json.loads(index.read_text())["weight_map"].items()
    edit_json(index, weight_map={name: f"{place}/{file}" for name, file in names})
    with pytest.raises(MemberError, match="which is not beside it"):
        plan_patches([read_patch(lora)], model)


def test_the_card_names_a_base_on_the_hub_and_its_licence(tmp_path: Path) -> None:
    model, lora = save_model(tmp_path / "model"), save_lora(tmp_path / "lora")
    edit_json(lora / "adapter_config.json", base_model_name_or_path="org/older")
    (model / "README.md").write_text("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\nold")
    apply_patches([read_patch(lora)], model, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license_name: own" in card
    assert "license_link: LICENSE" in card
    assert "| patch | lora | org/older | 1 | adapter_model.safetensors " in card


def test_extract_at_rank_one_and_of_a_single_number(tmp_path: Path) -> None:
    base, tuned = save_model(tmp_path / "base", seed=1), save_model(tmp_path / "tuned", seed=2)
    for folder, value in ((base, 1.5), (tuned, 2.25)):
        edit_tensors(folder / "model.safetensors", lambda state, v=value: {**state, "one": torch.tensor(v)})
    extracted = extract_patch(base, tuned, tmp_path / "patch", rank=1)
    assert {kept.rank for kept in extracted.kept} == {1, None}
    apply_patches([read_patch(tmp_path / "patch")], base, tmp_path / "again")
    old, new, again = weights(base), weights(tuned), weights(tmp_path / "again")
    assert again["one"].item() == 2.25
    for kept in extracted.kept:
        if kept.rank is not None:
            tail = torch.linalg.svdvals((new[kept.name] - old[kept.name]).double())[1:].square().sum().item()
            error = (new[kept.name] - again[kept.name]).double().square().sum().item()
            assert error == pytest.approx(tail, rel=1e-4), kept.name


def test_an_embedding_of_another_name_is_one_for_peft_too(tmp_path: Path) -> None:
    """GPT-J calls it wte."""
    config = AutoConfig.for_model("gptj", n_embd=16, n_layer=1, n_head=2, rotary_dim=4, vocab_size=64, n_positions=32)
    for name, seed in (("base", 1), ("tuned", 2)):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
    edit_tensors(tmp_path / "tuned" / "model.safetensors", lambda s: _only_matrices(s, weights(tmp_path / "base")))
    extract_patch(tmp_path / "base", tmp_path / "tuned", tmp_path / "patch", rank=64)
    assert "base_model.model.transformer.wte.lora_embedding_A" in weights(tmp_path / "patch")
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "patch"
    ).eval()
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned").eval()
    with torch.no_grad():
        first, second = loaded(random_ids(2, 8)).logits, tuned(random_ids(2, 8)).logits
    assert (first - second).abs().max() < 1e-4 * second.abs().max()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_mixture_of_experts_at_one_rank_is_one_for_peft_too(family: str, tmp_path: Path) -> None:
    """Experts are apart on disk and joined in memory."""
    size = {"num_local_experts": 2, "num_experts": 2, "moe_intermediate_size": 8, "num_experts_per_tok": 1}
    size |= {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    size |= {"intermediate_size": 32, "vocab_size": 64, "head_dim": 8, "pad_token_id": 3}
    for name, seed in (("base", 1), ("tuned", 2)):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **size)).save_pretrained(tmp_path / name)
    edit_tensors(tmp_path / "tuned" / "model.safetensors", lambda s: _only_matrices(s, weights(tmp_path / "base")))
    extract_patch(tmp_path / "base", tmp_path / "tuned", tmp_path / "patch", rank=2)
    apply_patches([read_patch(tmp_path / "patch")], tmp_path / "base", tmp_path / "out")
    base, out = (AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("base", "out"))
    with torch.no_grad():
        expected, before = out(random_ids(2, 8)).logits, base(random_ids(2, 8)).logits
        found = PeftModel.from_pretrained(base, tmp_path / "patch").eval()(random_ids(2, 8)).logits
    assert (found - expected).abs().max() < 1e-5 < (expected - before).abs().max()


def _only_matrices(tuned: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The matrices of `tuned` that PEFT has a LoRA for: no norms, and no routers of experts."""
    return {n: base[n] if tensor.dim() != 2 or n.endswith(".gate.weight") else tensor for n, tensor in tuned.items()}


def test_large_full_deltas_against_themselves_and_damaged(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    size = {"hidden_size": 160, "vocab_size": 160, "num_layers": 1, "intermediate_size": 160}
    base, tuned = save_model(tmp_path / "base", seed=1, **size), save_model(tmp_path / "tuned", seed=2, **size)
    patch = tmp_path / "patch"
    extract_patch(base, tuned, patch, full=True)
    overall = inspect_patch(read_patch(patch), other=read_patch(patch), model=base, base=base).overall()
    assert (overall["residual_sigma_max"], overall["update_frobenius"], overall["cosine"]) == (0, 0, None)
    damaged = {**weights(base), Q: weights(base)[Q] * math.nan}
    save_file(damaged, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PatchError, match=r"q_proj\.weight holds NaN"):
        inspect_patch(read_patch(patch), model=base)
    edit_tensors(patch / "deltas.safetensors", lambda state: {**state, Q: state[Q] / 0})
    with pytest.raises(PatchError, match=r"q_proj\.weight holds NaN"):
        inspect_patch(read_patch(patch))
