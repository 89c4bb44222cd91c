"""Ensembles of image classifiers: equal to a plain reference whatever the families and input sizes."""

from __future__ import annotations

import json
import random
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("PIL")

from helpers.vision_cases import (
    CLASSES,
    TRIO,
    alone,
    random_images,
    rewrite,
    save_clip,
    save_convnext,
    save_dinov2,
    save_head,
    save_segformer,
    save_siglip,
    save_vit,
    weighted_sum,
    with_other_classifier,
    zero_shot_alone,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Dinov2Model,
    pipeline,
)

from ensembler import EnsembleForCausalLM, EnsembleForImageClassification
from ensembler.demo import demo_folder
from ensembler.errors import ClassesError, ConfigError, InputError, LogitsError, MemberError, RunError
from ensembler.rules import RULES

SAVE = {"vit": save_vit, "convnext": save_convnext, "dinov2": save_dinov2}


@pytest.mark.parametrize("seed", range(40))
def test_random_members_equal_the_plain_reference(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    families = [draw.choice(sorted(SAVE)) for _ in TRIO]
    folders = {
        role: SAVE[name](tmp_path / role, 10 * seed + i)
        for i, (role, name) in enumerate(zip(TRIO, families, strict=True))
    }
    rule, alpha = draw.choice(("base-change", "eft")), draw.choice((0.0, 0.3, 1.0, 1.5))
    images = random_images(draw.randint(1, 5), seed)
    model = EnsembleForImageClassification.from_members(rule=rule, alpha=alpha, members=folders)
    found = model(model.prepare(images)).logits
    members = {role: alone(folder, images) for role, folder in folders.items()}
    expected = weighted_sum(members, RULES[rule].weights(alpha))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    if alpha == 0:
        assert torch.equal(found, members[RULES[rule].anchor])


@pytest.mark.parametrize("anchor", ["vit", "convnext", "dinov2"])
def test_at_alpha_0_the_ensemble_is_its_anchor_bit_for_bit(anchor: str, tmp_path: Path) -> None:
    folders = {
        "source_ft": SAVE[anchor](tmp_path / "ft", 1),
        "source_pt": save_vit(tmp_path / "pt", 2),
        "target_pt": save_clip(tmp_path / "clip", 3),
    }
    images = random_images(6, 4)
    model = EnsembleForImageClassification.from_members(alpha=0.0, members=folders)
    assert torch.equal(model(model.prepare(images)).logits, alone(folders["source_ft"], images))


def test_families_with_different_input_sizes_together(tmp_path: Path) -> None:
    """A ViT, a ConvNeXt, a CLIP used zero-shot, and a head on a bare DINOv2: four sizes of input."""
    dino = save_dinov2(tmp_path / "dino", 3, head=False)
    head = save_head(tmp_path / "head.safetensors", 16, 5)
    members: dict[str, Any] = {
        "a": str(save_vit(tmp_path / "vit", 1)),
        "b": str(save_convnext(tmp_path / "convnext", 2)),
        "c": str(save_clip(tmp_path / "clip", 4)),
        "d": {"model": str(dino), "head": str(head)},
    }
    numbers = {"constant": {"a": 1.0, "b": 0.5}, "slope": {"c": 1.0, "d": -0.7}}
    images = random_images(5, 7)
    model = EnsembleForImageClassification.from_members(rule="linear", alpha=0.8, members=members, **numbers)
    prepared = model.prepare(images)
    assert {role: tuple(values.shape[1:]) for role, values in prepared.items()} == {
        "a": (3, 16, 16),
        "b": (3, 32, 32),
        "c": (3, 24, 24),
        "d": (3, 28, 28),
    }
    logits = model.member_logits(prepared)
    with torch.no_grad():
        features = Dinov2Model.from_pretrained(dino).eval()(prepared["d"]).pooler_output
        plain = torch.nn.functional.linear(features, *model.towers[3].heads["d"].parameters())
    expected = {
        "a": alone(tmp_path / "vit", images),
        "b": alone(tmp_path / "convnext", images),
        "c": zero_shot_alone(tmp_path / "clip", images, [f"a photo of a {name}." for name in CLASSES]),
        "d": plain,
    }
    for role, values in expected.items():
        torch.testing.assert_close(logits[role], values, rtol=1e-4, atol=1e-4, msg=lambda said, r=role: f"{r}: {said}")
    assert torch.equal(logits["a"], expected["a"])
    weights = {"a": 1.0, "b": 0.5, "c": 0.8, "d": -0.56}
    torch.testing.assert_close(model(prepared).logits.double(), weighted_sum(logits, weights), rtol=1e-5, atol=1e-4)


def test_images_together_are_images_one_by_one(tmp_path: Path) -> None:
    folders = {role: SAVE[name](tmp_path / role, 3) for role, name in zip(TRIO, SAVE, strict=True)}
    images = random_images(7, 1)
    model = EnsembleForImageClassification.from_members(alpha=0.6, members=folders)
    together = model(model.prepare(images)).logits
    single = torch.cat([model(model.prepare([image])).logits for image in images])
    torch.testing.assert_close(together, single, rtol=1e-4, atol=1e-5)


# -- members that share -----------------------------------------------------------------------------------------------


def num_forwards(model: EnsembleForImageClassification, images: list[Any]) -> int:
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    handles = [tower.model.register_forward_hook(count) for tower in model.towers]
    handles += [
        tower.model.vision_model.register_forward_hook(count)
        for tower in model.towers
        if hasattr(tower.model, "vision_model")
    ]
    model(model.prepare(images))
    for handle in handles:
        handle.remove()
    return runs


@pytest.mark.parametrize("family", sorted(SAVE))
def test_classifiers_that_differ_in_their_head_alone_run_their_backbone_once(family: str, tmp_path: Path) -> None:
    source = SAVE[family](tmp_path / "pt", 1)
    folders = {
        "source_ft": with_other_classifier(source, tmp_path / "ft", 5),
        "source_pt": source,
        "target_pt": SAVE[family](tmp_path / "target", 2),
    }
    images = random_images(4, 2)
    model = EnsembleForImageClassification.from_members(alpha=0.9, members=folders)
    assert [tower.roles for tower in model.towers] == [("source_ft", "source_pt"), ("target_pt",)]
    assert [type(tower.model.classifier) for tower in model.towers] == [torch.nn.Identity, torch.nn.Linear]
    assert num_forwards(model, images) == 2
    logits = model.member_logits(model.prepare(images))
    for role, folder in folders.items():
        assert torch.equal(logits[role], alone(folder, images)), role


def test_zero_shot_and_a_head_share_their_frozen_tower(tmp_path: Path) -> None:
    clip = save_clip(tmp_path / "clip", 1)
    members: dict[str, Any] = {
        "source_ft": {"model": str(clip), "head": str(save_head(tmp_path / "head.safetensors", 12, 3, bias=False))},
        "source_pt": str(clip),
        "target_pt": str(save_clip(tmp_path / "target", 2)),
    }
    images = random_images(4, 2)
    model = EnsembleForImageClassification.from_members(alpha=0.5, members=members)
    assert [tower.roles for tower in model.towers] == [("source_ft", "source_pt"), ("target_pt",)]
    assert num_forwards(model, images) == 2
    logits = model.member_logits(model.prepare(images))
    prompts = [f"a photo of a {name}." for name in CLASSES]
    torch.testing.assert_close(logits["source_pt"], zero_shot_alone(clip, images, prompts), rtol=1e-4, atol=1e-4)
    features = model.towers[0].features(model.prepare(images)["source_ft"])
    weight = model.towers[0].heads["source_ft"].weight
    torch.testing.assert_close(
        logits["source_ft"], features / features.norm(dim=-1, keepdim=True) @ weight.T, rtol=1e-4, atol=1e-5
    )


def test_what_differs_below_the_head_is_not_shared(tmp_path: Path) -> None:
    source = save_vit(tmp_path / "pt", 1)
    tuned = with_other_classifier(source, tmp_path / "ft", 5)
    other = AutoModelForImageClassification.from_pretrained(tuned)
    with torch.no_grad():
        other.vit.layernorm.bias[3] += 1e-3
    other.save_pretrained(tuned)
    model = EnsembleForImageClassification.from_members(
        members={"source_ft": tuned, "source_pt": source, "target_pt": save_vit(tmp_path / "t", 2)}
    )
    assert {tower.roles for tower in model.towers} == {(role,) for role in TRIO}


def test_classifiers_that_only_call_themselves_otherwise_share(tmp_path: Path, said: list[str]) -> None:
    source = save_vit(tmp_path / "pt", 1)
    tuned = with_other_classifier(source, tmp_path / "ft", 5)
    noted = {"finetuning_task": "animals", "architectures": ["ViTModel", "ViTForImageClassification"]}
    rewrite(tuned / "config.json", lambda content: content.update({**noted, "transformers_version": "4.0"}))
    model = EnsembleForImageClassification.from_members(
        members={"source_ft": tuned, "source_pt": source, "target_pt": save_vit(tmp_path / "t", 2)}
    )
    assert [tower.roles for tower in model.towers] == [("source_ft", "source_pt"), ("target_pt",)]
    assert said == ["source_ft and source_pt share one tower, which is run once"]


def test_copies_of_a_tower_are_shared_and_others_are_not(tmp_path: Path) -> None:
    """As where a head was trained on a frozen CLIP, and both were saved together."""
    clip = save_clip(tmp_path / "clip", 1)
    copied = shutil.copytree(clip, tmp_path / "copied")
    members: dict[str, Any] = {
        "source_ft": {"model": str(copied), "head": str(save_head(tmp_path / "head.safetensors", 12, 3))},
        "source_pt": str(clip),
        "target_pt": str(save_clip(tmp_path / "target", 2)),
    }
    images = random_images(3)
    model = EnsembleForImageClassification.from_members(members=members)
    assert [tower.roles for tower in model.towers] == [("source_ft", "source_pt"), ("target_pt",)]
    logits = model(model.prepare(images)).logits
    tensors = load_file(copied / "model.safetensors")
    tensors["vision_model.post_layernorm.bias"][3] += 1e-3
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    other = EnsembleForImageClassification.from_members(members=members)
    assert {tower.roles for tower in other.towers} == {(role,) for role in TRIO}
    assert not torch.equal(other(other.prepare(images)).logits, logits)


def test_images_are_decoded_and_prepared_one_after_another(tmp_path: Path) -> None:
    model = EnsembleForImageClassification.from_members(
        members={role: SAVE[name](tmp_path / role, 3) for role, name in zip(TRIO, SAVE, strict=True)}
    )
    alive: list[Any] = []
    most = 0

    def opened() -> Iterator[Any]:
        nonlocal most
        for image in random_images(8, 1):
            image = image.copy()
            alive.append(weakref.ref(image))
            most = max(most, sum(one() is not None for one in alive))
            yield image
            del image

    prepared = model.prepare(opened())
    assert most <= 2  # the last one is let go when the next one has come
    together = model.prepare(random_images(8, 1))
    assert all(torch.equal(prepared[role], together[role]) for role in TRIO)
    assert prepared["source_ft"].shape[0] == 8
    assert model.prepare([]) == {}


def test_what_prepares_images_otherwise_is_not_shared(tmp_path: Path) -> None:
    source = save_vit(tmp_path / "pt", 1)
    tuned = with_other_classifier(source, tmp_path / "ft", 5)
    path = tuned / "preprocessor_config.json"
    path.write_text(path.read_text().replace('"do_normalize": true', '"do_normalize": false'))
    model = EnsembleForImageClassification.from_members(
        members={"source_ft": tuned, "source_pt": source, "target_pt": save_vit(tmp_path / "t", 2)}
    )
    assert len(model.towers) == 3
    assert torch.equal(
        model.member_logits(model.prepare(random_images(2)))["source_ft"], alone(tuned, random_images(2))
    )


# -- the folder -------------------------------------------------------------------------------------------------------


def test_the_folder_comes_back_the_same_and_moves_with_its_members(tmp_path: Path) -> None:
    here = tmp_path / "here"
    members: dict[str, Any] = {
        "source_ft": {
            "model": str(save_clip(here / "clip", 1)),
            "head": str(save_head(here / "head.safetensors", 12, 3)),
        },
        "source_pt": str(here / "clip"),
        "target_pt": str(save_vit(here / "vit", 2)),
    }
    images = random_images(3)
    model = EnsembleForImageClassification.from_members(alpha=0.4, members=members)
    before = model(model.prepare(images)).logits
    model.save_pretrained(here / "ensemble")
    (tmp_path / "there").mkdir()
    here.rename(tmp_path / "there" / "here")
    for load in (EnsembleForImageClassification.from_pretrained, AutoModelForImageClassification.from_pretrained):
        again = load(tmp_path / "there" / "here" / "ensemble")
        assert torch.equal(again(again.prepare(images)).logits, before)
    assert (
        EnsembleForImageClassification.from_pretrained(tmp_path / "there" / "here" / "ensemble", alpha=0.0).alpha == 0
    )


def test_the_pipeline_of_transformers_names_the_classes(tmp_path: Path) -> None:
    """Of members that want the same images, whose processor it is given."""
    folders = {role: save_vit(tmp_path / role, i) for i, role in enumerate(TRIO)}
    model = EnsembleForImageClassification.from_members(alpha=0.5, members=folders)
    assert model.config.id2label == dict(enumerate(CLASSES))
    assert model.config.label2id == {name: index for index, name in enumerate(CLASSES)}
    assert model.config.num_labels == 7
    model.save_pretrained(tmp_path / "ensemble")
    assert not {"id2label", "label2id"} & set(json.loads((tmp_path / "ensemble" / "config.json").read_text()))
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "ensemble")
    processor = AutoImageProcessor.from_pretrained(folders["source_ft"], backend="pil")
    classify = pipeline("image-classification", model=again, image_processor=processor)
    for image in random_images(3):
        expected = model(model.prepare([image])).logits[0].softmax(-1)
        found = classify(image, top_k=7)
        assert [each["label"] for each in found] == [CLASSES[index] for index in expected.argsort(descending=True)]
        assert [each["score"] for each in found] == pytest.approx(expected.sort(descending=True).values.tolist())


