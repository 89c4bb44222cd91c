"""EnsembleConfig and MemberConfig: validated when made, and the same after JSON."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from ensembler import EnsembleConfig, MemberConfig
from ensembler.errors import ConfigError

MEMBERS = {"source_ft": "a/ft", "source_pt": "a/pt", "target_pt": "a/target"}


def test_members_are_parsed_and_ordered_by_the_rule() -> None:
    config = EnsembleConfig(rule="eft", members={**MEMBERS, "source_ft": {"model": "x", "adapter": "y"}})
    assert list(config.members) == ["target_pt", "source_ft", "source_pt"]
    assert config.members["source_ft"] == MemberConfig("x", adapter="y")
    assert config.members["source_pt"].dtype == "auto"


def test_json_round_trip() -> None:
    config = EnsembleConfig(rule="contrastive", alpha=0.3, cutoff=0.2, members={"expert": "e", "amateur": "a"})
    again = EnsembleConfig(**json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
    assert again.members == config.members
    assert json.loads(config.to_json_string())["members"]["expert"] == {"model": "e"}
    assert copy.deepcopy(config).to_dict() == config.to_dict()
    assert "EnsembleConfig" in repr(config)


def test_the_default_instance_of_transformers_is_possible() -> None:
    assert not EnsembleConfig().members
    assert json.loads(EnsembleConfig().to_json_string())["model_type"] == "ensembler"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "nothing"}, "unknown rule 'nothing'"),
        ({"rule": None}, "rule"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"alpha": math.inf}, "alpha is inf"),
        ({"alpha": -1.0}, "alpha is -1"),
        ({"alpha": "0.5"}, "alpha is '0.5'"),
        ({"outside": "skip"}, "outside is 'skip'"),
        ({"cutoff": 0.5}, "takes no cutoff"),
        ({"constant": {"a": 1.0}}, "fixed numbers"),
        ({"members": {**MEMBERS, "source-ft": "x"}}, "unknown role 'source-ft'"),
        ({"members": {**MEMBERS, "source_ft": {"modle": "x"}}}, "unknown key 'modle' of member 'source_ft'"),
        ({"members": {**MEMBERS, "source_ft": {"adapter": "x"}}}, "has no 'model'"),
        ({"members": {**MEMBERS, "source_ft": 3}}, "member 'source_ft' is 3"),
        ({"members": {**MEMBERS, "source_ft": ""}}, "model of a member is ''"),
        ({"members": {**MEMBERS, "source_ft": {"model": "x", "dtype": "int8"}}}, "unknown dtype 'int8'"),
        ({"members": {**MEMBERS, "source_ft": {"model": "x", "device": None}}}, "device of a member is None"),
        ({"members": ["a", "b"]}, "member"),
        ({"alpah": 1.0}, "unknown key 'alpah'"),
    ],
)
def test_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        EnsembleConfig(**{"members": MEMBERS, **settings})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": "cat"}, "classes holds no classes; expected a list of labels"),
        ({"classes": ["cat", 3]}, "classes holds no classes"),
        ({"classes": []}, "classes holds no classes"),
        ({"aliases": ["a"]}, "aliases is list; expected a mapping"),
        ({"aliases": {"a": 3}}, "aliases has 3 for 'a'"),
        ({"class_texts": "cat"}, "class_texts is str; expected a mapping"),
        ({"templates": "a {}"}, "templates is 'a {}'; expected a list of prompts"),
        ({"templates": ["a photo"]}, "templates has the template 'a photo'; expected one {} in it"),
        ({"templates": [3]}, "templates has the template 3"),
    ],
)
def test_what_is_said_of_classes_is_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        EnsembleConfig(**{"task": "image-classification", "members": MEMBERS, **settings})
    assert "\n" not in str(caught.value)


def test_labels_are_those_of_the_classes_and_not_written() -> None:
    config = EnsembleConfig(task="image-classification", members=MEMBERS, classes=["cat", "dog", "owl"])
    assert (config.id2label, config.num_labels) == ({0: "cat", 1: "dog", 2: "owl"}, 3)
    assert config.label2id == {"cat": 0, "dog": 1, "owl": 2}
    assert not {"id2label", "label2id", "num_labels"} & set(config.to_dict())
    assert config.replaced(alpha=0.2).id2label == config.id2label


def test_relative_folders_become_absolute_and_of_files_only_a_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    names = ("model", "adapter", "offload_folder", "head")
    of_folder = MemberConfig(**dict.fromkeys(names, "folder")).absolute()
    of_file = MemberConfig(**dict.fromkeys(names, "file")).absolute()
    for name in names[:3]:
        assert (getattr(of_folder, name), getattr(of_file, name)) == (str(tmp_path / "folder"), "file")
    assert (of_folder.head, of_file.head) == ("folder", str(tmp_path / "file"))


@pytest.mark.parametrize("role", ["", "a.b", "../up", "a/b", "keys", "forward"])
def test_role_names_of_linear_become_modules_and_folders(role: str) -> None:
    with pytest.raises(ConfigError, match="role") as caught:
        EnsembleConfig(rule="linear", members={role: "m"}, constant={role: 1.0})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("numbers", [{"constant": [1.0]}, {"constant": "a"}, {"slope": [1.0]}, {"slope": 2}])
def test_numbers_of_linear_are_mappings(numbers: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(numbers))):
        EnsembleConfig(**{"rule": "linear", "members": {"a": "m"}, "constant": {"a": 1.0}, **numbers})


@pytest.mark.parametrize("name", ["model", "adapter", "revision", "dtype", "device"])
@pytest.mark.parametrize("value", ["", 3])
def test_member_fields_are_texts(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} of a member is {value!r}"):
        MemberConfig(**{"model": "m", name: value})


def test_a_member_is_frozen_and_writes_only_what_differs() -> None:
    member = MemberConfig("m", dtype="float16")
    assert member.to_dict() == {"model": "m", "dtype": "float16"}
    with pytest.raises(AttributeError):
        member.model = "other"  # type: ignore[misc]
