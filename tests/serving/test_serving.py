"""Decisions of serving without vLLM: the command, what cannot be served, weights."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers.tiny import make_model, make_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig

from ensembler.cli.main import cli
from ensembler.config import EnsembleConfig, MemberConfig
from ensembler.demo import demo_folder
from ensembler.engine.members import check_member, load_group
from ensembler.errors import ConfigError, InputError, MemberError, MissingExtraError
from ensembler.folder import read
from ensembler.patch.apply import apply_patches
from ensembler.patch.formats import read_patch
from ensembler.patch.loading import load_patched
from ensembler.preflight import check_ensemble
from ensembler.safetensors_files import read_model
from ensembler.serving.choice import check_servable, plan_member, require_vllm
from ensembler.serving.vllm_serve import PAGE, POINTS, serve_command, set_arguments

SaveMember = Callable[..., Path]


def test_the_command_names_the_folder_once_and_hands_on_flags() -> None:
    command = serve_command(Path("/x"), name="x", flags=("--port", "9"))
    names = command.index("--served-model-name")
    assert command[names + 1 : names + 3] == ["x", "--shutdown-timeout"]
    assert (command[2], *command[4:6]) == ("ensembler.serving.vllm_serve", "serve", "/x")
    assert command[-2:] == ["--port", "9"]  # behind ours: of a flag that is given twice, the last one counts
    assert json.loads(command[3]) == {"alpha": None, "middleware": [POINTS]}


def test_the_command_with_aliases_a_default_alpha_and_the_page() -> None:
    command = serve_command(Path("/x"), name="x", flags=(), alpha=0.5, aliases=(0.0, 1.25, 0.0), playground=True)
    names = command.index("--served-model-name")
    assert command[names + 1 : names + 5] == ["x", "x@alpha=0", "x@alpha=1.25", "--shutdown-timeout"]
    assert json.loads(command[3]) == {"alpha": 0.5, "middleware": [POINTS, PAGE]}


def parsed(**changes: Any) -> Namespace:
    """vLLM's arguments as its parser leaves them."""
    plain: dict[str, Any] = {
        "model_tag": str(demo_folder()),
        "load_format": "auto",
        "hf_overrides": {},
        "quantization": None,
        "speculative_config": None,
        "enable_dbo": False,
        "enable_prompt_embeds": False,
        "middleware": [],
        "worker_extension_cls": "",
        "dtype": "auto",
        "tensor_parallel_size": 1,
    }
    return Namespace(**{**plain, **changes})


def test_what_is_the_ensembles_to_say_is_set_in_the_servers_arguments() -> None:
    args = parsed()
    set_arguments(args, 0.5)
    assert (args.load_format, args.dtype, args.hf_overrides) == ("ensembler", "float32", {"alpha": 0.5})
    args = parsed(dtype="bfloat16")
    set_arguments(args, None)
    assert (args.dtype, args.hf_overrides) == ("bfloat16", {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load_format": "dummy"}, "--load-format dummy was given"),
        ({"hf_overrides": {"alpha": 2}}, "--hf-overrides was given"),
        ({"quantization": "fp8"}, "--quantization fp8 was given"),
        ({"speculative_config": {"method": "ngram"}}, "--speculative-config was given"),
        ({"enable_dbo": True}, "--enable-dbo or --enable-prompt-embeds was given"),
        ({"tensor_parallel_size": 3}, "which 3 tensor-parallel ranks cannot share"),
    ],
)
def test_flags_that_would_change_the_ensemble_unsaid_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        set_arguments(parsed(**changes), None)


def demo_config(**changes: Any) -> EnsembleConfig:
    config = read(demo_folder())
    config.change_members(**changes)
    return config


def test_quantised_and_placed_members_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"source_ft is quantised when loaded"):
        check_servable(check_ensemble(demo_config(quantization="8bit")))
    with pytest.raises(ConfigError, match=r"is put on devices of its own .auto.*--tensor-parallel-size"):
        check_servable(check_ensemble(demo_config(device_map="auto")))
    with pytest.raises(ConfigError, match=r"source_ft was allowed to run code of its own.*leave out --trust-remote"):
        check_servable(check_ensemble(demo_config(trust_remote_code=True)))
    check_servable(check_ensemble(demo_config()))


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("mamba", {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}, "keeps a state"),
        ("gemma3", {}, "a model of more than texts"),
        ("deepseek_v3", {}, "has latent attention"),
    ],
)
def test_members_that_vllm_sets_up_for_a_whole_model_are_refused(
    family: str, settings: dict[str, Any], message: str
) -> None:
    checked = check_ensemble(demo_config())
    checked.model_configs["target_pt"] = AutoConfig.for_model(family, **settings)
    with pytest.raises(MemberError, match=f"target_pt .{family}. .*{message}"):
        check_servable(checked)


def test_without_vllm_there_is_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ensembler.serving.choice.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"vllm is not installed; install it with: pip install .*\[vllm\]"):
        require_vllm()
    assert isinstance(CliRunner().invoke(cli, ["serve", "demo"]).exception, MissingExtraError)


