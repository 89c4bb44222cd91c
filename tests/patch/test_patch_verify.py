"""`patch verify`: passes what `patch apply` wrote, in every scheme, and finds what is something else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import Run
from helpers.patch_cases import edit_tensors, save_lora, save_model
from helpers.quantized_models import KINDS, SIZE, Change, flipped, quantize_folder, without

from ensembler.errors import RunError
from ensembler.patch.apply import apply_patches
from ensembler.patch.extract import extract_patch
from ensembler.patch.formats import read_patch
from ensembler.patch.patch_plan import PatchPlan, plan_patches
from ensembler.patch.verify import verify_applied
from ensembler.safetensors_files import read_model

SCALE = 0.05
ALL = 10**6
WEIGHTS = "model.safetensors"


def applied(model: Path, lora: Path, out: Path, **options: Any) -> PatchPlan:
    plan = plan_patches([read_patch(lora, scale=SCALE)], model)
    apply_patches([read_patch(lora, scale=SCALE)], model, out, **options)
    return plan


@pytest.mark.parametrize("options", [{}, {"keep_bf16": ["down_proj", "q_proj"]}, {"dtype": "float16"}], ids=len)
@pytest.mark.parametrize("kind", KINDS)
def test_what_apply_wrote_passes(kind: str, options: dict[str, Any], plain: Path, lora: Path, tmp_path: Path) -> None:
    model = quantize_folder(plain, tmp_path / "model", kind, num_files=2, dtype=torch.bfloat16)
    plan = applied(model, lora, tmp_path / "out", **options)
    done = verify_applied(plan, tmp_path / "out", num_blocks=ALL)
    assert done.num_tensors == len(read_model(tmp_path / "out").tensors)
    assert verify_applied(plan, tmp_path / "out", num_blocks=1).num_blocks <= done.num_blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cast", [None, "float32", "bfloat16", "float16"])
def test_plain_models_pass(cast: str | None, dtype: torch.dtype, tmp_path: Path) -> None:
    """More blocks than one in the largest tensors, and tensors of other kinds that nothing changes."""
    size = {"hidden_size": 256, "intermediate_size": 1024}
    model = save_model(tmp_path / "model", dtype=dtype, **size)
    odd = {"old.mask": torch.ones(3, 5, dtype=torch.bool), "old.count": torch.tensor(7), "old.empty": torch.ones(0, 4)}
    edit_tensors(model / WEIGHTS, lambda tensors: {**tensors, **odd, "old.double": torch.ones(2).double()})
    lora = save_lora(tmp_path / "lora", size=size)
    plan = applied(model, lora, tmp_path / "out", dtype=cast)
    done = verify_applied(plan, tmp_path / "out", num_blocks=ALL)
    assert done.num_tensors == len(plan.model.tensors)
    assert done.num_blocks > done.num_tensors


def test_several_patches_and_full_deltas(plain: Path, lora: Path, tmp_path: Path) -> None:
    model = quantize_folder(plain, tmp_path / "model", "gptq")
    extract_patch(plain, save_model(tmp_path / "tuned", seed=2, **SIZE), tmp_path / "full", full=True)
    patches = [read_patch(lora, scale=SCALE), read_patch(tmp_path / "full", scale=0.1)]
    apply_patches(patches, model, tmp_path / "out")
    verify_applied(plan_patches(patches, model), tmp_path / "out", num_blocks=ALL)
    with pytest.raises(RunError, match=r"is not .* with the patch at these strengths"):
        verify_applied(plan_patches(patches[:1], model), tmp_path / "out")


Q = "model.layers.1.self_attn.q_proj"
OTHERS: dict[str, tuple[Change, str]] = {
    "a byte of a changed weight": (flipped(f"{Q}.weight", -3), rf"1 of 35 tensors differ, {Q}\.weight; .* again"),
    "a byte of its scale": (flipped(f"{Q}.weight_scale_inv", 1), rf"tensors differ, {Q}\.weight_scale_inv"),
    "a byte of a weight that stays": (flipped("model.layers.0.mlp.up_proj.weight", 20_000), r"up_proj\.weight"),
    "a byte of a plain tensor": (flipped("model.norm.weight", 5), r"differ, model\.norm\.weight"),
    "a lost tensor": (without("model.norm.weight"), r"lacks model\.norm\.weight: it is not"),
    "one more": (lambda t: {**t, "more": torch.ones(1)}, "has more beside: it is not"),
    "another shape": (lambda t: {**t, "lm_head.weight": t["lm_head.weight"].T.contiguous()}, r"lm_head\.weight"),
    "another dtype": (lambda t: {**t, f"{Q}.weight_scale_inv": t[f"{Q}.weight_scale_inv"].double()}, "scale_inv"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_something_else_is_found_by_name(case: str, plain: Path, lora: Path, tmp_path: Path) -> None:
    change, message = OTHERS[case]
    model = quantize_folder(plain, tmp_path / "model", "fp8-blocks")
    plan = applied(model, lora, tmp_path / "out")
    edit_tensors(tmp_path / "out" / WEIGHTS, change)
    with pytest.raises(RunError, match=message) as caught:
        verify_applied(plan, tmp_path / "out", num_blocks=ALL)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["fp8-blocks", "int4-rows-zeros", "awq", "nf4-double"])
def test_every_byte_of_a_changed_module_counts(kind: str, plain: Path, lora: Path, tmp_path: Path) -> None:
    model = quantize_folder(plain, tmp_path / "model", kind)
    plan = applied(model, lora, tmp_path / "out")
    names = [name for name in read_model(tmp_path / "out").tensors if name.startswith(f"{Q}.")]
    for number, name in enumerate(names):
        copy = shutil.copytree(tmp_path / "out", tmp_path / f"copy-{number}")
        edit_tensors(copy / WEIGHTS, flipped(name, (number * 977) % read_model(copy).tensors[name].num_bytes))
        with pytest.raises(RunError, match=rf"1 of \d+ tensors differ, {name}"):
            verify_applied(plan, copy, num_blocks=ALL)


def test_another_strength_patch_and_model(plain: Path, lora: Path, tmp_path: Path) -> None:
    model = quantize_folder(plain, tmp_path / "model", "fp8-blocks")
    plan = applied(model, lora, tmp_path / "out")
    other = quantize_folder(save_model(tmp_path / "other", seed=2, **SIZE), tmp_path / "other-model", "fp8-blocks")
    second = save_lora(tmp_path / "second", seed=2, size=SIZE, target_modules=["q_proj", "v_proj", "down_proj"])
    for wrong in (
        plan_patches([read_patch(lora, scale=0.06)], model),
        plan_patches([read_patch(second, scale=SCALE)], model),
        plan_patches([read_patch(lora, scale=SCALE)], other),
    ):
        with pytest.raises(RunError, match="differ"):
            verify_applied(wrong, tmp_path / "out")
    with pytest.raises(RunError, match="16 of 21 tensors differ"):
        verify_applied(plan, plain)
    verify_applied(plan, tmp_path / "out")


def test_a_sample_reads_a_part_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ensembler.patch import addition, verify

    size = {"hidden_size": 256, "vocab_size": 32768, "intermediate_size": 2048}
    plain = save_model(tmp_path / "plain", **size)
    model = quantize_folder(plain, tmp_path / "model", "fp8-blocks")
    lora = save_lora(tmp_path / "lora", size=size, target_modules=["down_proj"])
    plan = applied(model, lora, tmp_path / "out")
    num_read = [0]

    def counting(read: Any, count: Callable[[Any], int]) -> Any:
        def counted(*args: Any, **options: Any) -> Any:
            found = read(*args, **options)
            num_read[0] += count(found)
            return found

        return counted

    monkeypatch.setattr(verify, "_read", counting(verify._read, len))
    monkeypatch.setattr("ensembler.patch.requantize.read_tensor", counting(addition.read_tensor, lambda t: t.nbytes))
    verify_applied(plan, tmp_path / "out", num_blocks=1)
    assert num_read[0] < 0.3 * 2 * plan.model.num_bytes


def test_the_command(plain: Path, lora: Path, run: Run, tmp_path: Path) -> None:
    model = quantize_folder(plain, tmp_path / "model", "nf4-double")
    out = tmp_path / "out"
    done = run("patch", "apply", lora, "--to", model, "--scale", SCALE, "--keep-bf16", "down_proj", "--output", out)
    assert done.code == 0, done.err
    assert "4 modules" not in done.err
    for name in ("self_attn.q_proj", "self_attn.v_proj"):
        assert f"model.layers.0.{name}" in done.out
    assert "not quantised any more: 2 down_proj" in done.out
    assert "mlp.down_proj" not in done.out
    done = run("patch", "verify", model, lora, out, "--scale", SCALE)
    assert done.code == 0, done.err
    assert "blocks of" in done.out
    done = run("patch", "verify", model, lora, out)
    assert done.code == 1
    assert "with the patch at these strengths" in done.error
    assert done.error.endswith("give the --scale, --also and --transport that apply was given, or apply it again")


def test_losses_are_warned_of(plain: Path, lora: Path, run: Run, tmp_path: Path) -> None:
    model = quantize_folder(plain, tmp_path / "model", "int4-rows")
    command = ["patch", "apply", lora, "--to", model, "--scale", 0.001]
    done = run(*command, "--output", tmp_path / "out")
    assert done.code == 0
    assert "6 of 6 quantised modules lost more than 0.5 of the patch" in done.err
    for kind in ("q_proj", "v_proj", "down_proj"):
        assert f"--keep-bf16 {kind}" in done.err
    done = run(*command, "--output", tmp_path / "more", "--max-loss", 50)
    assert "lost more" not in done.err
    card = (tmp_path / "more" / "README.md").read_text()
    assert "6 modules were quantised again (INT4 in groups of 32 (compressed-tensors)), which lost " in card
