"""The files that are the model: those that transformers reads, in its order."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.patch_cases import edit_json, save_lora, save_model, weights
from transformers import AutoModelForCausalLM

from ensembler.errors import MemberError
from ensembler.patch.apply import apply_patches
from ensembler.patch.formats import read_patch
from ensembler.safetensors_files import read_model, weight_files

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def both(folder: Path, other: Path, whole: Path) -> None:
    shutil.copy(whole / SINGLE, folder)


def left_over(folder: Path, other: Path, whole: Path) -> None:
    """An index whose shards are gone."""
    both(folder, other, whole)
    for shard in folder.glob("model-*"):
        shard.unlink()


def named(folder: Path, other: Path, whole: Path) -> None:
    shutil.copy(whole / SINGLE, folder / SINGLE)
    shutil.copy(other / SINGLE, folder / "other.safetensors")
    edit_json(folder / "config.json", transformers_weights="other.safetensors")


def named_index(folder: Path, other: Path, whole: Path) -> None:
    shutil.copy(whole / SINGLE, folder)
    (folder / INDEX).rename(folder / "other.safetensors.index.json")
    edit_json(folder / "config.json", transformers_weights="other.safetensors.index.json")


def stray(folder: Path, other: Path, whole: Path) -> None:
    shutil.copy(other / SINGLE, folder / "model-00099-of-00099.safetensors")


CASES: dict[str, Callable[[Path, Path, Path], None]] = {
    "shards alone": lambda folder, other, whole: None,
    "a single file beside shards": both,
    "an index that is left over": left_over,
    "a file that config.json names": named,
    "an index that config.json names": named_index,
    "a shard that no index names": stray,
}


def test_a_file_that_config_names_and_is_not_there(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    edit_json(folder / "config.json", transformers_weights="other.safetensors")
    with pytest.raises(MemberError, match=r"config\.json names other\.safetensors .* which is not there; fetch it"):
        read_model(folder)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_the_model_is_what_transformers_reads(case: str, dtype: str | None, tmp_path: Path) -> None:
    """Three models in one folder: shards of the first, the single file of the third, another of the second."""
    folder = save_model(tmp_path / "model", seed=1, shards=True)
    CASES[case](folder, save_model(tmp_path / "other", seed=2), save_model(tmp_path / "whole", seed=3))
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    found: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        (tmp_path / "one").mkdir()
        shutil.copy(file, tmp_path / "one")
        found |= weights(tmp_path / "one")
        shutil.rmtree(tmp_path / "one")
    assert found.keys() == loaded.keys() == read_model(folder).tensors.keys()
    assert all(torch.equal(found[name], loaded[name]) for name in loaded)
    lora = save_lora(tmp_path / "lora", target_modules=["q_proj"])
    apply_patches([read_patch(lora)], folder, tmp_path / "out", dtype=dtype)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    for name in loaded:
        expected = loaded[name].to(getattr(torch, dtype or "float32")).float()
        assert torch.equal(written[name], expected) == ("q_proj" not in name), name
    indices = list((tmp_path / "out").glob("*.index.json"))
    assert len(indices) == (len(weight_files(folder)) > 1)
    for index in indices:
        names = set(json.loads(index.read_text())["weight_map"].values())
        assert names == {file.name for file in (tmp_path / "out").glob("*.safetensors")}


def test_a_lost_shard_is_named_by_the_index_that_is_read(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", shards=True)
    named_index(folder, save_model(tmp_path / "other"), save_model(tmp_path / "whole"))
    sorted(folder.glob("model-*"))[0].unlink()
    with pytest.raises(MemberError, match=r"model-00001\S+ is named by \S*other\.safetensors\.index\.json and is not"):
        read_model(folder)
