"""Heads that zero-shot members make from texts: cached, checked, and equal to the dual encoder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("PIL")

from helpers.vision_cases import (
    CLASSES,
    TRIO,
    random_images,
    rewrite,
    save_clip,
    save_siglip,
    save_vit,
    weighted_sum,
    zero_shot_alone,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageClassification,
    AutoTokenizer,
    CLIPModel,
    SiglipModel,
)

from ensembler import EnsembleForImageClassification
from ensembler.config import IMAGES, EnsembleConfig
from ensembler.rules import RULES
from ensembler.vision import zero_shot
from ensembler.vision.answers import describe_images
from ensembler.vision.image_preflight import check_images


def test_several_prompts_are_averaged_and_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = save_clip(tmp_path / "clip", 1)
    prompts = ["a photo of a {}.", "one {}", "so {} it is"]
    members = {"a": str(clip)}

    def make(templates: list[str]) -> EnsembleForImageClassification:
        return EnsembleForImageClassification.from_members(
            rule="linear", members=members, constant={"a": 1.0}, classes=CLASSES, templates=templates
        )

    images = random_images(3)
    first = make(prompts)
    weights = []
    for name in CLASSES:  # the rows one by one, by transformers alone
        rows = [text_features(clip, prompt.format(name)) for prompt in prompts]
        mean = torch.stack([row / row.norm() for row in rows]).mean(0)
        weights.append(mean / mean.norm())
    scale = CLIPModel.from_pretrained(clip).logit_scale.exp()
    torch.testing.assert_close(first.towers[0].heads["a"].weight, torch.stack(weights) * scale, rtol=1e-4, atol=1e-5)

    made = list((tmp_path / "heads").iterdir())
    assert len(made) == 1
    monkeypatch.setattr(zero_shot, "_make", lambda *_: pytest.fail("the head was made again"))
    again = make(prompts)
    assert torch.equal(first(first.prepare(images)).logits, again(again.prepare(images)).logits)
    with pytest.raises(pytest.fail.Exception):
        make(prompts[:2])


def test_a_head_in_the_cache_is_of_one_config_tokenizer_and_text_tower(tmp_path: Path) -> None:
    """Each of them changes the features of texts."""
    plain = save_clip(tmp_path / "clip", 1)

    def head(name: str, change: Callable[[Path], object] = lambda folder: None) -> torch.Tensor:
        folder = shutil.copytree(plain, tmp_path / name)
        change(folder)
        checked = check_images(config_of(folder))
        digests.add(json.dumps(describe_images(checked)["members"]["a"] | {"model": ""}, sort_keys=True))
        return EnsembleForImageClassification.from_checked(checked).towers[0].heads["a"].weight

    def swap(folder: Path) -> None:
        def exchange(content: dict[str, Any]) -> None:
            ids = content["model"]["vocab"]
            ids["a"], ids["o"] = ids["o"], ids["a"]

        rewrite(folder / "tokenizer.json", exchange)

    def late_byte(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors["text_model.encoder.layers.0.mlp.fc1.weight"].flatten()[-1] += 1
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    digests: set[str] = set()
    first = head("first")
    assert torch.equal(head("copy"), first)
    assert (len(list((tmp_path / "heads").iterdir())), len(digests)) == (1, 1)
    others = [
        head("config", lambda folder: rewrite(folder / "config.json", slower)),
        head("tokenizer", swap),
        head("tower", late_byte),
    ]
    assert len(list((tmp_path / "heads").iterdir())) == 4
    assert len(digests) == 4
    assert not any(torch.equal(one, first) for one in others)


def slower(content: dict[str, Any]) -> None:
    content["text_config"]["hidden_act"] = "gelu"


def config_of(folder: Path, **more: Any) -> EnsembleConfig:
    settings = {"rule": "linear", "constant": {"a": 1.0}, "classes": list(CLASSES)}
    return EnsembleConfig(**{"task": IMAGES, "members": {"a": str(folder)}, **settings, **more})


def test_a_damaged_head_in_the_cache_is_made_again(tmp_path: Path, said: list[str]) -> None:
    clip = save_clip(tmp_path / "clip", 1)

    def weight() -> torch.Tensor:
        return EnsembleForImageClassification.from_checked(check_images(config_of(clip))).towers[0].heads["a"].weight

    first = weight()
    (path,) = (tmp_path / "heads").iterdir()
    whole = path.read_bytes()
    for damaged in (whole[:-5], b"", b"\0" * len(whole)):
        path.write_bytes(damaged)
        assert torch.equal(weight(), first)
        assert len(load_file(path)["weight"]) == 7
    assert len([line for line in said if "it is made again" in line]) == 3


def test_a_cache_that_cannot_be_written_to_costs_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Path) -> None:
        raise OSError("full")

    monkeypatch.setattr("os.replace", full)
    checked = check_images(config_of(save_clip(tmp_path / "clip", 1)))
    assert EnsembleForImageClassification.from_checked(checked).towers[0].heads["a"].weight.shape == (7, 12)
    assert list((tmp_path / "heads").iterdir()) == []


def test_a_word_with_braces_stands_in_the_prompt(tmp_path: Path) -> None:
    clip = save_clip(tmp_path / "clip", 1)
    heads = [
        EnsembleForImageClassification.from_checked(check_images(config_of(clip, **texts))).towers[0].heads["a"].weight
        for texts in (
            {"templates": ["{0} so {}"], "classes": ["a{b}", "c"]},
            {"templates": ["{}"], "classes": ["a{b}", "c"], "class_texts": {"a{b}": "{0} so a{b}", "c": "{0} so c"}},
        )
    ]
    assert torch.equal(*heads)


@torch.no_grad()
def text_features(clip: Path, text: str) -> torch.Tensor:
    inputs = AutoTokenizer.from_pretrained(clip)(text, return_tensors="pt")
    model = CLIPModel.from_pretrained(clip).eval()
    return model.get_text_features(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).pooler_output[0]


def test_siglip_is_used_as_it_was_trained(tmp_path: Path) -> None:
    """Texts are padded to their full length, and nothing is masked."""
    folder = save_siglip(tmp_path / "siglip", 1)
    images = random_images(3)
    model = EnsembleForImageClassification.from_members(
        rule="linear", members={"a": str(folder)}, constant={"a": 1.0}, classes=CLASSES
    )
    prepared = model.prepare(images)
    prompts = [f"a photo of a {name}." for name in CLASSES]
    texts = AutoTokenizer.from_pretrained(folder)(prompts, padding="max_length", max_length=32, return_tensors="pt")
    with torch.no_grad():
        alone = SiglipModel.from_pretrained(folder).eval()(input_ids=texts.input_ids, pixel_values=prepared["a"])
    torch.testing.assert_close(model(prepared).logits, alone.logits_per_image, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_members_of_lower_precision_are_combined_in_float32(dtype: str, tmp_path: Path) -> None:
    members = {role: {"model": str(save_vit(tmp_path / role, i)), "dtype": dtype} for i, role in enumerate(TRIO)}
    images = random_images(3)
    model = EnsembleForImageClassification.from_members(alpha=0.0, members=members)
    prepared = model.prepare(images)
    folder = tmp_path / "source_ft"
    plain = AutoModelForImageClassification.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    with torch.no_grad():
        alone = plain(pixel_values=prepared["source_ft"].to(plain.dtype)).logits
    logits = model(prepared).logits
    assert logits.dtype == torch.float32
    assert torch.equal(logits, alone.float())
    model.alpha = 0.7
    expected = weighted_sum(model.member_logits(prepared), RULES["base-change"].weights(0.7))
    torch.testing.assert_close(model(prepared).logits.double(), expected, rtol=1e-5, atol=1e-5)


def test_words_for_classes_stand_in_the_prompts(tmp_path: Path) -> None:
    clip = save_clip(tmp_path / "clip", 1)
    model = EnsembleForImageClassification.from_members(
        rule="linear",
        members={"a": str(clip)},
        constant={"a": 1.0},
        classes=["c1", "c2"],
        class_texts={"c1": "red fox"},
    )
    images = random_images(2)
    expected = zero_shot_alone(clip, images, ["a photo of a red fox.", "a photo of a c2."])
    torch.testing.assert_close(model(model.prepare(images)).logits, expected, rtol=1e-4, atol=1e-4)
