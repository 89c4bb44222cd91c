"""Quantised models that patches cannot be added to, and disks that fail: one sentence, and nothing half-written."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import Run
from helpers.patch_cases import edit_json, edit_tensors, save_lora, save_model
from helpers.quantized_models import SIZE, Change, edit_config, flipped, quantize_folder, without
from safetensors.torch import load_file, save_file

from ensembler.errors import InputError, OutputError, RunError
from ensembler.patch.apply import apply_patches
from ensembler.patch.formats import read_patch
from ensembler.patch.patch_plan import plan_patches

SCALE = 0.05
WEIGHTS = "model.safetensors"
Q = "model.layers.1.self_attn.q_proj"


def test_patterns_are_checked_before_anything_is_written(plain: Path, lora: Path, run: Run, tmp_path: Path) -> None:
    model = quantize_folder(plain, tmp_path / "model", "fp8-rows")
    for more in (["--check"], ["--output", tmp_path / "out"]):
        done = run("patch", "apply", lora, "--to", model, "--keep-bf16", "down_prj", *more)
        assert done.code == 2
        assert done.error.endswith(
            "--keep-bf16 down_prj matches no quantised module that the patch changes; did you mean down_proj?"
        )
    done = run("patch", "apply", lora, "--to", model, "--keep-bf16", "experts", "--check")
    assert done.error.endswith("; expected one of down_proj, q_proj, v_proj, or the name of one")
    done = run("patch", "apply", lora, "--to", plain, "--keep-bf16", "down_proj", "--check")
    assert done.error.endswith(
        "--keep-bf16 down_proj matches no quantised module that the patch changes; there is none: leave --keep-bf16 out"
    )
    assert not (tmp_path / "out").exists()


def test_layers_that_a_quantised_model_lacks_are_not_laid_to_its_scheme(
    plain: Path, lora: Path, run: Run, tmp_path: Path
) -> None:
    model = quantize_folder(plain, tmp_path / "model", "fp8-blocks")
    deeper = shutil.copytree(lora, tmp_path / "deeper")
    factors = load_file(lora / "adapter_model.safetensors")
    renamed = {name.replace("layers.1.", "layers.7."): factor for name, factor in factors.items()}
    save_file(renamed, deeper / "adapter_model.safetensors")
    done = run("patch", "apply", deeper, "--to", model, "--check")
    assert (done.code, "does not have: model.layers.7." in done.error) == (2, True), done.error
    assert done.error.endswith("it was made for another architecture")


def test_no_patch_is_extracted_from_quantised_models(plain: Path, lora: Path, run: Run, tmp_path: Path) -> None:
    model = quantize_folder(plain, tmp_path / "model", "fp8-blocks")
    apply_patches([read_patch(lora)], model, tmp_path / "tuned")
    for base, said in ((plain, f"tuned is quantised and {plain} is not"), (model, "is F8_E4M3 and differs")):
        done = run(
            "patch", "extract", "--base", base, "--finetuned", tmp_path / "tuned", "--output", tmp_path / "patch"
        )
        assert (done.code, said in done.error) == (2, True), done.error
        assert done.error.endswith("give both models in plain weights, before they were quantised")
    assert not (tmp_path / "patch").exists()


def in_blocks(change: Change) -> Callable[[Path], None]:
    return lambda model: edit_tensors(model / WEIGHTS, change)


def settings(**changes: Any) -> Callable[[Path], None]:
    return lambda model: edit_config(model, quantization_config=changes)


def cut(model: Path) -> None:
    file = model / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])


def nvfp4(name: str, values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.float8_e4m3fn) if name.endswith("weight_scale") else values


SCALE_INV = f"{Q}.weight_scale_inv"
BAD: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "another method": (
        "fp8-blocks",
        settings(quant_method="fbgemm_fp8"),
        r"down_proj\.weight in .* is stored as F8_E4M3 \(quant_method 'fbgemm_fp8' in its config\.json\); expected",
    ),
    "eight bits": (
        "gptq",
        settings(quant_method="gptq", bits=8, group_size=32),
        r"is quantised \(quant_method 'gptq', bits 8 in its config\.json\), and no scheme that is known holds these",
    ),
    "gemv": (
        "awq",
        settings(quant_method="awq", bits=4, group_size=32, version="gemv"),
        r"is quantised \(quant_method 'awq', bits 4, version 'gemv' in its config\.json\)",
    ),
    "a lost scale": ("fp8-blocks", in_blocks(without(SCALE_INV)), rf"there is no {SCALE_INV}; fetch the model again"),
    "lost zeros": ("awq", in_blocks(without(f"{Q}.qzeros")), rf"there is no {Q}\.qzeros; fetch"),
    "a lost shape": ("int4-rows", in_blocks(without(f"{Q}.weight_shape")), rf"there is no {Q}\.weight_shape"),
    "lost magnitudes": ("nf4", in_blocks(without(f"{Q}.weight.absmax")), rf"there is no {Q}\.weight\.absmax"),
    "scales of another shape": (
        "fp8-blocks",
        in_blocks(lambda t: {**t, SCALE_INV: torch.ones(2, 3)}),
        rf"{SCALE_INV} has shape \(2, 3\), which does not fit {Q}\.weight of shape \(128, 128\) in blocks of 128 x 128",
    ),
    "too many scales": (
        "gptq",
        in_blocks(lambda t: {**t, f"{Q}.scales": torch.ones(5, 128).half()}),
        rf"{Q}\.scales has shape \(5, 128\), which does not fit 128 x 128 values in groups of 32",
    ),
    "too few zeros": (
        "int4-rows-zeros",
        in_blocks(lambda t: {**t, f"{Q}.weight_zero_point": torch.ones(8, 4).int()}),
        r"weight_zero_point has shape \(8, 4\), which does not fit 128 x 128 values",
    ),
    "too few magnitudes": (
        "nf4-double",
        in_blocks(lambda t: {**t, f"{Q}.weight.absmax": t[f"{Q}.weight.absmax"][:-1]}),
        r"weight\.absmax has shape \(255,\), which does not fit 128 x 128 values in blocks of 64",
    ),
    "a damaged state": (
        "nf4",
        in_blocks(flipped(f"{Q}.weight.quant_state.bitsandbytes__nf4", 0)),
        r"quant_state\.bitsandbytes__nf4 is damaged; fetch the model again",
    ),
    "nan in scales": (
        "fp8-blocks",
        in_blocks(lambda t: {**t, SCALE_INV: t[SCALE_INV] * float("nan")}),
        rf"the codes or scales of {Q}\.weight hold NaN or infinity; fetch the model again",
    ),
    "nan in one scale of int4": (
        "gptq",
        in_blocks(lambda t: {**t, f"{Q}.scales": t[f"{Q}.scales"].index_fill(0, torch.tensor(1), float("inf"))}),
        rf"the codes or scales of {Q}\.weight hold NaN or infinity",
    ),
    "scales of a scheme that is not known, in e4m3": (
        "int4-rows",
        lambda model: (
            in_blocks(lambda t: {n: v.to(torch.uint8) if "packed" in n else nvfp4(n, v) for n, v in t.items()})(model),
            settings(quant_method="compressed-tensors", format="nvfp4-pack-quantized")(model),
        ),
        r"is quantised \(quant_method 'compressed-tensors', format 'nvfp4-pack-quantized' in its config\.json\), and",
    ),
    "empty scales": (
        "fp8-rows",
        in_blocks(lambda t: {**t, f"{Q}.weight_scale": torch.ones(128, 0)}),
        rf"{Q}\.weight_scale has shape \(128, 0\), which does not fit {Q}\.weight",
    ),
    "empty scales of int4": (
        "int4-rows",
        in_blocks(lambda t: {**t, f"{Q}.weight_scale": torch.ones(128, 0)}),
        rf"{Q}\.weight_scale has shape \(128, 0\), which does not fit 128 x 128 values",
    ),
    "groups that are not there": (
        "gptq-order",
        in_blocks(lambda t: {**t, f"{Q}.g_idx": t[f"{Q}.g_idx"] + 1}),
        rf"{Q}\.g_idx names groups 1 to 4, and there are 4; fetch the model again",
    ),
    "no group size": (
        "gptq",
        settings(quant_method="gptq", bits=4, group_size=None),
        r"the settings of its quantisation are damaged \(quant_method 'gptq', bits 4 in its config\.json: ",
    ),
    "groups of 0": (
        "awq",
        settings(quant_method="awq", bits=4, group_size=0),
        r"the settings of its quantisation are damaged \(quant_method 'awq', bits 4 in its config\.json: ",
    ),
    "blocks of one size": (
        "fp8-blocks",
        settings(quant_method="fp8", weight_block_size=[128]),
        r"the settings of its quantisation are damaged \(quant_method 'fp8' in its config\.json: ",
    ),
    "codes in another dtype": (
        "nf4",
        in_blocks(lambda t: {**t, f"{Q}.weight": t[f"{Q}.weight"].view(-1, 2).view(torch.bfloat16)}),
        rf"keeps the codes of {Q}\.weight as BF16 \(bnb_4bit_quant_storage\); expected U8: save it with uint8",
    ),
    "rotated weights": (
        "int4-rows",
        settings(quant_method="compressed-tensors", transform_config={"config_groups": {"R1": {"type": "hadamard"}}}),
        r"has weights that are rotated \(transform_config in its config\.json\), and patches are for those before that",
    ),
    "a cut file": ("fp8-rows", cut, "is cut off; fetch it again"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_models_are_told_in_one_sentence_and_leave_nothing(
    case: str, plain: Path, lora: Path, tmp_path: Path
) -> None:
    kind, damage, message = BAD[case]
    model = quantize_folder(plain, tmp_path / "model", kind)
    damage(model)
    with pytest.raises(InputError, match=message) as caught:
        apply_patches([read_patch(lora, scale=SCALE)], model, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("base", ["model", "plain"])
def test_patches_of_the_model_before_awq_are_warned_of(base: str, plain: Path, lora: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(lora, tmp_path / "lora")
    edit_json(copy / "adapter_config.json", base_model_name_or_path=f"org/{base}")
    for kind in ("awq", "gptq"):
        model = quantize_folder(plain, tmp_path / kind / "model", kind)
        lines = plan_patches([read_patch(copy)], model).warnings
        found = [line for line in lines if "AWQ has scaled the inputs of layers" in line]
        assert len(found) == (kind == "awq" and base == "plain")


def test_a_weight_that_one_patch_replaces_and_another_changes(plain: Path, lora: Path, tmp_path: Path) -> None:
    model = quantize_folder(plain, tmp_path / "model", "fp8-blocks")
    whole = save_lora(tmp_path / "whole", size=SIZE, target_modules=["q_proj"], modules_to_save=["down_proj"])
    with pytest.raises(
        InputError, match=r"replaces .*down_proj\.weight, which another patch changes too; leave one out"
    ):
        plan_patches([read_patch(whole), read_patch(lora)], model)


LARGE = {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 1024, "initializer_range": 0.05}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An FP8 model of 7 MB, and a LoRA."""
    folder = tmp_path_factory.mktemp("large")
    model = quantize_folder(save_model(folder / "plain", dtype=torch.bfloat16, **LARGE), folder / "model", "fp8-blocks")
    return model, save_lora(folder / "lora", size=LARGE, target_modules=["q_proj", "down_proj"])


