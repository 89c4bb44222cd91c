"""The folder of an ensemble: written, moved, copied, loaded again; and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import SaveMember
from helpers.tiny import make_model, make_tokenizer, random_ids
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from ensembler import EnsembleConfig, EnsembleForCausalLM, MemberConfig
from ensembler import folder as folders
from ensembler.errors import ConfigError, InputError, OutputError
from ensembler.folder import load as load_config

IDS = random_ids(2, 6)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    result: torch.Tensor = model(IDS).logits
    return result


@pytest.fixture
def made(folders: dict[str, Path]) -> EnsembleForCausalLM:
    return EnsembleForCausalLM.from_members(rule="eft", alpha=0.4, members=folders)


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_round_trip_through_the_auto_classes(made: EnsembleForCausalLM, tmp_path: Path) -> None:
    made.save_pretrained(tmp_path / "ens")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ens")
    assert isinstance(loaded, EnsembleForCausalLM)
    assert (loaded.rule.name, loaded.alpha) == ("eft", 0.4)
    assert torch.equal(logits(loaded), logits(made))
    assert AutoConfig.from_pretrained(tmp_path / "ens").model_type == "ensembler"
    assert AutoTokenizer.from_pretrained(tmp_path / "ens")("abc").input_ids == made.tokenizer("abc").input_ids


@pytest.mark.parametrize("load", [AutoModelForCausalLM, EnsembleForCausalLM])
def test_alpha_and_dtype_of_the_call_win(made: EnsembleForCausalLM, tmp_path: Path, load: Any) -> None:
    made.save_pretrained(tmp_path / "ens")
    loaded = load.from_pretrained(tmp_path / "ens", dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    loaded = load.from_pretrained(tmp_path / "ens", alpha=0.9)
    assert loaded.alpha == 0.9
    made.alpha = 0.9
    assert torch.equal(logits(loaded), logits(made))


@pytest.mark.parametrize("option", [{"device_map": {"nobody": "cpu"}}, {"load_in_8bit": True}, {"low_memory": 1}])
def test_options_that_would_be_ignored_are_refused(
    made: EnsembleForCausalLM, tmp_path: Path, option: dict[str, Any]
) -> None:
    made.save_pretrained(tmp_path / "ens")
    with pytest.raises(ConfigError, match=rf"{next(iter(option))}|unknown role 'nobody'"):
        EnsembleForCausalLM.from_pretrained(tmp_path / "ens", **option)


def test_options_of_other_models_that_mean_something_here(made: EnsembleForCausalLM, tmp_path: Path) -> None:
    made.save_pretrained(tmp_path / "ens")
    for auto in (AutoModelForCausalLM, EnsembleForCausalLM):
        options = {"torch_dtype": torch.bfloat16, "device_map": "cpu", "low_cpu_mem_usage": True}
        loaded = auto.from_pretrained(tmp_path / "ens", attn_implementation="eager", **options)
        assert {member.dtype for member in loaded.members.values()} == {torch.bfloat16}
        assert {member.config._attn_implementation for member in loaded.members.values()} == {"eager"}


def test_device_maps_mean_what_they_mean_for_one_model(made: EnsembleForCausalLM, tmp_path: Path) -> None:
    """An empty name is the whole model, and a role's own device goes before it; a number is a GPU."""
    made.save_pretrained(tmp_path / "ens")
    for device_map in ({"": "cpu"}, {"": torch.device("cpu")}, {"": "meta", **dict.fromkeys(made.members, "cpu")}):
        loaded = EnsembleForCausalLM.from_pretrained(tmp_path / "ens", device_map=device_map)
        assert torch.equal(logits(loaded), logits(made))
    config = load_config(tmp_path / "ens", None, dtype=None, device_map={"": 1, "source_ft": "cpu"}, options={})
    devices = {role: member.device for role, member in config.members.items()}
    assert devices == {**dict.fromkeys(config.members, "cuda:1"), "source_ft": "cpu"}