def test_texts_and_images_refuse_each_other(tmp_path: Path) -> None:
    model = EnsembleForImageClassification.from_members(
        members={role: save_vit(tmp_path / role, i) for i, role in enumerate(TRIO)}
    )
    model.save_pretrained(tmp_path / "images")
    with pytest.raises(
        ConfigError, match="is an ensemble of image classifiers, which read no texts; use ensembler cla"
    ):
        EnsembleForCausalLM.from_pretrained(tmp_path / "images")
    with pytest.raises(ConfigError, match="is an ensemble of language models, which see no images; use ensembler gene"):
        EnsembleForImageClassification.from_pretrained(demo_folder())


# -- what cannot be ---------------------------------------------------------------------------------------------------


def test_classes_are_a_contract(tmp_path: Path) -> None:
    def make(other: Any, **more: Any) -> EnsembleForImageClassification:
        folder = save_vit(tmp_path / f"other{len(list(tmp_path.iterdir()))}", 2, other)
        members = {"source_ft": mine, "source_pt": mine, "target_pt": folder}
        return EnsembleForImageClassification.from_members(members=members, **more)

    mine = save_vit(tmp_path / "mine", 1)
    with pytest.raises(ClassesError, match=r"^source_ft has 7 classes; target_pt lacks 'hen', 'pig': if they are"):
        make(CLASSES[:5])
    with pytest.raises(ClassesError, match=r"target_pt lacks 'owl' and has 'uhu' besides"):
        make(("cat", "dog", "uhu", *CLASSES[3:]))
    with pytest.raises(ClassesError, match=r"another order: class 0 is 'cat' and 'dog'"):
        make(("dog", "cat", *CLASSES[2:]))
    with pytest.raises(ClassesError, match=r"lacks 'cat', 'dog', 'owl' and 4 more and has 'LABEL_0', 'LABEL_1'"):
        make([f"LABEL_{i}" for i in range(7)])
    assert make(("cat", "dog", "uhu", *CLASSES[3:]), aliases={"uhu": "owl"}).classes == CLASSES
    with pytest.raises(ClassesError, match="the list of classes has 7 classes; source_ft lacks 'cow' and has 'pig'"):
        make(CLASSES, classes=[*CLASSES[:6], "cow"])


