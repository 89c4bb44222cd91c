"""Patches and models that cannot be added: one message that names what, both sides, and nothing written."""

from __future__ import annotations

import os
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.patch_cases import edit_json, edit_tensors, save_lora, save_model, weights
from helpers.tiny import make_model
from peft import IA3Config, LoHaConfig, get_peft_model
from safetensors.torch import save_file

from ensembler.errors import InputError, MemberError, OutputError, RunError
from ensembler.patch.apply import apply_patches
from ensembler.patch.extract import extract_patch
from ensembler.patch.formats import read_patch
from ensembler.patch.patch_plan import plan_patches

Damage = Callable[[Path, Path], Any]
PREFIX = "base_model.model."
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def config(**changes: Any) -> Damage:
    return lambda model, lora: edit_json(lora / "adapter_config.json", **changes)


def factors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    return lambda model, lora: edit_tensors(lora / "adapter_model.safetensors", change)


def again(**settings: Any) -> Damage:
    def damage(model: Path, lora: Path) -> None:
        shutil.rmtree(lora)
        save_lora(lora, **settings)

    return damage


def renamed(start: str, new: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: {new + name.removeprefix(start): tensor for name, tensor in tensors.items()}


def in_float64(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in tensors.items()}


def other_kind(kind: Any) -> Damage:
    def damage(model: Path, lora: Path) -> None:
        shutil.rmtree(lora)
        settings = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
        extra = {"feedforward_modules": []} if kind is IA3Config else {}
        get_peft_model(make_model(), kind(**settings, **extra)).save_pretrained(lora)

    return damage


def other_model(**settings: Any) -> Damage:
    def damage(model: Path, lora: Path) -> None:
        shutil.rmtree(model)
        save_model(model, **settings)

    return damage


def without_half(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "lora_A" in name or "layers.1" in name}


def fused(model: Path, lora: Path) -> None:
    """A checkpoint that keeps q, k and v in one matrix."""
    state = weights(model)
    for layer in range(2):
        names = [f"model.layers.{layer}.self_attn.{kind}_proj.weight" for kind in "qkv"]
        state[f"model.layers.{layer}.self_attn.qkv_proj.weight"] = torch.cat([state.pop(name) for name in names])
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})


def cut(path: Callable[[Path, Path], Path], keep: float) -> Damage:
    def damage(model: Path, lora: Path) -> None:
        file = path(model, lora)
        file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])

    return damage


