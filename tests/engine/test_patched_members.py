"""A member with a patch: the weights that `patch apply` writes, or the LoRA beside a quantised base."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapter_cases import alone, last_logits, roles_of_forwards, save_adapter, save_base
from helpers.commands import Run
from helpers.patch_cases import edit_json, edit_tensors, weights
from peft import PeftModel
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedModel

from ensembler import EnsembleForCausalLM, MemberConfig
from ensembler.engine.members import check_member, load_group
from ensembler.errors import MemberError
from ensembler.patch.apply import apply_patches
from ensembler.patch.extract import extract_patch
from ensembler.patch.formats import read_patch

IDS = torch.tensor([[5, 9, 11, 20, 7, 6]])
NORM = "model.norm.weight"


def load(config: MemberConfig) -> PreTrainedModel:
    (model,) = load_group([check_member("x", config)]).models.values()
    return model


def shifted(base: Path, out: Path, *, seed: int = 9, size: float = 0.05) -> Path:
    """A full fine-tune of `base`: every weight a little different."""
    model = AutoModelForCausalLM.from_pretrained(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(out)
    return out


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base", seed=1)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return save_base(tmp_path / "target", seed=2)


KINDS: dict[str, dict[str, Any]] = {"lora": {}, "rank": {"rank": 3}, "energy": {"energy": 0.5}, "full": {"full": True}}


@pytest.fixture(params=KINDS)
def patch(request: pytest.FixtureRequest, base: Path, tmp_path: Path) -> Path:
    if request.param == "lora":
        return save_adapter(base, tmp_path / "patch")
    extract_patch(base, shifted(base, tmp_path / "tuned"), tmp_path / "patch", **KINDS[request.param])
    return tmp_path / "patch"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_patched_member_has_the_weights_that_apply_writes(
    target: Path, patch: Path, tmp_path: Path, dtype: str
) -> None:
    AutoModelForCausalLM.from_pretrained(target, dtype=dtype).save_pretrained(target)
    apply_patches([read_patch(patch)], target, tmp_path / "applied")
    model = load(MemberConfig(str(target), adapter=str(patch)))
    written = weights(tmp_path / "applied")
    before = weights(target)
    assert {name: weight.dtype for name, weight in written.items()} == dict.fromkeys(written, getattr(torch, dtype))
    assert any(not torch.equal(written[name], before[name]) for name in written)
    loaded = dict(model.named_parameters(remove_duplicate=False))
    for name, expected in written.items():
        assert torch.equal(loaded[name], expected), name


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen2", "gpt_neox"])
@pytest.mark.parametrize("kind", KINDS)
def test_families(tmp_path: Path, family: str, kind: str) -> None:
    """Tied embeddings (gpt2, gemma2), transposed layers (gpt2), biases (qwen2), fused ones (gpt_neox)."""
    base, target = save_base(tmp_path / "base", family, 1), save_base(tmp_path / "target", family, 2)
    if kind == "lora":
        save_adapter(base, tmp_path / "patch")
    else:
        extract_patch(base, shifted(base, tmp_path / "tuned"), tmp_path / "patch", **KINDS[kind])
    apply_patches([read_patch(tmp_path / "patch")], target, tmp_path / "applied")
    expected = last_logits(alone(tmp_path / "applied"), IDS)
    found = last_logits(load(MemberConfig(str(target), adapter=str(tmp_path / "patch"))), IDS)
    assert torch.equal(found, expected)
    assert (expected - last_logits(alone(target), IDS)).abs().max() > 0.01


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt", "qwen2"])
def test_a_patch_with_deltas_shares_the_backbone(tmp_path: Path, family: str) -> None:
    """source_ft is source_pt and what extract made of a full fine-tune: factors; norms and tied weights as deltas."""
    base = save_base(tmp_path / "base", family, seed=1)
    extract_patch(base, shifted(base, tmp_path / "tuned"), tmp_path / "patch", rank=4)
    apply_patches([read_patch(tmp_path / "patch")], base, tmp_path / "applied")
    members = {"reference": str(base), "aligned": MemberConfig(str(base), adapter=str(tmp_path / "patch"))}
    model = EnsembleForCausalLM.from_members(rule="realign", alpha=0.7, members=members)
    assert roles_of_forwards(model) == [("reference", "aligned")]
    for role, folder in (("aligned", tmp_path / "applied"), ("reference", base), ("aligned", tmp_path / "applied")):
        assert_close(last_logits(model.members[role], IDS), last_logits(alone(folder), IDS), atol=2e-5, rtol=1e-5)
    copies = EnsembleForCausalLM.from_members(
        rule="realign", alpha=0.7, members={"reference": str(base), "aligned": str(tmp_path / "applied")}
    )
    assert_close(last_logits(model, IDS), last_logits(copies, IDS), atol=5e-5, rtol=1e-5)
    assert model.generate(IDS, max_new_tokens=8).tolist() == copies.generate(IDS, max_new_tokens=8).tolist()


def test_full_deltas_make_a_model_of_their_own(base: Path, tmp_path: Path) -> None:
    extract_patch(base, shifted(base, tmp_path / "tuned"), tmp_path / "patch", full=True)
    members = {"reference": str(base), "aligned": MemberConfig(str(base), adapter=str(tmp_path / "patch"))}
    model = EnsembleForCausalLM.from_members(rule="realign", members=members)
    assert roles_of_forwards(model) == [("reference",), ("aligned",)]
    assert_close(
        last_logits(model.members["aligned"], IDS), last_logits(alone(tmp_path / "tuned"), IDS), atol=1e-4, rtol=1e-4
    )
    assert torch.equal(last_logits(model.members["reference"], IDS), last_logits(alone(base), IDS))


@pytest.mark.parametrize("kind", ["rank", "full"])
def test_a_patch_as_a_member_is_its_base_with_it(base: Path, tmp_path: Path, kind: str) -> None:
    """The base is found by the record of `extract`, relative to the patch."""
    extract_patch(base, shifted(base, tmp_path / "tuned"), tmp_path / "patch", **KINDS[kind])
    found = load(MemberConfig(str(tmp_path / "patch")))
    assert torch.equal(
        last_logits(found, IDS), last_logits(load(MemberConfig(str(base), adapter=str(tmp_path / "patch"))), IDS)
    )


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """Layers wide enough for the blocks of bitsandbytes."""
    return save_base(tmp_path / "wide", seed=4, hidden_size=64, intermediate_size=128)


def test_on_a_quantised_base_the_lora_is_kept_and_norms_are_added(wide: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tuned = shifted(wide, tmp_path / "tuned")
    extract_patch(wide, tuned, tmp_path / "patch", rank=4)
    with_embeddings = set(weights(tmp_path / "patch")) - {key for key in weights(tmp_path / "patch") if "lora" in key}
    assert NORM in with_embeddings
    quantised = load(MemberConfig(str(wide), quantization="nf4", adapter=str(tmp_path / "patch")))
    plain = load(MemberConfig(str(wide), quantization="nf4"))
    patched = load(MemberConfig(str(wide), adapter=str(tmp_path / "patch")))
    norm = dict(quantised.named_parameters())[NORM]
    assert torch.equal(norm, dict(patched.named_parameters())[NORM])
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if "norm" in name:
                weight.copy_(dict(patched.named_parameters())[name])
    beside = PeftModel.from_pretrained(plain, tmp_path / "patch").eval()
    assert_close(last_logits(quantised, IDS), last_logits(beside, IDS), atol=1e-4, rtol=1e-4)


def test_full_deltas_of_quantised_weights_are_refused(wide: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    extract_patch(wide, shifted(wide, tmp_path / "tuned"), tmp_path / "patch", full=True)
    with pytest.raises(MemberError, match=r"full delta for .*quantised.*ensembler patch apply"):
        load(MemberConfig(str(wide), quantization="nf4", adapter=str(tmp_path / "patch")))


def test_the_folder_of_an_ensemble_keeps_the_patch(base: Path, target: Path, patch: Path, tmp_path: Path) -> None:
    members = {"reference": str(base), "aligned": MemberConfig(str(target), adapter=str(patch))}
    model = EnsembleForCausalLM.from_members(rule="realign", alpha=0.5, members=members)
    for name, copy_members in (("a", False), ("b", True)):
        model.save_pretrained(tmp_path / name, copy_members=copy_members)
        loaded = EnsembleForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(last_logits(loaded, IDS), last_logits(model, IDS))


# -- what does not fit ------------------------------------------------------------------------------------------------


def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("model.norm", "model.other"): tensor for name, tensor in tensors.items()}


def cut(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor[:3].clone() if name == NORM else tensor for name, tensor in tensors.items()}


def whole_numbers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.int() if name == NORM else tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (rename, r"x: the patch .* changes model.other.weight, which .*target does not have"),
        (cut, r"x: model.norm.weight in the patch .* has shape \(3,\); in .*target it has \(\d+,\)"),
        (whole_numbers, "x: .*model.norm.weight is stored as I32; expected one of float32, bfloat16, float16"),
    ],
)
@pytest.mark.parametrize("kind", ["rank", "full"])
def test_what_does_not_fit_is_found_before_loading(
    base: Path, target: Path, tmp_path: Path, kind: str, harm: Callable[[Any], Any], message: str
) -> None:
    extract_patch(base, shifted(base, tmp_path / "tuned"), tmp_path / "patch", **KINDS[kind])
    edit_tensors(tmp_path / "patch" / "deltas.safetensors", harm)
    with pytest.raises(MemberError, match=message) as caught:
        check_member("x", MemberConfig(str(target), adapter=str(tmp_path / "patch")))
    assert "\n" not in str(caught.value)


def test_deltas_beside_an_adapter_that_is_no_sum_are_not_dropped(base: Path, tmp_path: Path) -> None:
    extract_patch(base, shifted(base, tmp_path / "tuned"), tmp_path / "patch", rank=2)
    edit_json(tmp_path / "patch" / "adapter_config.json", use_dora=True)
    with pytest.raises(MemberError, match=r"x: .*is a DoRA"):
        check_member("x", MemberConfig(str(base), adapter=str(tmp_path / "patch")))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_nan_in_a_patch(base: Path, target: Path, tmp_path: Path, kind: str) -> None:
    file = "adapter_model.safetensors" if kind == "lora" else "deltas.safetensors"
    if kind == "lora":
        save_adapter(base, tmp_path / "patch")
    else:
        extract_patch(base, shifted(base, tmp_path / "tuned"), tmp_path / "patch", full=True)
    edit_tensors(
        tmp_path / "patch" / file, lambda tensors: {k: torch.full_like(t, torch.nan) for k, t in tensors.items()}
    )
    with pytest.raises(MemberError, match="holds NaN or infinity"):
        load(MemberConfig(str(target), adapter=str(tmp_path / "patch")))


# -- on the command line ----------------------------------------------------------------------------------------------


def test_a_patch_of_another_base_is_a_note(base: Path, target: Path, patch: Path, said: list[str]) -> None:
    said.clear()
    for model, notes in ((base, []), (target, [rf"x: the (adapter|patch) .* was made for .*, not {target}"])):
        adapter = check_member("x", MemberConfig(str(model), adapter=str(patch))).adapter
        assert adapter is not None
        assert len(adapter.notes) == len(notes)
        assert all(re.fullmatch(*both) for both in zip(notes, adapter.notes, strict=True)), adapter.notes
    assert said == []


def test_the_command_line(base: Path, target: Path, tmp_path: Path, run: Run) -> None:
    save_adapter(base, tmp_path / "lora")
    apply_patches([read_patch(tmp_path / "lora")], target, tmp_path / "applied")
    common = ["generate", "--rule", "eft", "--source-ft", str(base), "--source-pt", str(base), "--alpha", "0"]
    common += ["--prompt", "a b c", "--max-new-tokens", "8"]
    applied = run(*common, "--target-pt", str(tmp_path / "applied"))
    assert applied.code == 0, applied.err
    for patch in (str(tmp_path / "lora"), f"target_pt={tmp_path / 'lora'}"):
        patched = run(*common, "--target-pt", str(target), "--patch", patch)
        assert patched.code == 0, patched.err
        assert patched.out == applied.out
    assert run(*common, "--target-pt", str(target)).out != applied.out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--patch", "A", "--patch", "target_pt=B"], "--patch was given twice for 'target_pt'"),
        (["--patch", "source_ft=A", "--source-ft-adapter", "B"], "source_ft, which has an adapter already (B)"),
        (["--patch", "nowhere"], "nowhere"),
    ],
)
def test_mistakes(base: Path, target: Path, run: Run, given: list[str], message: str) -> None:
    found = run("generate", *given, "--source-pt", str(base), "--target-pt", str(target), "--prompt", "a",
                *([] if "--source-ft-adapter" in given else ["--source-ft", str(base)]))  # fmt: skip
    assert found.code == 2
    assert message in found.err
    assert found.err.count("\n") == 1, found.err


def test_without_a_target(base: Path, run: Run) -> None:
    members = ["--member", f"reference={base}", "--member", f"aligned={base}"]
    found = run("generate", "--rule", "realign", *members, "--patch", "p", "--prompt", "a")
    assert found.code == 2
    assert "there is no target_pt; give ROLE=PATCH with one of reference, aligned" in found.err