TWO_CRANES = ("goose", "crane", "owl", "maillot", "crane", "maillot", "crane")
CRANES = {"crane": ["bird", "machine", "crane"], "maillot": ["maillot", "tank suit"]}
UNIQUE = ("goose", "bird", "owl", "maillot", "machine", "tank suit", "crane")


def test_classes_of_one_name_get_labels_of_their_own(tmp_path: Path) -> None:
    """As ImageNet's two cranes and two maillots: the k-th of a name gets its k-th label, in every member."""
    two, other = save_vit(tmp_path / "two", 1, TWO_CRANES), save_vit(tmp_path / "other", 2, UNIQUE)

    def make(target: Path, **more: Any) -> EnsembleForImageClassification:
        members = {"source_ft": two, "source_pt": two, "target_pt": target}
        return EnsembleForImageClassification.from_members(members=members, alpha=0.0, **more)

    for target in (two, other):
        model = make(target, aliases=CRANES)
        assert model.classes == UNIQUE
        assert make(target, aliases=CRANES, classes=UNIQUE).classes == UNIQUE
        model.save_pretrained(tmp_path / f"saved {target.name}")
        again = EnsembleForImageClassification.from_pretrained(tmp_path / f"saved {target.name}")
        assert again.classes == UNIQUE
        images = random_images(2)
        assert torch.equal(again(again.prepare(images)).logits, model(model.prepare(images)).logits)
    for more in ({}, {"classes": UNIQUE}):
        remedy = (
            r'give --aliases FILE with a label for each of them, such as \{"crane": \["crane \(1\)", "crane \(2\)", "cr'
        )
        with pytest.raises(ClassesError, match=rf"source_ft has the class 'crane' 3 times \(1, 4, 6\); {remedy}"):
            make(two, **more)
    with pytest.raises(
        ClassesError, match=r"the list of classes has the class 'crane' 3 times .*; give each class a la"
    ):
        make(two, aliases=CRANES, classes=TWO_CRANES)
    with pytest.raises(ClassesError, match="aliases has 2 labels for 'crane', which source_ft has 3 classes of"):
        make(two, aliases={**CRANES, "crane": ["a", "b"]})
    with pytest.raises(ClassesError, match=r"source_ft has the class 'x' 2 times \(0, 2\); give each class a label of"):
        make(two, aliases={**CRANES, "goose": "x", "owl": "x"})
    with pytest.raises(ConfigError, match=r"aliases has \['a', None, 'c'\] for 'crane'; expected a text"):
        make(two, aliases={"crane": ["a", None, "c"]})


