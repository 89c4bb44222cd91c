"""Members: what is refused before a weight is read, and adapters merged as PEFT would run them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import SaveMember
from helpers.tiny import make_model, member_logits, random_ids
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ensembler import EnsembleForCausalLM, MemberConfig
from ensembler.config import EnsembleConfig
from ensembler.engine.members import MemberFiles, check_member, context_length, group_members, load_group
from ensembler.errors import ConfigError, EnsemblerError, MemberError
from ensembler.preflight import check_ensemble
from ensembler.safetensors_files import stored_tensors

IDS = random_ids(2, 7)
WEIGHTS = "model.safetensors"
LINEAR = ["q_proj", "v_proj", "down_proj"]


def load_alone(files: MemberFiles) -> PreTrainedModel:
    return load_group([files]).models[files.role]


def shard(folder: Path) -> None:
    """Save the model again in shards."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="10KB")
    assert (folder / f"{WEIGHTS}.index.json").exists()


def truncate(path: Path, keep: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def reshape_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def remove_a_shard(folder: Path) -> None:
    shard(folder)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def write(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)


def bad_index(folder: Path, content: str) -> None:
    shard(folder)
    write(folder, f"{WEIGHTS}.index.json", content)


def bad_header(folder: Path, header: bytes) -> None:
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda f: truncate(f / WEIGHTS, 0.7), "its header says"),
    "cut in the header": (lambda f: truncate(f / WEIGHTS, 0.001), "not a whole safetensors file"),
    "empty file": (lambda f: truncate(f / WEIGHTS, 0), "not a whole safetensors file"),
    "header no json": (lambda f: bad_header(f, b"{{{{"), "no safetensors header"),
    "header a list": (lambda f: bad_header(f, b"[1, 2]"), "safetensors"),
    "header without offsets": (lambda f: bad_header(f, b'{"a": {"dtype": "F32"}}'), "safetensors"),
    "pickle": (as_pickle, "is a pickle file"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "holds no model.safetensors"),
    "shard missing": (remove_a_shard, "is not there"),
    "index no json": (lambda f: bad_index(f, "{"), "index"),
    "index without map": (lambda f: bad_index(f, "{}"), "index"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config no json": (lambda f: write(f, "config.json", "{"), "cannot be read"),
    "config a list": (lambda f: write(f, "config.json", "[]"), "config.json|cannot be read"),
    "unknown model type": (lambda f: write(f, "config.json", '{"model_type": "nothing-like-it"}'), "cannot be read"),
    "no folder": (shutil.rmtree, "there is no folder"),
    "a file": (lambda f: (shutil.rmtree(f), f.write_text("x")), "folder"),
    "tokenizer damaged": (lambda f: write(f, "tokenizer.json", '{"version": "1.0"}'), "tokenizer"),
    "tokenizer no json": (lambda f: write(f, "tokenizer.json", "{"), "tokenizer"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders_are_found_before_loading(save_member: SaveMember, damage: str) -> None:
    harm, message = DAMAGE[damage]
    folder = save_member("m")
    harm(folder)
    with pytest.raises(MemberError, match=message) as caught:
        check_member("target_pt", MemberConfig(str(folder)))
    assert str(caught.value).startswith("target_pt: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("harm", [drop_tensor, reshape_tensor])
def test_weights_that_do_not_fit_the_config_are_refused(save_member: SaveMember, harm: Callable[[Path], None]) -> None:
    """transformers fills what is missing with random numbers and goes on; a member must not."""
    folder = save_member("m")
    harm(folder)
    with pytest.raises(MemberError, match=r"^target_pt: .*up_proj|^target_pt: .* cannot be loaded") as caught:
        load_alone(check_member("target_pt", MemberConfig(str(folder))))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device", ["banana", "cpu:x", "meta"])
def test_what_is_no_device(save_member: SaveMember, device: str) -> None:
    with pytest.raises(ConfigError, match=f"x: {device!r} is no device; give cpu") as caught:
        check_member("x", MemberConfig(str(save_member("m")), device=device))
    assert "\n" not in str(caught.value)


def test_a_device_that_is_not_there_is_found_before_any_weight_is_read(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When members are loaded: they are checked, planned and written on machines without it."""
    members = {role: MemberConfig(str(folder)) for role, folder in folders.items()}
    members["target_pt"] = MemberConfig(str(folders["target_pt"]), device="cuda:7")
    check_member("target_pt", members["target_pt"])
    monkeypatch.setattr("ensembler.engine.members.load_group", lambda *a, **k: pytest.fail("weights were loaded"))
    with pytest.raises(ConfigError, match="target_pt: device 'cuda:7' is not there") as caught:
        EnsembleForCausalLM.from_members(members=members)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "shared"), [({}, True), ({"dtype": "bfloat16"}, False), ({"quantization": "nf4"}, False)]
)
def test_a_pair_that_could_share_its_weights_is_said(
    save_member: SaveMember, tmp_path: Path, caplog: pytest.LogCaptureFixture, setting: dict[str, str], shared: bool
) -> None:
    base = save_member("base")
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(make_model(), lora).save_pretrained(tmp_path / "lora")
    members = {
        "reference": MemberConfig(str(base)),
        "aligned": MemberConfig(str(base), adapter=str(tmp_path / "lora"), **setting),
    }
    checked = check_ensemble(EnsembleConfig(rule="realign", members=members))
    assert len(group_members(checked.files)) == (1 if shared else 2)
    said = [record.getMessage() for record in caplog.records if "do not share its weights" in record.getMessage()]
    assert len(said) == (0 if shared else 1)
    assert all(next(iter(setting)) in line for line in said)


def test_unknown_dtype() -> None:
    with pytest.raises(ConfigError, match="unknown dtype 'float8'; expected one of: auto, float32"):
        MemberConfig("m", dtype="float8")


@pytest.mark.parametrize("name", ["no-such-org/no-such-model", "nothing-here"])
def test_a_hub_id_offline(name: str) -> None:
    with pytest.raises(MemberError, match=f"x: '{name}' is no folder here, .*offline") as caught:
        check_member("x", MemberConfig(name))
    assert "\n" not in str(caught.value)


def test_shards_are_loaded(save_member: SaveMember) -> None:
    folder = save_member("m", seed=4)
    shard(folder)
    loaded = load_alone(check_member("x", MemberConfig(str(folder))))
    assert torch.equal(member_logits(loaded, IDS), member_logits(make_model(seed=4), IDS))
    assert not loaded.training


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_dtypes(save_member: SaveMember, dtype: str) -> None:
    folder = save_member("m", dtype=torch.bfloat16)
    loaded = load_alone(check_member("x", MemberConfig(str(folder), dtype=dtype)))
    assert loaded.dtype == (torch.bfloat16 if dtype == "auto" else getattr(torch, dtype))


def test_the_home_folder(save_member: SaveMember, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_member("m")
    monkeypatch.setenv("HOME", str(tmp_path))
    load_alone(check_member("x", MemberConfig("~/m")))


def test_header_of_a_whole_file(save_member: SaveMember) -> None:
    tensors = stored_tensors(save_member("m") / WEIGHTS)
    assert tensors["model.embed_tokens.weight"].shape == (64, 16)
    assert "__metadata__" not in tensors


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    ).save_pretrained(tmp_path / "t5")
    with pytest.raises(MemberError, match="encoder-decoder"):
        check_member("x", MemberConfig(str(tmp_path / "t5")))


# -- adapters ---------------------------------------------------------------------------------------------------------


def save_adapter(base: Path, folder: Path, **settings: Any) -> Path:
    """Save a random LoRA of the model in `base`."""
    torch.manual_seed(5)
    settings = {"r": 4, "target_modules": LINEAR, "lora_alpha": 8, "init_lora_weights": False, **settings}
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings)).save_pretrained(folder)
    return folder


ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True}),
    "patterns": ("llama", {"alpha_pattern": {"q_proj": 32}, "rank_pattern": {"down_proj": 2}}),
    "bias": ("qwen2", {"bias": "all"}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "modules to save": ("llama", {"modules_to_save": ["lm_head"]}),
    "dora": ("llama", {"use_dora": True}),
}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("how", ["apart", "as the model"])
def test_merged_equals_pefts_own_forward(save_member: SaveMember, tmp_path: Path, kind: str, how: str) -> None:
    family, settings = ADAPTERS[kind]
    base = save_member("base", family)
    adapter = save_adapter(base, tmp_path / "adapter", **settings)
    config = MemberConfig(str(base), adapter=str(adapter)) if how == "apart" else MemberConfig(str(adapter))
    member = load_alone(check_member("x", config))
    expected = member_logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval(), IDS)
    assert_close(member_logits(member, IDS), expected, atol=1e-4, rtol=1e-4)
    changed = (expected - member_logits(AutoModelForCausalLM.from_pretrained(base), IDS)).abs().max()
    assert changed > 0.1


def test_an_adapter_in_an_ensemble_survives_the_folder(save_member: SaveMember, tmp_path: Path) -> None:
    base = save_member("base")
    adapter = save_adapter(base, tmp_path / "adapter")
    members = {"reference": str(base), "aligned": MemberConfig(str(base), adapter=str(adapter))}
    model = EnsembleForCausalLM.from_members(rule="realign", alpha=0.5, members=members)
    for name, copy_members in (("a", False), ("b", True)):
        model.save_pretrained(tmp_path / name, copy_members=copy_members)
        loaded = EnsembleForCausalLM.from_pretrained(tmp_path / name)
        assert_close(member_logits(loaded, IDS), member_logits(model, IDS), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 24}, "_proj.* shape"),
        ({"num_layers": 1}, "changes .*layers.1.*, which is not there"),
        ({"num_layers": 3}, "lacks .*layers.2"),
        ({"family": "gpt2"}, "Target modules .* not found"),
        ({"intermediate_size": 48}, "down_proj.* shape"),
    ],
)
def test_an_adapter_of_another_base_is_refused_before_loading(
    save_member: SaveMember, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    adapter = save_adapter(save_member("base"), tmp_path / "adapter", target_modules=["down_proj", "q_proj"])
    other = save_member("other", **settings)
    with pytest.raises(MemberError, match=message) as caught:
        check_member("source_ft", MemberConfig(str(other), adapter=str(adapter)))
    assert str(caught.value).startswith("source_ft: ")
    assert "\n" not in str(caught.value)


def test_an_adapter_with_transposed_sizes_is_refused_before_loading(save_member: SaveMember, tmp_path: Path) -> None:
    """(16 → 32) and (32 → 16) have the same two sizes: only their order tells them apart."""
    adapter = save_adapter(save_member("base"), tmp_path / "adapter", target_modules=["down_proj"])
    other = save_member("other", hidden_size=32, intermediate_size=16)
    with pytest.raises(MemberError, match=r"^source_ft: .*down_proj.* shape"):
        check_member("source_ft", MemberConfig(str(other), adapter=str(adapter)))


ADAPTER_DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "there is no folder"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
    "pickle": (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "pickle"),
    "truncated": (lambda f: truncate(f / "adapter_model.safetensors", 0.6), "its header says"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "holds no patch"),
    "config no json": (lambda f: write(f, "adapter_config.json", "{"), "cannot be read"),
    "config a list": (lambda f: write(f, "adapter_config.json", "[]"), "adapter_config"),
    "unknown type": (lambda f: write(f, "adapter_config.json", '{"peft_type": "NOTHING"}'), "NOTHING|adapter"),
}


@pytest.mark.parametrize("damage", ADAPTER_DAMAGE)
def test_damaged_adapters(save_member: SaveMember, tmp_path: Path, damage: str) -> None:
    harm, message = ADAPTER_DAMAGE[damage]
    base = save_member("base")
    adapter = save_adapter(base, tmp_path / "adapter")
    harm(adapter)
    with pytest.raises(EnsemblerError, match=message) as caught:
        load_alone(check_member("source_ft", MemberConfig(str(base), adapter=str(adapter))))
    assert str(caught.value).startswith("source_ft: ")
    assert "\n" not in str(caught.value)


def test_an_adapter_whose_base_is_not_there(save_member: SaveMember, tmp_path: Path) -> None:
    base = save_member("base")
    adapter = save_adapter(base, tmp_path / "adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    for value, message in ((None, "names no base model"), ("/gone", "is a LoRA of /gone .* not there; correct that")):
        write(adapter, "adapter_config.json", json.dumps({**settings, "base_model_name_or_path": value}))
        with pytest.raises(MemberError, match=message):
            check_member("x", MemberConfig(str(adapter)))


@pytest.mark.parametrize(
    ("family", "settings", "expected"),
    [
        ("llama", {"max_position_embeddings": 40}, 40),
        ("gpt2", {"n_positions": 40}, 40),
        ("mpt", {"max_seq_len": 40}, 40),
        ("ctrl", {"n_positions": 40}, 40),
        ("bloom", {}, None),
        ("mamba", {}, None),
        ("llama", {"max_position_embeddings": 40, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, 80),
        ("llama", {"max_position_embeddings": 40, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}, 40),
    ],
)
def test_the_longest_text_by_the_names_of_families(family: str, settings: dict[str, Any], expected: int | None) -> None:
    assert context_length(AutoConfig.for_model(family, **settings)) == expected