def test_overwriting_leaves_no_tokenizer_files_of_the_old_anchor(
    save_member: SaveMember, folders: dict[str, Path], tmp_path: Path
) -> None:
    templated = make_tokenizer()
    templated.chat_template = "{{ messages }}"
    first = {"reference": save_member("a", tokenizer=templated), "aligned": folders["source_pt"]}
    EnsembleForCausalLM.from_members(rule="realign", members=first).save_pretrained(tmp_path / "ens")
    second = {"reference": folders["source_ft"], "aligned": folders["source_pt"]}
    model = EnsembleForCausalLM.from_members(rule="realign", members=second)
    model.save_pretrained(tmp_path / "ens", overwrite=True)
    model.save_pretrained(tmp_path / "new")
    assert sorted(files_below(tmp_path / "ens")) == sorted(files_below(tmp_path / "new"))
    assert EnsembleForCausalLM.from_pretrained(tmp_path / "ens").tokenizer.chat_template is None


def test_two_ensembles_of_one_configuration_have_their_own_alpha(folders: dict[str, Path]) -> None:
    config = EnsembleConfig(rule="eft", alpha=0.4, members={role: str(folder) for role, folder in folders.items()})
    first, second = EnsembleForCausalLM.from_config(config), EnsembleForCausalLM.from_config(config)
    first.alpha = 0
    assert (first.alpha, second.alpha, config.alpha) == (0, 0.4, 0.4)


def test_another_rule_takes_over_nothing_that_belongs_to_the_old() -> None:
    members = dict.fromkeys(("source_ft", "source_pt", "target_pt"), "m")
    linear = EnsembleConfig(rule="linear", members=members, constant={"source_ft": 1}, slope=dict.fromkeys(members, 1))
    assert linear.replaced(rule="eft", alpha=0.5).get_rule().weights(0.5)["source_pt"] == -0.5
    assert linear.replaced(constant={"target_pt": 1}).get_rule().anchor == "target_pt"
    pair = dict.fromkeys(("expert", "amateur"), "m")
    assert EnsembleConfig(rule="contrastive", members=pair, cutoff=0.5).replaced(alpha=2).cutoff == 0.5