def quantised(model: Path, lora: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    edit_tensors(model / WEIGHTS, lambda state: {**state, name: torch.ones(16, 16).to(torch.int8)})


def damaged_shape(model: Path, lora: Path) -> None:
    """The header says another shape than there are bytes for."""
    data = (model / WEIGHTS).read_bytes()
    length = 8 + struct.unpack("<Q", data[:8])[0]
    header = data[:length].replace(b'"shape":[64,16]', b'"shape":[64,17]')
    (model / WEIGHTS).write_bytes(header + data[length:])


def deeper(model: Path, lora: Path) -> None:
    other_model(num_layers=3)(model, lora)
    again(target_modules=["q_proj", "up_proj", "down_proj"])(model, lora)


def adapter_as_model(model: Path, lora: Path) -> None:
    shutil.copytree(lora, model, dirs_exist_ok=True)
    (model / "config.json").unlink()


def lost_shard(model: Path, lora: Path) -> None:
    other_model(shards=True)(model, lora)
    sorted(model.glob("*.safetensors"))[1].unlink()


WEIGHTS, FACTORS = "model.safetensors", "adapter_model.safetensors"
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
BAD: dict[str, tuple[Damage, str]] = {
    "another architecture": (
        again(family="gpt_neox"),
        r"8 of 8 tensors that .* does not have: gpt_neox\.layers\.0.* and 3 more",
    ),
    "a shape off": (
        other_model(intermediate_size=24),
        r"mlp\.\w+_proj\.weight changes a tensor of shape \(\d+, \d+\); in .* it has shape \(\d+, \d+\)",
    ),
    "more layers": (deeper, r"has 3 matrices .* holds nothing for: model\.layers\.2\."),
    "fewer layers": (other_model(num_layers=1), r"changes 7 of 14 tensors that .* does not have"),
    "fused": (fused, r"6 of 14 tensors .* keeps several of them in one matrix, such as .*qkv_proj"),
    "half a pair": (factors(without_half), "has no lora_B"),
    "ranks that differ": (factors(lambda t: {**t, A: torch.ones(3, 16)}), r"lora_A of shape \(3, 16\)"),
    "a rank not said": (config(r=5), "has rank 4; .* says 5"),
    "a 3-d factor": (factors(lambda t: {**t, A: torch.ones(4, 16, 1)}), r"\(4, 16, 1\)"),
    "nan": (factors(lambda t: {**t, A: t[A] * float("nan")}), r"q_proj\.lora_A\.weight holds NaN"),
    "inf": (factors(lambda t: {**t, B: t[B] / 0}), r"q_proj\.lora_B\.weight holds NaN or inf"),
    "integers": (factors(lambda t: {**t, A: torch.ones(4, 16).int()}), "stored as I32"),
    "dora": (again(use_dora=True), "DoRA"),
    "lora_bias": (again(target_modules=["q_proj"], lora_bias=True), "lora_bias=True"),
    "tokens": (again(target_modules=["q_proj"], trainable_token_indices=[1]), r"trainable_token_indices=\[1\]"),
    "pissa": (config(init_lora_weights="pissa_niter_4"), "init_lora_weights='pissa_niter_4'"),
    "a setting to come": (config(use_nothing_known=3), "use_nothing_known=3"),
    "loha": (other_kind(LoHaConfig), "of kind 'LOHA'"),
    "ia3": (other_kind(IA3Config), "of kind 'IA3'"),
    "pickle": (lambda m, p: (p / FACTORS).rename(p / "adapter_model.bin"), "--allow-pickle"),
    "no weights": (lambda m, p: (p / FACTORS).unlink(), "no adapter_model.safetensors"),
    "no patch": (lambda m, p: [file.unlink() for file in p.iterdir()], "holds no patch"),
    "no folder": (lambda m, p: shutil.rmtree(p), "there is no folder"),
    "broken config": (lambda m, p: (p / "adapter_config.json").write_text("{"), "cannot be read"),
    "a bad pattern": (config(rank_pattern={"(": 3}), "rank_pattern is damaged"),
    "a bad target": (config(target_modules="("), "no regular expression"),
    "cut patch": (cut(lambda m, p: p / FACTORS, 0.9), r"adapter_model.safetensors has .* is cut off"),
    "cut model": (cut(lambda m, p: m / WEIGHTS, 0.6), r"model\.safetensors has .*, so .* is cut off"),
    "cut header": (cut(lambda m, p: m / WEIGHTS, 0.01), "not a whole safetensors file"),
    "a damaged shape": (damaged_shape, r"of shape \(64, 17\)"),
    "quantised": (quantised, "stored as I8"),
    "float64": (lambda m, p: edit_tensors(m / WEIGHTS, in_float64), r"is float64, .*: python -c .*dtype=.float32"),
    "no tensors": (lambda m, p: save_file({}, p / FACTORS), "without tensors: DeepSpeed ZeRO-3 or FSDP"),
    "empty tensors": (
        factors(lambda t: {name: torch.empty(0) for name in t}),
        "has an empty lora_A or lora_B: DeepSpeed",
    ),
    "compiled": (factors(renamed("", "_orig_mod.")), r"wrapper of torch\.compile: _orig_mod\.base_model.*--unwrap"),
    "compiled inside": (factors(renamed(PREFIX, f"{PREFIX}_orig_mod.")), r"wrapper of torch\.compile: base_model"),
    "fsdp": (factors(renamed(PREFIX, f"{PREFIX}_fsdp_wrapped_module.")), r"wrapper of FSDP: .* has '_fsdp_wrapped"),
    "ddp": (factors(renamed("", "module.")), "wrapper of DataParallel or DeepSpeed: module"),
    "adapted twice": (factors(renamed(PREFIX, PREFIX * 2)), "wrapper of a second PeftModel"),
    "more tokens": (
        again(size={"vocab_size": 66}, target_modules=["q_proj", "embed_tokens"]),
        r"trained with 66 tokens, and .* has 64; resize it first, .*: python -c .*resize_token_embeddings\(66\)",
    ),
    "more tokens, whole": (
        again(size={"vocab_size": 66}, target_modules=["q_proj"], save={"save_embedding_layers": True}),
        r"trained with 66 tokens, and .* has 64; resize it first",
    ),
    "an adapter as the model": (adapter_as_model, "is an adapter"),
    "no config": (lambda m, p: (m / "config.json").unlink(), "no config.json"),
    "a lost shard": (lost_shard, "is named by .* and is not there"),
    "half a replacement": (again(target_modules=["q_proj"], modules_to_save=["lm_head"]), "at scale 1 only"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_before_anything_is_written(case: str, tmp_path: Path) -> None:
    damage, message = BAD[case]
    model, lora = save_model(tmp_path / "model"), save_lora(tmp_path / "lora")
    damage(model, lora)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    scale = 1.0 if "tokens" in case else 0.5
    with pytest.raises(InputError, match=message) as caught:
        apply_patches([read_patch(lora, scale=scale)], model, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("whole", [False, True])
def test_tied_embeddings_are_refused_by_name(target: str, whole: bool, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", tie_word_embeddings=True)
    targets = ["q_proj"] if whole else ["q_proj", target]
    lora = save_lora(tmp_path / "lora", target_modules=targets, modules_to_save=[target] if whole else None)
    with pytest.raises(InputError, match=rf"changes .*{target}\.weight, and .* ties"):
        plan_patches([read_patch(lora)], model)


def test_two_patches_that_replace_one_tensor(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    first = save_lora(tmp_path / "a", target_modules=["q_proj"], modules_to_save=["lm_head"])
    second = save_lora(tmp_path / "b", target_modules=["lm_head"])
    with pytest.raises(InputError, match=r"replaces lm_head\.weight, which another patch changes"):
        plan_patches([read_patch(first), read_patch(second)], model)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_strengths_are_finite(scale: float, tmp_path: Path) -> None:
    model, lora = save_model(tmp_path / "model"), save_lora(tmp_path / "lora")
    with pytest.raises(InputError, match="finite"):
        plan_patches([read_patch(lora, scale=scale)], model)


def test_nan_in_a_full_delta_leaves_nothing(tmp_path: Path) -> None:
    base, tuned = save_model(tmp_path / "base", seed=1), save_model(tmp_path / "tuned", seed=2)
    extract_patch(base, tuned, tmp_path / "patch", full=True)
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(tmp_path / "patch" / "deltas.safetensors", lambda t: {**t, name: t[name] / 0})
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        apply_patches([read_patch(tmp_path / "patch")], base, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "patch", "tuned"]


@pytest.mark.parametrize("name", ["lora/adapter_model.safetensors", "model/model.safetensors", "model/config.json"])
def test_a_file_that_is_lost_on_the_way_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, lora = save_model(tmp_path / "model"), save_lora(tmp_path / "lora")
    monkeypatch.setattr("ensembler.patch.apply._copy_other_files", lambda model, made: (tmp_path / name).unlink())
    with pytest.raises(MemberError, match=rf"{tmp_path / name} cannot be read \(No such file or directory\)"):
        apply_patches([read_patch(lora)], model, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora", "model"]


def test_a_full_disk_is_found_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, lora = save_model(tmp_path / "model"), save_lora(tmp_path / "lora")
    free = shutil._ntuple_diskusage(100_000, 90_000, 10_000)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(OutputError, match=r"10,000 bytes free, and \d\d,\d{3} are needed"):
        apply_patches([read_patch(lora)], model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_gives_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the write fails half-way in the same manner."""
    size = {"hidden_size": 256, "vocab_size": 2048}
    model, lora = save_model(tmp_path / "model", **size), save_lora(tmp_path / "lora", size=size)
    command = [sys.executable, "-m", "ensembler", "patch", "apply", lora, "--to", model, "--output", tmp_path / "out"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)),
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("Error: ")
    assert "could not be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora", "model"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_is_full_in_truth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(tmp_path / "model", hidden_size=256, vocab_size=2048)
    lora = save_lora(tmp_path / "lora", size={"hidden_size": 256, "vocab_size": 2048})
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(OutputError, match="bytes free"):
            apply_patches([read_patch(lora)], model, disk / "out")
        assert list(disk.iterdir()) == []
        plenty = shutil._ntuple_diskusage(10**12, 0, 10**12)  # type: ignore[attr-defined]
        monkeypatch.setattr(shutil, "disk_usage", lambda path: plenty)  # another program takes the rest meanwhile
        with pytest.raises(RunError, match="No space left on device; nothing was left"):
            apply_patches([read_patch(lora)], model, disk / "out")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)