def test_a_disk_that_fills_up_leaves_nothing(large: tuple[Path, Path], tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the write fails half-way in the same manner."""
    model, lora = large
    command = [sys.executable, "-m", "ensembler", "patch", "apply", lora, "--to", model, "--output", tmp_path / "out"]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))  # noqa: E731
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("Error: ")
    assert "could not be written" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
@pytest.mark.parametrize("keep", [(), ("down_proj",)], ids=len)
def test_a_disk_that_is_full_or_may_only_be_read(
    keep: tuple[str, ...], large: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, lora = large
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(OutputError, match="bytes free"):
            apply_patches([read_patch(lora)], model, disk / "out", keep_bf16=keep)
        assert list(disk.iterdir()) == []
        plenty = shutil._ntuple_diskusage(10**12, 0, 10**12)  # type: ignore[attr-defined]
        monkeypatch.setattr(shutil, "disk_usage", lambda path: plenty)  # another program takes the rest meanwhile
        with pytest.raises(RunError, match="No space left on device; nothing was left"):
            apply_patches([read_patch(lora)], model, disk / "out", keep_bf16=keep)
        assert list(disk.iterdir()) == []
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True, capture_output=True)
        with pytest.raises(RunError, match="Read-only file system; nothing was left"):
            apply_patches([read_patch(lora)], model, disk / "out", keep_bf16=keep)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_failure_half_way_leaves_nothing(
    large: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ensembler.patch.schemes.fp8 import FP8

    model, lora = large
    calls = []

    def fails(self: Any, values: Any, parts: Any, largest: Any = None) -> Any:
        calls.append(len(values))
        if len(calls) == 5:
            raise RunError("stopped")
        return quantize(self, values, parts, largest)

    quantize = FP8.quantize
    monkeypatch.setattr(FP8, "quantize", fails)
    with pytest.raises(RunError, match="stopped"):
        apply_patches([read_patch(lora)], model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