def refused(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """Return the message of the command line, as if vLLM were installed."""
    monkeypatch.setattr("ensembler.serving.choice.find_spec", lambda name: object())
    error = CliRunner().invoke(cli, list(arguments)).exception
    assert isinstance(error, InputError)
    assert "\n" not in str(error)
    return str(error)


def test_members_with_different_tokenizers_are_refused_by_name(
    save_member: SaveMember, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = {role: {"model": str(save_member(role, "llama", 1))} for role in ("source_ft", "source_pt")}
    other = save_member("target_pt", "llama", 2)
    make_tokenizer(swapped=True).save_pretrained(other)
    content = json.loads((demo_folder() / "config.json").read_text())
    content["members"] = {**members, "target_pt": {"model": str(other)}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    message = refused(monkeypatch, "serve", str(tmp_path))
    assert "target_pt" in message
    assert "source_ft" in message


def test_a_checkpoint_that_is_stored_quantised_is_refused_by_its_kind(save_member: SaveMember) -> None:
    members = {role: {"model": str(save_member(role, "llama", 1))} for role in ("source_ft", "source_pt", "target_pt")}
    checked = check_ensemble(EnsembleConfig(members=members))
    checked.model_configs["target_pt"].quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(MemberError, match=r"target_pt has quantised weights \(gptq\)"):
        check_servable(checked)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-beams", "2"], "num_beams is 2; vLLM"),
        (["--draft", "source_pt"], "draft is 'source_pt'; in vLLM no member drafts"),
        (["--prefill-chunk", "8"], "max_num_batched_tokens"),
        (["--explain"], "--explain was given with --backend vllm"),
        (["--stream"], "--stream was given with --backend vllm"),
        (["--compile"], "--compile was given with --backend vllm"),
        (["--stats"], "--stats was given with --backend vllm"),
        (["--quantize", "nf4"], "source_ft is quantised when loaded"),
        (["--dtype", "target_pt=bfloat16"], "members are of float32 and bfloat16"),
        (["--engine-arg", "model=x"], "model is given to vLLM's engine by ensembler itself"),
        (["--engine-arg", "tensor_parallel_size"], "is not of the form NAME=VALUE"),
        (["--engine-arg", "tensor_parallel_size=3"], "which 3 tensor-parallel ranks cannot share"),
        (["--engine-arg", "max_model_len=4k"], "max_model_len is '4k'; expected a whole number"),
        (["--engine-arg", "quantization=fp8"], "quantization is nothing that vLLM can do"),
        (["--engine-arg", "logprobs_mode=raw_logits"], "would change what the numbers mean"),
        (["--temperature", "3"], "vLLM samples at 0.01 to 2"),
        (["--temperature", "0.001"], "vLLM samples at 0.01 to 2"),
    ],
)
def test_what_generate_cannot_do_with_vllm(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert message in refused(monkeypatch, "generate", "demo", "--prompt", "x", "--backend", "vllm", *arguments)


def test_arguments_of_an_engine_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    message = refused(monkeypatch, "generate", "demo", "--prompt", "x", "--engine-arg", "max_model_len=8")
    assert "backend transformers; choose vllm" in message
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "vLLM starts its own processes" in refused(monkeypatch, "sweep", "demo", "--backend", "vllm")


@pytest.mark.parametrize("command", [["generate", "demo", "--prompt", "x"], ["sweep", "demo"], ["bench", "demo"]])
def test_every_command_has_the_pip_line_where_vllm_is_missing(
    command: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("ensembler.serving.choice.find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    error = CliRunner().invoke(cli, [*command, "--backend", "vllm"]).exception
    assert isinstance(error, MissingExtraError)
    assert not list(tmp_path.iterdir())


def lora_on(save_member: SaveMember, tmp_path: Path, **settings: Any) -> tuple[Path, Path]:
    base = save_member("base", "llama", 3)
    torch.manual_seed(1)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **settings)
    get_peft_model(make_model("llama", 3), config).save_pretrained(tmp_path / "lora")
    return base, tmp_path / "lora"


def test_tensors_are_those_that_patch_apply_writes(save_member: SaveMember, tmp_path: Path) -> None:
    base, lora = lora_on(save_member, tmp_path)
    member = MemberConfig(str(base), adapter=str(lora))
    ours = dict(load_patched(plan_member("source_ft", member)))
    apply_patches([read_patch(lora)], base, tmp_path / "patched")
    written = dict(load_patched(plan_member("x", MemberConfig(str(tmp_path / "patched")))))
    assert ours.keys() == written.keys() == read_model(base).tensors.keys()
    plain = dict(load_patched(plan_member("x", MemberConfig(str(base)))))
    assert all(torch.equal(ours[name], written[name]) for name in ours)
    assert 0 < sum(not torch.equal(ours[name], plain[name]) for name in ours) == 4
    loaded = load_group([check_member("source_ft", member)]).models["source_ft"].state_dict()
    assert all(torch.equal(ours[name], loaded[name]) for name in ours)


def test_an_adapter_that_is_no_sum_is_refused_by_role(save_member: SaveMember, tmp_path: Path) -> None:
    base, lora = lora_on(save_member, tmp_path, use_dora=True)
    with pytest.raises(MemberError, match=r"^source_ft: .*merge it with PEFT first"):
        plan_member("source_ft", MemberConfig(str(base), adapter=str(lora)))
