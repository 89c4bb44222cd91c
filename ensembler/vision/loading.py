"""Load the members of an ensemble of image classifiers: each tower once.

Members share where they cannot be told apart below their heads: models with equal weights, bit for bit, on one
device in one dtype, with one way to prepare images; of classifiers all weights count but those of `classifier`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageClassification, PreTrainedModel
from transformers.utils import logging

from ensembler.engine.devices import check_device, out_of_memory
from ensembler.errors import MemberError, RunError
from ensembler.extras import require
from ensembler.sources import one_line
from ensembler.vision.heads import Head, load_head
from ensembler.vision.members import CLASSIFIER, HEAD, ImageMember
from ensembler.vision.preflight import CheckedImages
from ensembler.vision.towers import CLASSIFIER_MODULE, FeatureTower, SharedTower, WholeClassifier
from ensembler.vision.zero_shot import zero_shot_head
from ensembler.weights import naming

_logger = logging.get_logger(__name__)
# In a config, but no part of what is computed: what classes are called, and what tools noted.
_LABELS = ("id2label", "label2id", "num_labels", "problem_type")
_NOTES = ("_name_or_path", "architectures", "dtype", "finetuning_task", "torch_dtype", "transformers_version")


def load_towers(checked: CheckedImages) -> list[SharedTower]:
    """Load the members of a checked ensemble, each model once, in the order of the roles.

    Raises ConfigError for a device that is not there, MemberError, or RunError where memory is short.
    """
    for member in checked.members.values():
        check_device(member.role, member.config.device)
    towers: list[SharedTower] = []
    loaded: dict[str, FeatureTower] = {}
    for role, member in checked.members.items():
        if member.kind == CLASSIFIER:
            _add_classifier(towers, member, _load(member))
            continue
        config = member.config
        key = repr((config.model, config.revision, config.dtype, config.device, member.processor.to_dict()))
        if key not in loaded:
            loaded[key] = _feature_tower(towers, member, _load(member))
        loaded[key].heads[role] = _head(member, loaded[key], checked)
    for tower in towers:
        if len(tower.roles) > 1:
            _logger.warning("%s share one tower, which is run once", " and ".join(tower.roles))
    return [tower.eval() for tower in towers]


def _feature_tower(towers: list[SharedTower], member: ImageMember, model: PreTrainedModel) -> FeatureTower:
    """The tower that is this model already, or a new one."""
    for tower in towers:
        if isinstance(tower, FeatureTower) and _is_alike(tower, member, model):
            return tower
    new = FeatureTower(model, {}, member.processor)
    towers.append(new)
    return new


def _add_classifier(towers: list[SharedTower], member: ImageMember, model: PreTrainedModel) -> None:
    """Add a classifier, to a tower that is loaded already where it differs in its head alone."""
    for index, tower in enumerate(towers):
        if isinstance(tower, FeatureTower) or not _is_alike(tower, member, model, but=CLASSIFIER_MODULE):
            continue
        if isinstance(tower, WholeClassifier):
            parted = tower.parted(_blank(tower))
            if parted is None:
                continue
            towers[index] = tower = parted
        tower.heads[member.role] = model.get_submodule(CLASSIFIER_MODULE)
        return
    towers.append(WholeClassifier(model, {member.role: nn.Identity()}, member.processor))


def _load(member: ImageMember) -> PreTrainedModel:
    config = member.config
    try:
        model, report = _class_of(member).from_pretrained(
            config.model,
            revision=config.revision,
            dtype=config.dtype if config.dtype == "auto" else getattr(torch, config.dtype),
            use_safetensors=True,
            output_loading_info=True,
            device_map={"": config.device},
        )
        if report["missing_keys"]:
            missing = sorted(report["missing_keys"])
            raise ValueError(f"its weights file lacks {len(missing)} tensors, {missing[0]} among them")
    except Exception as error:  # transformers and safetensors each raise what they like
        if out_of_memory(error):
            raise RunError(f"{member.role} ran out of memory while {config.model} was loaded") from error
        raise MemberError(f"{member.role}: {config.model} cannot be loaded: {one_line(error)}") from error
    loaded: PreTrainedModel = model.eval().requires_grad_(False)
    return loaded


def _class_of(member: ImageMember) -> Any:
    """The class of the model: towers with a projection go by their own name, which AutoModel does not look at."""
    if member.kind == CLASSIFIER:
        return AutoModelForImageClassification
    name = next(iter(member.model_config.architectures or []), "")
    return AutoModel if "ForImageClassification" in name else getattr(transformers, name, AutoModel)


def _head(member: ImageMember, tower: FeatureTower, checked: CheckedImages) -> Head:
    if member.kind != HEAD:
        return zero_shot_head(member, tower.model, checked)
    head = load_head(member.role, Path(str(member.config.head)), normalize=member.normalize).to(tower.device)
    num = _num_features(member, tower)
    if head.weight.shape[1] != num:
        raise MemberError(
            f"{member.role}: its head reads {head.weight.shape[1]} features, and {member.config.model} has {num}; "
            "give the head that was trained on it"
        )
    return head


@torch.inference_mode()
def _num_features(member: ImageMember, tower: FeatureTower) -> int:
    try:
        with naming(member.role):
            return tower.features(_blank(tower)).shape[1]
    except MemberError:
        raise
    except Exception as error:  # models raise what they like for images that they were not made for
        raise MemberError(
            f"{member.role}: {member.config.model} makes no features of an image: {one_line(error)}"
        ) from error


def _blank(tower: SharedTower) -> Tensor:
    """A picture of one colour, prepared."""
    image = require("PIL.Image", "vision")
    return tower.prepare(image.new("RGB", (64, 64), (90, 120, 150))).to(tower.device, tower.model.dtype)


def _is_alike(tower: SharedTower, member: ImageMember, model: PreTrainedModel, but: str | None = None) -> bool:
    """Whether a member's images and weights are those of a tower, bit for bit, `but` for a submodule of it."""
    if but is not None and not hasattr(model, but):
        return False
    if _facts(tower.model, tower.processor) != _facts(model, member.processor):
        return False
    mine, theirs = (
        {name: value for name, value in each.state_dict().items() if but is None or not name.startswith(f"{but}.")}
        for each in (tower.model, model)
    )
    return list(mine) == list(theirs) and all(
        mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name]) for name in mine
    )


def _facts(model: PreTrainedModel, processor: Any) -> tuple[object, ...]:
    """All that must be the same in models that are one, but for their weights."""
    return type(model), model.device, _settings(model.config.to_dict()), processor.to_dict()


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """What of a config, and of those within it, says what is computed; dtypes are those of the weights."""
    return {
        name: _settings(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in (*_LABELS, *_NOTES)
    }
