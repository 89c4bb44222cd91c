"""Adapters whose files hold more than a LoRA, or were made for another base."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapter_cases import (
    IDS,
    PADDED,
    alone,
    last_logits,
    merged,
    roles_of_forwards,
    save_adapter,
    save_base,
    targets,
    tokens,
    weight_bytes,
)
from helpers.commands import Run
from helpers.patch_cases import edit_tensors
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import PreTrainedModel

from ensembler import EnsembleForCausalLM, MemberConfig
from ensembler.engine.members import check_member
from ensembler.errors import EnsemblerError, MemberError

OTHERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "dora": ("llama", lambda family: LoraConfig(r=4, target_modules=targets(family), use_dora=True)),
    "lora_bias": ("opt", lambda family: LoraConfig(r=4, target_modules=targets(family), lora_bias=True)),
    "ia3": (
        "llama",
        lambda family: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "loha": ("gpt_neox", lambda family: LoHaConfig(r=4, target_modules=targets(family))),
    "lokr": ("mistral", lambda family: LoKrConfig(r=4, target_modules=targets(family))),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_adapters_run_one_by_one_on_one_copy(
    tmp_path: Path, pair_target: PreTrainedModel, said: list[str], kind: str
) -> None:
    family, config = OTHERS[kind]
    base = save_base(tmp_path / "base", family)
    adapter = save_adapter(base, tmp_path / "adapter", config(family))
    said.clear()
    members = {
        "source_ft": MemberConfig(str(base), adapter=str(adapter)),
        "source_pt": str(base),
        "target_pt": pair_target,
    }
    shared = EnsembleForCausalLM.from_members(alpha=0.7, members=members)
    assert [line for line in said if "share their weights and not their forward" in line] == said
    assert len(said) == 1
    assert roles_of_forwards(shared) == [("source_ft",), ("source_pt",), ("target_pt",)]
    patched = PeftModel.from_pretrained(alone(base), adapter).eval()
    z = {"source_pt": last_logits(alone(base), IDS), "source_ft": last_logits(patched, IDS)}
    assert (z["source_ft"] - z["source_pt"]).abs().max() > 0.1
    for _ in range(2):  # in any order, and again
        for role in ("source_pt", "source_ft", "source_pt"):
            assert_close(last_logits(shared.members[role], IDS), z[role], atol=1e-5, rtol=1e-5)
        combined = z["source_ft"] + 0.7 * (last_logits(pair_target, IDS) - z["source_pt"])
        assert_close(last_logits(shared, IDS), combined, atol=2e-5, rtol=1e-5)
    copies = EnsembleForCausalLM.from_members(
        alpha=0.7, members={"source_ft": patched.base_model.model, "source_pt": alone(base), "target_pt": pair_target}
    )
    for options in ({}, {"num_beams": 3}):
        assert tokens(shared, PADDED, **options) == tokens(copies, PADDED, **options)
    embeddings = [shared.members[role].get_input_embeddings() for role in ("source_ft", "source_pt")]
    assert len({getattr(layer, "base_layer", layer).weight.data_ptr() for layer in embeddings}) == 1
    num_bytes, own = weight_bytes(alone(base)), weight_bytes(patched) - weight_bytes(alone(base))
    assert weight_bytes(shared) - weight_bytes(pair_target) == num_bytes + own
    assert len(said) == 1


def test_two_other_adapters_keep_to_themselves(tmp_path: Path) -> None:
    """Biases of two adapters and of the base: the last that was loaded must not be everyone's."""
    base = save_base(tmp_path / "base", "opt")
    paths = {
        role: save_adapter(base, tmp_path / role, LoraConfig(r=2, target_modules=["q_proj"], bias="all"), seed=seed)
        for seed, role in enumerate("ab")
    }
    plain = save_adapter(base, tmp_path / "plain")
    members: dict[str, Any] = {role: MemberConfig(str(base), adapter=str(path)) for role, path in paths.items()}
    members |= {"c": MemberConfig(str(base), adapter=str(plain)), "d": str(base)}
    model = EnsembleForCausalLM.from_members(rule="linear", members=members, constant=dict.fromkeys("abcd", 1.0))
    expected = {role: PeftModel.from_pretrained(alone(base), path).eval() for role, path in paths.items()}
    expected |= {"c": merged(base, plain), "d": alone(base)}
    for role in "dabcadbc":
        actual = last_logits(model.members[role], IDS)
        assert_close(actual, last_logits(expected[role], IDS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_embeddings_in_the_adapters_file_are_its_own(tmp_path: Path, shared: bool) -> None:
    """PEFT saves embeddings beside a LoRA where it is asked to: a member gets them, and its base does not."""
    base = save_base(tmp_path / "base")

    def train(model: PreTrainedModel) -> None:
        torch.nn.init.normal_(model.get_input_embeddings().weight)

    adapter = save_adapter(base, tmp_path / "adapter", change=train, save={"save_embedding_layers": True})
    other = base if shared else save_base(tmp_path / "other", seed=8)
    members = {"reference": str(other), "aligned": MemberConfig(str(base), adapter=str(adapter))}
    model = EnsembleForCausalLM.from_members(rule="realign", alpha=0.5, members=members)
    patched = PeftModel.from_pretrained(alone(base), adapter).eval()
    assert_close(last_logits(model.members["aligned"], IDS), last_logits(patched, IDS), atol=1e-5, rtol=1e-5)
    assert_close(last_logits(model.members["reference"], IDS), last_logits(alone(other), IDS), atol=1e-5, rtol=1e-5)


def test_embeddings_that_are_the_bases_do_not_keep_members_apart(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", save={"save_embedding_layers": True})
    members = {"reference": str(base), "aligned": MemberConfig(str(base), adapter=str(adapter))}
    model = EnsembleForCausalLM.from_members(rule="realign", alpha=0.5, members=members)
    assert roles_of_forwards(model) == [("reference", "aligned")]


def test_resized_embeddings_are_refused_before_loading(tmp_path: Path) -> None:
    """They were dropped once: the member would have run without what its new tokens had learnt."""
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", change=lambda model: model.resize_token_embeddings(66))
    for other in (base, save_base(tmp_path / "other")):
        members = {"reference": str(other), "aligned": MemberConfig(str(base), adapter=str(adapter))}
        with pytest.raises(
            MemberError, match=r"^aligned: .* in shape \(66, 16\); .*resize it first, .*: python"
        ) as caught:
            EnsembleForCausalLM.from_members(rule="realign", members=members)
        assert "\n" not in str(caught.value)


def test_what_was_not_trained_may_be_smaller_than_in_the_model(tmp_path: Path, pair_target: PreTrainedModel) -> None:
    """The embedding of a base with fewer padded rows, which the adapter carries along; trained rows have to fit."""
    wide = save_base(tmp_path / "wide", vocab_size=72)
    plain, carrying = (
        save_adapter(save_base(tmp_path / "base"), tmp_path / name, save={"save_embedding_layers": is_saved})
        for name, is_saved in (("plain", False), ("carrying", True))
    )
    assert len(load_file(carrying / "adapter_model.safetensors")) > len(load_file(plain / "adapter_model.safetensors"))
    expected = last_logits(PeftModel.from_pretrained(alone(wide), plain).eval(), IDS)
    for other in (pair_target, str(wide)):  # merged, and beside shared weights
        members = {"reference": other, "aligned": MemberConfig(str(wide), adapter=str(carrying))}
        model = EnsembleForCausalLM.from_members(rule="realign", alpha=0.5, members=members)
        assert_close(last_logits(model.members["aligned"], IDS), expected, atol=1e-5, rtol=1e-5)
    for module, base in (("lm_head", wide), ("up_proj", save_base(tmp_path / "broad", intermediate_size=64))):
        config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=[module])
        trained = save_adapter(tmp_path / "base", tmp_path / module, config)
        with pytest.raises(MemberError, match="made for another base") as caught:
            check_member("x", MemberConfig(str(base), adapter=str(trained)))
        assert "resize" not in str(caught.value)


@pytest.mark.parametrize("target_modules", [["lm_head", "q_proj"], ["embed_tokens", "q_proj"]])
def test_a_single_member_whose_tied_embeddings_are_adapted(
    tmp_path: Path, pair_target: PreTrainedModel, target_modules: list[str]
) -> None:
    """Merged into tied weights, an update of the head would be one of the embeddings as well; and so on disk."""
    base = save_base(tmp_path / "base", tie_word_embeddings=True)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=target_modules)
    members = {"reference": pair_target, "aligned": MemberConfig(str(base), adapter=str(adapter))}
    model = EnsembleForCausalLM.from_members(rule="realign", alpha=1.0, members=members)
    expected = last_logits(PeftModel.from_pretrained(alone(base), adapter).eval(), IDS)
    assert_close(last_logits(model.members["aligned"], IDS), expected, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "saved", copy_members=True)
    saved = EnsembleForCausalLM.from_pretrained(tmp_path / "saved")
    assert_close(last_logits(saved.members["aligned"], IDS), expected, atol=1e-5, rtol=1e-5)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "wider": ({"hidden_size": 24}, "shape"),
    "fewer layers": ({"num_layers": 1}, "which is not there"),
    "more layers": ({"num_layers": 3}, "lacks"),
    "another family": ({"family": "gpt2"}, "Target modules"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(
    "config", [None, IA3Config(target_modules=["q_proj"], feedforward_modules=[])], ids=["lora", "ia3"]
)
def test_an_adapter_for_another_base_is_one_line_with_the_role(tmp_path: Path, wrong: str, config: Any) -> None:
    settings, message = WRONG[wrong]
    adapter = save_adapter(save_base(tmp_path / "base"), tmp_path / "adapter", config)
    other = str(save_base(tmp_path / "other", **settings))
    members = {"reference": other, "aligned": MemberConfig(other, adapter=str(adapter))}
    with pytest.raises(MemberError, match=f"^aligned: .*{message}") as caught:
        EnsembleForCausalLM.from_members(rule="realign", members=members)
    assert "\n" not in str(caught.value)


def test_a_base_of_another_name_is_a_note(tmp_path: Path, said: list[str]) -> None:
    """To carry a patch to another base is what it is for."""
    adapter = save_adapter(save_base(tmp_path / "base"), tmp_path / "adapter")
    other = save_base(tmp_path / "other", seed=9)
    said.clear()
    checked = check_member("aligned", MemberConfig(str(other), adapter=str(adapter))).adapter
    assert checked is not None
    assert checked.notes == (f"aligned: the adapter {adapter} was made for {tmp_path / 'base'}, not {other}",)
    assert said == []
    own = check_member("aligned", MemberConfig(str(tmp_path / "base"), adapter=str(adapter))).adapter
    assert own is not None
    assert own.notes == ()


def test_the_name_of_the_adapter_in_the_keys_is_left_out(tmp_path: Path) -> None:
    """Some trainers save what they have in memory: 'lora_A.default.weight'."""
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    expected = last_logits(PeftModel.from_pretrained(alone(base), adapter).eval(), IDS)
    edit_tensors(
        adapter / "adapter_model.safetensors",
        lambda tensors: {re.sub(r"(lora_[AB])\.", r"\1.default.", name): one for name, one in tensors.items()},
    )
    for other in (base, save_base(tmp_path / "other", seed=8)):  # shared, and merged
        members = {"reference": str(other), "aligned": MemberConfig(str(base), adapter=str(adapter))}
        model = EnsembleForCausalLM.from_members(rule="realign", alpha=0.5, members=members)
        assert_close(last_logits(model.members["aligned"], IDS), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_file_without_tensors_is_refused(tmp_path: Path, use_dora: bool) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", use_dora=use_dora)
    save_file({}, adapter / "adapter_model.safetensors")
    with pytest.raises(EnsemblerError, match=r"^x: .* a weights file without tensors: .* save .* again$") as caught:
        check_member("x", MemberConfig(str(base), adapter=str(adapter)))
    assert "\n" not in str(caught.value)


def test_a_chat_template_beside_the_adapter(tmp_path: Path, run: Run) -> None:
    """It belongs to the member; an ensemble whose anchor is another says that it leaves it."""
    base = save_base(tmp_path / "base")
    adapter, target = save_adapter(base, tmp_path / "adapter"), save_base(tmp_path / "target", seed=4)
    (adapter / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    tokenizer = check_member("x", MemberConfig(str(base), adapter=str(adapter))).tokenizer
    assert tokenizer is not None
    assert tokenizer.chat_template == "{{ messages[0].content }}!"
    members = ["--source-pt", base, "--source-ft-adapter", adapter, "--target-pt", target]
    for rule, is_left in (("base-change", False), ("eft", True)):
        made = run("create", tmp_path / rule, *members, "--rule", rule)
        assert made.code == 0, made.err
        assert ("the chat template beside the adapter of source_ft is not used" in made.err) == is_left
        assert "was made for" not in made.err
    other = run("create", tmp_path / "ported", *members, "--patch", adapter)
    note = f"Note: target_pt: the adapter {adapter} was made for {base}, not {target}\n"
    assert other.err.count(note) == 1, other.err