def zero_shot_of(folder: Path, classes: Any, **more: Any) -> EnsembleForImageClassification:
    return EnsembleForImageClassification.from_members(
        rule="linear", members={"a": folder}, constant={"a": 1.0}, classes=classes, **more
    )


@pytest.mark.parametrize("save", [save_clip, save_siglip])
def test_prompts_that_the_text_tower_cannot_read_whole_are_refused(save: Any, tmp_path: Path) -> None:
    """Cut, the two classes would be one; at the tower's length exactly they are not."""
    dual = save(tmp_path / "dual", 1)
    room = 30 if save is save_clip else 32  # of 32 tokens, a character each; CLIP's hold begin and end
    whole = [letter * room for letter in "ab"]
    model = zero_shot_of(dual, whole, templates=["{}"])
    weight = model.towers[0].heads["a"].weight
    assert not torch.equal(weight[0], weight[1])
    refused = rf"^a: '{'a' * room}ab' has 34 tokens; the text tower of .*dual reads 32: shorten it, or give the class"
    with pytest.raises(MemberError, match=refused):
        zero_shot_of(dual, ["cat", "a" * room + "ab"], templates=["{}"])
    with pytest.raises(MemberError, match="has 34 tokens"):
        zero_shot_of(dual, ["cat", "dog"], templates=["{}", "{}" + "a" * (room - 1)])
    shortened = zero_shot_of(dual, ["cat", "a" * 99], templates=["{}"], class_texts={"a" * 99: "aa"})
    assert shortened.classes == ("cat", "a" * 99)


