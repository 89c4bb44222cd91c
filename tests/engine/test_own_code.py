"""Members whose folders hold code of their own: refused with the reason, allowed by role, and named in results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.commands import Run, SaveMember
from helpers.patch_cases import save_lora, weights
from helpers.tiny import random_ids
from peft import PeftModel
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from ensembler import EnsembleConfig, EnsembleForCausalLM, MemberConfig
from ensembler.adapters import check_adapter
from ensembler.errors import ConfigError, MemberError
from ensembler.evaluation.provenance import describe_ensemble
from ensembler.preflight import check_ensemble

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def members(save_member: SaveMember, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Two members with code of their own, of which only its role's is allowed."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    for seed, role in enumerate(("reference", "aligned")):
        folder = save_member(role, "llama", seed)
        (folder / "own.py").write_text(CODE)
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "own_llama", "architectures": ["OwnModel"]}
        config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
        (folder / "config.json").write_text(json.dumps(config))
    return {role: str(tmp_path / role) for role in ("reference", "aligned")}


def of_llama(folder: str) -> None:
    """Make a member one that transformers knows."""
    config = json.loads((Path(folder) / "config.json").read_text())
    config.pop("auto_map")
    (Path(folder) / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))


def test_code_runs_for_the_members_that_were_named(members: dict[str, str], tmp_path: Path) -> None:
    message = r"reference: .* runs code of its own, which nobody has allowed; .* --trust-remote-code reference"
    with pytest.raises(MemberError, match=message):
        EnsembleForCausalLM.from_members(rule="realign", members=members)
    with pytest.raises(MemberError, match=r"^aligned: .* --trust-remote-code aligned"):
        EnsembleForCausalLM.from_members(rule="realign", members=members, trust_remote_code=["reference"])
    with pytest.raises(ConfigError, match="names the role 'other'; the members are: reference, aligned"):
        EnsembleForCausalLM.from_members(rule="realign", members=members, trust_remote_code=["other"])
    model = EnsembleForCausalLM.from_members(rule="realign", alpha=0.5, members=members, trust_remote_code=True)
    assert {type(member).__name__ for member in model.members.values()} == {"OwnModel"}
    with torch.no_grad():
        found = model(random_ids(1, 5)).logits
        for folder in members.values():
            of_llama(folder)
        ids = random_ids(1, 5)
        expected = sum(0.5 * AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in members.values())
    assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_on_a_base_with_code_of_its_own(
    members: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The permission is the member's, and nobody is asked for another one."""
    monkeypatch.setattr("builtins.input", lambda text: pytest.fail(text))
    lora = save_lora(tmp_path / "lora", target_modules=["q_proj"])
    adapted = {**members, "aligned": {"model": members["reference"], "adapter": str(lora)}}
    with pytest.raises(MemberError, match=r"^aligned: .* nobody has allowed"):
        EnsembleForCausalLM.from_members(rule="realign", members=adapted, trust_remote_code=["reference"])
    model = EnsembleForCausalLM.from_members(rule="realign", alpha=1.0, members=adapted, trust_remote_code=True)
    with torch.no_grad():
        found = model(ids := random_ids(1, 5)).logits
        of_llama(members["reference"])
        expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(members["reference"]), lora)(ids)
    assert_close(found, expected.logits, atol=1e-5, rtol=1e-5)
    config = AutoConfig.from_pretrained(members["aligned"], trust_remote_code=True)
    with pytest.raises(MemberError, match="custom code which must be executed"):
        check_adapter("x", str(lora), members["aligned"], config)


def test_commands_of_patches_do_not_run_code(
    members: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.setattr("builtins.input", lambda text: "y")
    for folder in members.values():
        (Path(folder) / "own.py").write_text("raise SystemExit('run')")
    base, tuned = members.values()
    made = run("patch", "extract", "--base", base, "--finetuned", tuned, "--output", tmp_path / "patch", "--rank", 64)
    assert made.code == 0, made.err
    assert "and PEFT does not: its base has code of its own, which is not run to try it\n" in made.err
    assert run("patch", "apply", tmp_path / "patch", "--to", base, "--output", tmp_path / "out").code == 0
    expected = weights(Path(tuned))
    for name, tensor in weights(tmp_path / "out").items():
        assert_close(tensor, expected[name], atol=1e-4, rtol=1e-4)


def test_a_folder_does_not_keep_the_permission(members: dict[str, str], tmp_path: Path) -> None:
    of_llama(members["aligned"])
    trusted = {**members, "reference": MemberConfig(members["reference"], trust_remote_code=True)}
    model = EnsembleForCausalLM.from_members(rule="realign", members=trusted)
    described = describe_ensemble(check_ensemble(model.config.replaced()))["members"]
    assert [one.get("trust_remote_code") for one in described.values()] == [True, None]
    model.save_pretrained(tmp_path / "ensemble")
    assert "trust" not in (tmp_path / "ensemble" / "config.json").read_text()
    with pytest.raises(MemberError, match="nobody has allowed"):
        EnsembleForCausalLM.from_pretrained(tmp_path / "ensemble")
    EnsembleForCausalLM.from_pretrained(tmp_path / "ensemble", trust_remote_code=["reference"])
    with pytest.raises(ConfigError, match="'reference' has trust_remote_code in its mapping; leave it out"):
        EnsembleConfig(rule="realign", members={**members, "reference": {"model": "x", "trust_remote_code": True}})


def test_code_of_a_known_type_and_of_a_tokenizer(members: dict[str, str]) -> None:
    """A type that transformers knows, with no causal model of its own; a tokenizer's class in the folder."""
    of_llama(members["aligned"])
    folder = Path(members["reference"])
    of_llama(members["reference"])
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **own}))
    with pytest.raises(MemberError, match=r"^reference: .* nobody has allowed"):
        EnsembleForCausalLM.from_members(rule="realign", members=members)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "vit", "auto_map": {"AutoModelForCausalLM": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MemberError, match=r"^reference: .* nobody has allowed"):
        EnsembleForCausalLM.from_members(rule="realign", members=members)


def test_the_command_line_names_roles(run: Run, members: dict[str, str], tmp_path: Path) -> None:
    given = [part for role, folder in members.items() for part in ("--member", f"{role}={folder}")]
    command = ["generate", "--rule", "realign", *given, "--prompt", "abc", "--max-new-tokens", 3, "--json"]
    assert "reference: " in (refused := run(*command)).error
    assert refused.code == 2
    assert run(*command, "--trust-remote-code", "reference,aligned").code == 0
    out = tmp_path / "out.jsonl"
    result = run(*command[:-1], "--output", out, "--trust-remote-code", "reference", "--trust-remote-code", "aligned")
    assert result.code == 0, result.err
    assert json.loads(Path(f"{out}.run.json").read_text())["members"]["aligned"]["trust_remote_code"] is True
    assert "--trust-remote-code aligned" in run(*command, "--trust-remote-code", "reference").error