def test_pipeline_from_the_folder(made: EnsembleForCausalLM, tmp_path: Path) -> None:
    from transformers import pipeline

    made.save_pretrained(tmp_path / "ens")
    generator = pipeline("text-generation", model=str(tmp_path / "ens"))
    text = generator("abc", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    ids = made.tokenizer("abc", return_tensors="pt")
    assert text == made.tokenizer.decode(made.generate(**ids, max_new_tokens=4)[0], skip_special_tokens=True)


@pytest.mark.parametrize("where", ["ens", "m_target_pt/ens"])
def test_relative_paths_move_together(
    made: EnsembleForCausalLM, folders: dict[str, Path], tmp_path: Path, where: str
) -> None:
    before = logits(made)
    home = tmp_path / "home"
    home.mkdir()
    members = {role: shutil.copytree(folder, home / folder.name) for role, folder in folders.items()}
    target = home / where
    EnsembleForCausalLM.from_members(rule="eft", alpha=0.4, members=members).save_pretrained(target)
    if where == "ens":
        paths = {role: m["model"] for role, m in json.loads((target / "config.json").read_text())["members"].items()}
        assert paths["source_ft"] == "../m_source_ft"
        home.rename(tmp_path / "moved")
        target = tmp_path / "moved" / where
    assert torch.equal(logits(EnsembleForCausalLM.from_pretrained(target)), before)


def test_paths_relative_to_the_working_directory(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Members named relative to one working directory, the ensemble saved from another."""
    monkeypatch.chdir(tmp_path)
    model = EnsembleForCausalLM.from_members(rule="eft", members={role: f.name for role, f in folders.items()})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    model.save_pretrained("ens")
    loaded = EnsembleForCausalLM.from_pretrained("ens")
    assert torch.equal(logits(loaded), logits(model))


def test_a_copy_stands_alone(made: EnsembleForCausalLM, folders: dict[str, Path], tmp_path: Path) -> None:
    made.save_pretrained(tmp_path / "ens", copy_members=True)
    for folder in folders.values():
        shutil.rmtree(folder)
    (tmp_path / "ens").rename(tmp_path / "moved")
    assert torch.equal(logits(EnsembleForCausalLM.from_pretrained(tmp_path / "moved")), logits(made))


def test_a_copy_keeps_the_tokenizer_of_each_member(save_member: SaveMember, tmp_path: Path) -> None:
    """One width hides that the anchor has 8 tokens more; the copy must still know it."""
    members = {
        "reference": save_member("reference", vocab_size=72, tokenizer=make_tokenizer(8)),
        "aligned": save_member("aligned", seed=1, vocab_size=72),
    }
    model = EnsembleForCausalLM.from_members(rule="realign", alpha=0.5, members=members)
    model.save_pretrained(tmp_path / "ens", copy_members=True)
    loaded = EnsembleForCausalLM.from_pretrained(tmp_path / "ens")
    assert (loaded.contract.kind, loaded.contract.shared) == (model.contract.kind, model.contract.shared)
    assert torch.equal(logits(loaded), logits(model))


def test_members_given_as_objects_are_copied(trio: dict[str, PreTrainedModel], tmp_path: Path) -> None:
    model = EnsembleForCausalLM.from_members(rule="base-change", alpha=0.7, members=trio)
    model.save_pretrained(tmp_path / "ens")
    assert torch.equal(logits(EnsembleForCausalLM.from_pretrained(tmp_path / "ens")), logits(model))


def test_each_member_has_its_dtype(folders: dict[str, Path], tmp_path: Path) -> None:
    dtypes = {"source_ft": "float16", "source_pt": "float32", "target_pt": "bfloat16"}
    members = {role: MemberConfig(str(folder), dtype=dtypes[role]) for role, folder in folders.items()}
    EnsembleForCausalLM.from_members(rule="eft", members=members).save_pretrained(tmp_path / "ens")
    loaded = EnsembleForCausalLM.from_pretrained(tmp_path / "ens")
    assert {role: str(member.dtype) for role, member in loaded.members.items()} == {
        role: f"torch.{dtype}" for role, dtype in dtypes.items()
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alhpa": 1.0}, "alhpa"),
        ({"rule": "etf"}, "unknown rule 'etf'"),
        ({"rule": 3}, "rule"),
        ({"alpha": "1"}, "alpha"),
        ({"alpha": -1}, "alpha is -1"),
        ({"outside": "drop"}, "outside is 'drop'"),
        ({"cutoff": 0.1}, "takes no cutoff"),
        ({"members": {}}, "needs a member 'target_pt'"),
        ({"members": []}, "member"),
        ({"members": None}, "member"),
        ({"rule": "base-change", "slope": {"a": 1}}, "fixed numbers"),
        ({"model_type": "llama"}, "of model type 'llama'"),
    ],
)
def test_configurations_refused_in_one_line(
    made: EnsembleForCausalLM, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    made.save_pretrained(tmp_path / "ens")
    path = tmp_path / "ens" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError, match=message) as caught:
        EnsembleForCausalLM.from_pretrained(tmp_path / "ens")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', "null"])
def test_damaged_config_files_are_refused_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "ens").mkdir()
    (tmp_path / "ens" / "config.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        EnsembleForCausalLM.from_pretrained(tmp_path / "ens")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_damaged_generation_configs_are_refused_in_one_line(
    made: EnsembleForCausalLM, tmp_path: Path, content: str
) -> None:
    made.save_pretrained(tmp_path / "ens")
    (tmp_path / "ens" / "generation_config.json").write_text(content)
    with pytest.raises(ConfigError, match="generation_config") as caught:
        EnsembleForCausalLM.from_pretrained(tmp_path / "ens")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "no-such-org/no-such-ensemble", "nothing"])
def test_folders_that_are_not_there(name: str) -> None:
    with pytest.raises(ConfigError, match=name.rsplit("/", 1)[-1]) as caught:
        EnsembleForCausalLM.from_pretrained(name)
    assert "\n" not in str(caught.value)


def test_an_interrupted_write_leaves_nothing(
    made: EnsembleForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    monkeypatch.setattr(GenerationConfig, "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        made.save_pretrained(out / "ens", copy_members=True)
    assert list(out.iterdir()) == []


def test_a_folder_with_something_in_it_is_not_touched(made: EnsembleForCausalLM, tmp_path: Path) -> None:
    (tmp_path / "ens").mkdir()
    made.save_pretrained(tmp_path / "ens")  # an empty one is taken
    before = files_below(tmp_path / "ens")
    made.alpha = 0.1
    with pytest.raises(OutputError, match="exists already"):
        made.save_pretrained(tmp_path / "ens")
    assert files_below(tmp_path / "ens") == before
    made.save_pretrained(tmp_path / "ens", overwrite=True)
    assert EnsembleForCausalLM.from_pretrained(tmp_path / "ens").alpha == 0.1
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_overwriting_does_not_delete_the_members_inside(made: EnsembleForCausalLM, tmp_path: Path) -> None:
    """Load a folder that stands alone, change α, save it to the same place: the weights must still be there."""
    made.save_pretrained(tmp_path / "ens", copy_members=True)
    loaded = EnsembleForCausalLM.from_pretrained(tmp_path / "ens")
    loaded.alpha = 0.1
    loaded.save_pretrained(tmp_path / "ens", overwrite=True)
    again = EnsembleForCausalLM.from_pretrained(tmp_path / "ens")
    assert torch.equal(logits(again), logits(loaded))


def test_overwriting_does_not_delete_what_is_no_ensemble(
    made: EnsembleForCausalLM, folders: dict[str, Path], tmp_path: Path
) -> None:
    """--overwrite on a folder of other things (here a member, then its parent) must not wipe it."""
    for place in (folders["target_pt"], tmp_path):
        before = files_below(place)
        with pytest.raises(InputError):
            made.save_pretrained(place, overwrite=True)
        assert files_below(place) == before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "target_pt"])
def test_an_ensemble_is_written_beside_files_that_are_not_in_its_way(
    made: EnsembleForCausalLM, tmp_path: Path, name: str
) -> None:
    place = tmp_path / "ens"
    (place / "checkpoint-4" / "target_pt").mkdir(parents=True)
    (place / "notes.txt").write_text("a")
    (place / name).write_text("{}")
    before = files_below(place)
    with pytest.raises(OutputError, match=f"exists already and has {name}; choose another name"):
        made.save_pretrained(place, copy_members=True)
    assert files_below(place) == before
    (place / name).unlink()
    made.save_pretrained(place, copy_members=True)
    assert torch.equal(logits(EnsembleForCausalLM.from_pretrained(place)), logits(made))
    assert (place / "notes.txt").read_text() == "a"
    assert (place / "checkpoint-4" / "target_pt").is_dir()


def test_options_of_the_hub_go_to_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """token=False says that no token may be sent."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(folders, "find_file", lambda *names, **options: asked.update(options))
    given = {"token": False, "local_files_only": True, "force_download": False, "revision": None}
    with pytest.raises(ConfigError):
        EnsembleForCausalLM.from_pretrained("someone/model", **given)
    assert asked == {"token": False, "local_files_only": True, "force_download": False}


def test_saving_twice_gives_the_same_bytes(made: EnsembleForCausalLM, tmp_path: Path) -> None:
    made.save_pretrained(tmp_path / "a")
    made.save_pretrained(tmp_path / "b")
    EnsembleForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "c")
    first = files_below(tmp_path / "a")
    assert files_below(tmp_path / "b") == first
    assert files_below(tmp_path / "c")["config.json"] == first["config.json"]


def test_alpha_per_row_cannot_be_saved(made: EnsembleForCausalLM, tmp_path: Path) -> None:
    made.alpha = torch.tensor([0.1, 0.2])
    with pytest.raises(ConfigError, match="one value per row"):
        made.save_pretrained(tmp_path / "ens")
    assert not (tmp_path / "ens").exists()
    with pytest.raises(ConfigError, match="a tensor with one value per row"):
        made.alpha = [0.1, 0.2]  # type: ignore[assignment]


@pytest.mark.parametrize("load", [AutoModelForCausalLM, EnsembleForCausalLM])
def test_the_rule_of_the_call_wins(
    made: EnsembleForCausalLM, folders: dict[str, Path], tmp_path: Path, load: Any
) -> None:
    made.save_pretrained(tmp_path / "ens")
    loaded = load.from_pretrained(tmp_path / "ens", rule="base-change", alpha=0.7)
    assert (loaded.rule.name, loaded.config.rule, loaded.alpha) == ("base-change", "base-change", 0.7)
    expected = EnsembleForCausalLM.from_members(rule="base-change", alpha=0.7, members=folders)
    assert torch.equal(logits(loaded), logits(expected))
    assert not torch.equal(logits(loaded), logits(made))
    assert EnsembleForCausalLM.from_pretrained(tmp_path / "ens", outside="neutral").config.outside == "neutral"
    with pytest.raises(ConfigError, match="needs a member 'expert'"):
        load.from_pretrained(tmp_path / "ens", rule="contrastive")


def test_the_numbers_of_the_call_win(made: EnsembleForCausalLM, tmp_path: Path) -> None:
    """They replace the folder's; another rule does not take them over."""
    made.save_pretrained(tmp_path / "ens")
    numbers = {"constant": {"source_ft": 1.0}, "slope": {"target_pt": 0.5, "source_pt": -0.5}}
    linear = EnsembleForCausalLM.from_pretrained(tmp_path / "ens", rule="linear", **numbers)
    assert linear.rule.weights(0.4) == {"source_ft": 1.0, "target_pt": 0.2, "source_pt": -0.2}
    linear.save_pretrained(tmp_path / "linear")
    again = EnsembleForCausalLM.from_pretrained(tmp_path / "linear", slope={"target_pt": 1.0, "source_pt": 2.0})
    assert again.rule.weights(0.5) == {"source_ft": 1.0, "target_pt": 0.5, "source_pt": 1.0}
    assert torch.equal(logits(EnsembleForCausalLM.from_pretrained(tmp_path / "linear", rule="eft")), logits(made))
    with pytest.raises(ConfigError, match="takes no cutoff"):
        EnsembleForCausalLM.from_pretrained(tmp_path / "ens", cutoff=0.1)


def test_generation_config_travels(made: EnsembleForCausalLM, tmp_path: Path) -> None:
    made.generation_config.max_new_tokens = 3
    made.generation_config.eos_token_id = [2, 9]
    made.save_pretrained(tmp_path / "ens")
    loaded = EnsembleForCausalLM.from_pretrained(tmp_path / "ens")
    assert loaded.generation_config.max_new_tokens == 3
    assert loaded.generation_config.eos_token_id == [2, 9]


def test_a_generation_config_of_the_anchor_that_transformers_objects_to(
    save_member: SaveMember, tmp_path: Path
) -> None:
    """temperature without do_sample, as in many hub folders: the ensemble can be saved all the same."""
    members = {"reference": make_model(seed=1), "aligned": make_model(seed=2)}
    members["reference"].generation_config.temperature = 0.6
    model = EnsembleForCausalLM.from_members(rule="realign", members=members)
    model.save_pretrained(tmp_path / "ens")
    assert torch.equal(logits(EnsembleForCausalLM.from_pretrained(tmp_path / "ens")), logits(model))


def test_linear_keeps_its_anchor(tmp_path: Path) -> None:
    """The first role with a constant is the anchor; sorted JSON must not change it."""
    members = {"z": make_model(seed=1), "a": make_model(seed=2)}
    options = {"constant": {"z": 1.0, "a": 0.5}, "slope": {"a": 1.0}}
    model = EnsembleForCausalLM.from_members(rule="linear", members=members, **options)
    model.save_pretrained(tmp_path / "ens")
    loaded = EnsembleForCausalLM.from_pretrained(tmp_path / "ens")
    assert loaded.rule.anchor == "z"
    assert torch.equal(logits(loaded), logits(model))
    assert EnsembleConfig(**json.loads(loaded.config.to_json_string())).get_rule().anchor == "z"