def test_classes_that_the_text_tower_reads_alike_are_refused(tmp_path: Path) -> None:
    clip = save_clip(tmp_path / "clip", 1)
    alike = "^a: 'crane' and 'crane' are the same tokens to the text tower of .*clip; give the class other words"
    with pytest.raises(MemberError, match=alike):
        zero_shot_of(clip, ["bird", "owl", "machine"], class_texts={"bird": "crane", "machine": "crane"})


def test_zero_shot_members_need_classes(tmp_path: Path) -> None:
    with pytest.raises(ClassesError, match="none of a names its classes; give them with --classes FILE"):
        EnsembleForImageClassification.from_members(
            rule="linear", members={"a": save_clip(tmp_path / "clip")}, constant={"a": 1.0}
        )


@pytest.mark.parametrize("template", ["a photo", "{} and {}"])
def test_a_template_has_one_place_for_the_class(template: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected one \{\} in it"):
        EnsembleForImageClassification.from_members(
            members=dict.fromkeys(TRIO, save_vit(tmp_path / "vit")), templates=[template]
        )


def test_members_that_cannot_be_loaded_are_named(tmp_path: Path) -> None:
    vit, clip = save_vit(tmp_path / "vit"), save_clip(tmp_path / "clip")

    def refuse(member: Any, words: str) -> None:
        with pytest.raises(MemberError, match=words):
            EnsembleForImageClassification.from_members(
                members={"source_ft": member, "source_pt": vit, "target_pt": vit}
            )

    refuse(
        demo_folder() / "source_pt", "source_ft: .*expected an image classifier, a dual encoder such as CLIP, or a vi"
    )
    refuse({"model": str(vit), "adapter": str(vit)}, "source_ft: an image classifier takes no adapter; merge it")
    refuse({"model": str(clip), "head": str(tmp_path / "none")}, "source_ft: there is no head ")
    wide = save_head(tmp_path / "wide.safetensors", 13)
    refuse({"model": str(clip), "head": str(wide)}, "source_ft: its head reads 13 features, and .*clip has 12")
    wrong = save_head(tmp_path / "wrong.safetensors", 12, classes='["cat"]')
    refuse({"model": str(clip), "head": str(wrong)}, "says classes that are not 7 names")
    wordy = save_head(tmp_path / "wordy.safetensors", 12, normalize="yes")
    refuse({"model": str(clip), "head": str(wordy)}, "wordy.safetensors says normalize 'yes'; expected 'true' or 'fa")
    bare = save_head(tmp_path / "bare.safetensors", 16)
    flat = save_segformer(tmp_path / "segformer")
    refuse(
        {"model": str(flat), "head": str(bare)}, r"^source_ft: a SegformerModel has no pooled features for a head; give"
    )
    (vit / "preprocessor_config.json").unlink()
    refuse(str(vit), "source_ft: the image processor of .*vit")


def test_a_member_that_fails_is_named(tmp_path: Path) -> None:
    model = EnsembleForImageClassification.from_members(
        members={role: save_vit(tmp_path / role, i) for i, role in enumerate(TRIO)}
    )
    prepared = model.prepare(random_images(2))
    with pytest.raises(InputError, match=r"pixel_values has nothing for source_pt"):
        model({role: values for role, values in prepared.items() if role != "source_pt"})
    with pytest.raises(RunError, match=r"^target_pt failed: "):
        model({**prepared, "target_pt": torch.zeros(2, 3, 8, 8)})
    with torch.no_grad():
        model.towers[2].model.classifier.bias[2] = torch.nan
    with pytest.raises(LogitsError, match="source_pt computed NaN"):
        model(prepared)
