"""An extracted LoRA is one that PEFT reads, from any folder and for every kind of model, or it says that it is not."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import Run
from helpers.family_configs import make_tiny
from helpers.patch_cases import MULTIMODAL, save_model, weights
from helpers.tiny import make_tokenizer
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from ensembler import MemberConfig
from ensembler.engine.members import check_member
from ensembler.errors import PatchError
from ensembler.patch.apply import apply_patches
from ensembler.patch.extract import extract_patch
from ensembler.patch.formats import read_patch

IDS = torch.arange(4, 14)[None]
READ = (
    "llama",
    "gemma2",
    "gpt2",
    "gpt_neox",
    "opt",
    "biogpt",
    "mixtral",
    "qwen3_moe",
    "olmoe",
    "granitemoe",
    "gpt_oss",
)
NOT_READ = ("deepseek_v3", "glm4_moe", "phimoe", "qwen2_moe")  # PEFT drops the factors of experts, or some of them


def tune(base: Path, out: Path, *, of: str = "") -> Path:
    """Save a fine-tune that adds something of rank 1 to every matrix on disk whose name holds `of`."""
    AutoConfig.from_pretrained(base).save_pretrained(out)
    generator = torch.Generator().manual_seed(3)
    tensors = weights(base)
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and of in name:
            rows, columns = (0.3 * torch.randn(size, 1, generator=generator) for size in tensor.shape)
            tensors[name] = tensor + rows @ columns.T
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("family", [*READ, *NOT_READ, *MULTIMODAL])
def test_peft_reads_it_or_that_is_said(family: str, tmp_path: Path) -> None:
    auto: Any = AutoModelForCausalLM
    if family in MULTIMODAL:
        auto = AutoModelForImageTextToText
        torch.manual_seed(0)
        auto.from_config(AutoConfig.for_model(family, **MULTIMODAL[family])).save_pretrained(tmp_path / "base")
    else:
        make_tiny(family).save_pretrained(tmp_path / "base")
    tuned = tune(tmp_path / "base", tmp_path / "tuned")
    done = extract_patch(tmp_path / "base", tuned, tmp_path / "patch", rank=1)
    apply_patches([read_patch(tmp_path / "patch")], tmp_path / "base", tmp_path / "again")
    again = weights(tmp_path / "again")
    for name, tensor in weights(tuned).items():
        assert (again[name] - tensor).abs().max() < 2e-5, name
    assert (done.why_not_peft is None) == (family not in NOT_READ)
    assert json.loads((tmp_path / "patch" / "patch.json").read_text())["why_not_peft"] == done.why_not_peft
    if done.why_not_peft is not None:
        assert re.fullmatch(r"it finds no place for base_model.model.*", done.why_not_peft)
        return
    (tmp_path / "patch" / "deltas.safetensors").unlink(missing_ok=True)  # which PEFT drops
    apply_patches([read_patch(tmp_path / "patch")], tmp_path / "base", tmp_path / "low-rank")
    expected = logits(auto.from_pretrained(tmp_path / "low-rank"))
    found = logits(PeftModel.from_pretrained(auto.from_pretrained(tmp_path / "base"), tmp_path / "patch"))
    scale = (expected - logits(auto.from_pretrained(tmp_path / "base"))).abs().max()
    assert (found - expected).abs().max() < 1e-4 * scale, (found - expected).abs().max()


def test_its_base_is_found_from_any_folder_and_moves_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_model(tmp_path / "home" / "base")
    extract_patch(base, tune(base, tmp_path / "tuned", of="proj"), tmp_path / "home" / "patch", rank=1)
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "tuned"))
    monkeypatch.chdir("/")
    found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "home" / "patch")
    assert (logits(found) - expected).abs().max() < 1e-4 * expected.abs().max()
    (tmp_path / "home").rename(tmp_path / "moved")
    config = check_member("x", MemberConfig(str(tmp_path / "moved" / "patch"))).config
    assert config.model == str(tmp_path / "moved" / "base")


def test_the_tokenizer_of_the_fine_tuned_model_lies_beside_it(tmp_path: Path, run: Run) -> None:
    tmp_path = tmp_path / "it's mine"  # the command that is printed can be run as it is
    base = save_model(tmp_path / "base", vocab_size=66)
    make_tokenizer().save_pretrained(base)
    tuned = tune(base, tmp_path / "tuned", of="q_proj")
    make_tokenizer().save_pretrained(tuned)
    assert extract_patch(base, tuned, tmp_path / "same", rank=1).files == ()
    tokenizer = make_tokenizer(2)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(tuned)
    found = run("patch", "extract", "--base", base, "--finetuned", tuned, "--output", tmp_path / "patch", "--rank", 1)
    assert found.code == 0, found.err
    assert "the tokenizer of" in found.err
    read = AutoTokenizer.from_pretrained(tmp_path / "patch")
    assert (len(read), read.chat_template) == (66, tokenizer.chat_template)
    member = check_member("x", MemberConfig(str(base), adapter=str(tmp_path / "patch")))
    assert member.tokenizer is not None
    assert (len(member.tokenizer), member.tokenizer.chat_template) == (66, tokenizer.chat_template)
    applied = run("patch", "apply", tmp_path / "patch", "--to", base, "--output", tmp_path / "applied")
    command = re.search(r"patch was trained with it: (cp .*)\n", applied.err)
    assert command is not None
    assert shlex.split(command[1])[-1] == str(tmp_path / "applied")
    subprocess.run(command[1], shell=True, check=True)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "applied" / name).read_bytes() == (tuned / name).read_bytes()


def test_a_failure_to_try_peft_leaves_the_extraction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: Path) -> Any:
        raise OSError("no such disk")

    base, tuned = (save_model(tmp_path / name, seed=seed) for seed, name in enumerate(("base", "tuned")))
    monkeypatch.setattr("ensembler.patch.peft_check.stored_tensors", fail)
    done = extract_patch(base, tuned, tmp_path / "patch", rank=16)
    assert done.why_not_peft == "no such disk"
    assert read_patch(tmp_path / "patch").low_rank


def test_another_width_is_no_vocabulary_to_resize(tmp_path: Path) -> None:
    base, wider = save_model(tmp_path / "base"), save_model(tmp_path / "wider", hidden_size=32)
    with pytest.raises(PatchError, match="give two versions of one architecture") as caught:
        extract_patch(base, wider, tmp_path / "patch", rank=1)
    assert "resize" not in str(caught.value)


def test_added_tokens_are_resized_first_by_the_command_in_the_error(tmp_path: Path) -> None:
    tmp_path = tmp_path / "it's mine"
    base, larger = save_model(tmp_path / "base"), AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "larger"))
    larger.resize_token_embeddings(70)
    larger.save_pretrained(tmp_path / "larger")
    for old, new in ((base, tmp_path / "larger"), (tmp_path / "larger", base)):
        with pytest.raises(PatchError, match="resize the smaller vocabulary first: python -c") as caught:
            extract_patch(old, new, tmp_path / "patch", rank=1)
        assert "\n" not in str(caught.value)
        command = str(caught.value).partition("vocabulary first: ")[2]
    exec(shlex.split(command)[2], {})
    done = extract_patch(tmp_path / "base-70", tmp_path / "larger", tmp_path / "patch", full=True)
    assert {kept.name for kept in done.kept} >= {"model.embed_tokens.weight", "lm_head.weight"}


def test_a_tied_model_and_one_that_is_not(tmp_path: Path) -> None:
    tied = save_model(tmp_path / "tied", tie_word_embeddings=True)
    other = save_model(tmp_path / "other", seed=2)
    with pytest.raises(PatchError, match=r"tied has no lm_head.weight, .*; give two that both tie their head"):
        extract_patch(tied, other, tmp_path / "patch", rank=1)
