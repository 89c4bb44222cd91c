"""The folder of an ensemble pushed to the hub, here a folder: nothing goes out."""

from __future__ import annotations

import json
import shutil
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.tiny import random_ids
from huggingface_hub import HfApi
from transformers import PreTrainedModel

from ensembler import EnsembleForCausalLM, EnsembleForImageClassification, MemberConfig
from ensembler.errors import ConfigError
from ensembler.folder import IN_MEMORY

IDS = random_ids(2, 6)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    result: torch.Tensor = model(IDS).logits
    return result


@pytest.fixture
def made(folders: dict[str, Path]) -> EnsembleForCausalLM:
    return EnsembleForCausalLM.from_members(rule="eft", alpha=0.4, members=folders)


class FakeHub:
    """Keep an upload in a folder; it takes the arguments that `HfApi` takes."""

    def __init__(self, hub: Path) -> None:
        self.hub = hub
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, **given: Any) -> FakeHub:
        signature(HfApi).bind(**given)
        self.calls.append(("api", given))
        return self

    def create_repo(self, repo_id: str, **given: Any) -> Any:
        signature(HfApi.create_repo).bind(self, repo_id, **given)
        self.calls.append(("create", given))
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id: str, folder_path: Path, **given: Any) -> str:
        signature(HfApi.upload_folder).bind(self, repo_id=repo_id, folder_path=folder_path, **given)
        self.calls.append(("upload", given))
        shutil.copytree(folder_path, self.hub / repo_id)
        return f"https://hub/{repo_id}/commit/1"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr("ensembler.folder.HfApi", fake)
    return fake


def test_a_push_with_copies_stands_alone(
    made: EnsembleForCausalLM, folders: dict[str, Path], tmp_path: Path, hub: FakeHub
) -> None:
    before = logits(made)
    options = {"private": True, "token": "secret", "revision": "draft", "commit_message": "first"}
    assert made.push_to_hub("me/ens", copy_members=True, **options) == "https://hub/me/ens/commit/1"
    assert [name for name, _ in hub.calls] == ["api", "create", "upload"]
    assert hub.calls[0][1]["token"] == "secret"
    assert hub.calls[1][1] == {"private": True, "exist_ok": True}
    assert hub.calls[2][1] == {"revision": "draft", "create_pr": False, "commit_message": "first"}
    for folder in folders.values():
        shutil.rmtree(folder)
    assert torch.equal(logits(EnsembleForCausalLM.from_pretrained(tmp_path / "hub" / "me" / "ens")), before)


def test_a_push_of_local_members_is_refused_before_anything_is_sent(
    made: EnsembleForCausalLM, folders: dict[str, Path], hub: FakeHub
) -> None:
    with pytest.raises(
        ConfigError, match=rf"target_pt names {folders['target_pt']} on this machine.*copy_members=True"
    ):
        made.push_to_hub("me/ens")
    assert hub.calls == []


def test_a_push_names_members_by_their_hub_ids(made: EnsembleForCausalLM, tmp_path: Path, hub: FakeHub) -> None:
    """Members in memory are uploaded, those of the hub stay references."""
    made.config.members = {role: MemberConfig(f"org/{role}", revision="v1") for role in made.config.members}
    made.config.members["source_ft"] = MemberConfig(IN_MEMORY)
    made.push_to_hub("me/ens")
    written = json.loads((tmp_path / "hub" / "me" / "ens" / "config.json").read_text())["members"]
    assert written["target_pt"] == {"model": "org/target_pt", "revision": "v1"}
    assert written["source_ft"] == {"model": "./source_ft"}
    assert (tmp_path / "hub" / "me" / "ens" / "source_ft" / "model.safetensors").is_file()


@torch.no_grad()
def test_image_classifiers_are_pushed_with_heads_and_what_prepares_images(
    tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A classifier, a tower with a head of its own, and a zero-shot member."""
    pytest.importorskip("PIL")
    from helpers.vision_cases import CLASSES, random_images, save_clip, save_dinov2, save_head, save_vit

    monkeypatch.setattr("ensembler.vision.zero_shot.cache_folder", lambda: tmp_path / "heads")
    files = tmp_path / "files"
    tower = MemberConfig(
        str(save_dinov2(files / "dinov2", head=False)), head=str(save_head(files / "head.safetensors", 16))
    )
    members = {"source_ft": tower, "source_pt": save_vit(files / "vit"), "target_pt": save_clip(files / "clip")}
    made = EnsembleForImageClassification.from_members(alpha=0.4, members=members, classes=list(CLASSES))
    images = random_images(3)
    before = made(made.prepare(images)).logits
    with pytest.raises(ConfigError, match=r"source_ft names .*dinov2 on this machine"):
        made.push_to_hub("me/images")
    assert hub.calls == []
    made.push_to_hub("me/images", copy_members=True)
    shutil.rmtree(files)
    shutil.rmtree(tmp_path / "heads")
    pushed = EnsembleForImageClassification.from_pretrained(tmp_path / "hub" / "me" / "images")
    assert torch.equal(pushed(pushed.prepare(images)).logits, before)


def test_a_local_head_of_a_model_on_the_hub_is_refused(tmp_path: Path, hub: FakeHub) -> None:
    (tmp_path / "head.safetensors").write_bytes(b"")
    member = MemberConfig("org/tower", head=str(tmp_path / "head.safetensors"))
    ensemble = SimpleNamespace(config=SimpleNamespace(members={"source_ft": member}))
    with pytest.raises(ConfigError, match=r"source_ft names .*head.safetensors on this machine"):
        EnsembleForImageClassification._check_on_hub(ensemble)
