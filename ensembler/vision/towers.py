"""Run models on images with the heads of the members that share them, so that each model runs once.

Members share where they cannot be told apart below their heads: models with equal weights, bit for bit, on one
device in one dtype, with one way to prepare images; of classifiers all weights count but those of `classifier`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageClassification, PreTrainedModel
from transformers.utils import logging

from ensembler.engine.devices import check_devices, out_of_memory
from ensembler.errors import MemberError, RunError
from ensembler.extras import require
from ensembler.files import naming, one_line
from ensembler.vision.heads import load_head
from ensembler.vision.image_preflight import CLASSIFIER, ZERO_SHOT, CheckedImages, ImageMember
from ensembler.vision.zero_shot import zero_shot_head

_logger = logging.get_logger(__name__)
# In a config, and without influence on the logits: the names of classes, and the notes of tools.
_LABELS = {"id2label", "label2id", "num_labels", "problem_type"}
_NOTES = {"_name_or_path", "architectures", "dtype", "finetuning_task", "torch_dtype", "transformers_version"}


class Tower(nn.Module):
    """One model, and a head over its features for each of the members that it serves.

    `heads`: by role; `processor`: how images are prepared for all of them. A classifier alone has an identity as its
    head; of classifiers that differ in nothing but their module `classifier`, that module is the head.
    """

    def __init__(self, model: PreTrainedModel, processor: Any, *, is_classifier: bool) -> None:
        super().__init__()
        self.model = model
        self.processor = processor
        self.is_classifier = is_classifier
        self.heads = nn.ModuleDict()

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of the members that it serves."""
        return tuple(self.heads)

    def prepare(self, image: Any) -> Tensor:
        """Return an image of Pillow as pixel values (1, channels, height, width) float32, on the CPU."""
        values: Tensor = self.processor(images=[image], return_tensors="pt")["pixel_values"]
        return values

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Return the logits (rows, C) of its members by role. Raises RunError naming them where the model fails."""
        try:
            features = self.features(pixel_values)
            return {role: head(features) for role, head in self.heads.items()}
        except Exception as error:  # a model may raise anything; the user has to learn which of them it was
            fault = f"failed: {type(error).__name__}: {one_line(error)}"
            if out_of_memory(error):
                fault = f"ran out of memory on {self.model.device} for {len(pixel_values)} images; use a smaller batch"
            raise RunError(f"{' and '.join(self.roles)} {fault}") from error

    def features(self, pixel_values: Tensor) -> Tensor:
        """Return the input of the heads: pooled features (rows, F), projected where the model does that.

        For a classifier these are its logits, or the input of its module `classifier` where that is a head. Raises
        MemberError for a model that does not pool.
        """
        run = getattr(self.model, "get_image_features", self.model)
        output = run(pixel_values=pixel_values.to(self.model.device, self.model.dtype))
        for name in ("logits",) if self.is_classifier else ("image_embeds", "pooler_output"):
            found: Tensor | None = getattr(output, name, None)
            if found is not None:
                return found.flatten(1)  # convolutional models keep two axes of length 1
        raise MemberError(
            f"a {type(self.model).__name__} has no pooled features for a head; give a model that has, or one with a "
            "classifier of its own"
        )

    def blank_features(self) -> Tensor:
        """Return the features (1, F) of a picture of one colour."""
        return self.features(self.prepare(require("PIL.Image", "vision").new("RGB", (64, 64), (90, 120, 150))))

    def serves(self, model: PreTrainedModel, processor: Any) -> bool:
        """Return whether a model is this one, bit for bit, but for its head, and reads the same images."""
        if (type(model), model.device) != (type(self.model), self.model.device):
            return False
        if _settings(model.config.to_dict()) != _settings(self.model.config.to_dict()):
            return False
        if processor.to_dict() != self.processor.to_dict():
            return False
        own, other = (
            {
                name: values
                for name, values in each.state_dict().items()
                if not (self.is_classifier and name.startswith("classifier."))
            }
            for each in (self.model, model)
        )
        if own.keys() != other.keys():
            return False
        if any(own[name].dtype != other[name].dtype or not torch.equal(own[name], other[name]) for name in own):
            return False
        return not self.is_classifier or self._split()

    def _split(self) -> bool:
        """Make a head of the module `classifier`, and return whether the logits stay the same."""
        module = getattr(self.model, "classifier", None)
        if module is None or isinstance(module, nn.Identity):
            return module is not None
        logits = self.blank_features()
        self.model.classifier = nn.Identity()
        try:
            is_last = torch.equal(module(self.blank_features()), logits)
        except Exception:  # a model may ask more of its module than its output
            is_last = False
        if is_last:
            self.heads.update(dict.fromkeys(self.roles, module))
        else:
            self.model.classifier = module
        return is_last


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a config, at all depths, that change the logits; dtypes are compared in the weights."""
    return {
        name: _settings(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in _LABELS | _NOTES
    }


@torch.no_grad()
def load_towers(checked: CheckedImages) -> list[Tower]:
    """Load the members of a checked ensemble, those that share together, in the order of the roles.

    Raises ConfigError for a device that is not there, MemberError, or RunError where memory is short.
    """
    check_devices(checked.files.values())
    towers: list[Tower] = []
    models: WeakValueDictionary[str, PreTrainedModel] = WeakValueDictionary()  # a copy that no tower keeps is let go
    for role, member in checked.files.items():
        with naming(role):
            # A classifier is read in any case, since its own last module is to be its head.
            key = role if member.kind == CLASSIFIER else repr(replace(member.config, head=None))
            model = models.get(key)
            if model is None:
                model = models[key] = load_model(member)
            tower = next((tower for tower in towers if tower.serves(model, member.processor)), None)
            if tower is None:
                tower = Tower(model, member.processor, is_classifier=member.kind == CLASSIFIER)
                towers.append(tower)
            tower.heads[role] = _head(member, model, tower, checked)
    for tower in towers:
        if len(tower.roles) > 1:
            _logger.warning("%s share one tower, which is run once", " and ".join(tower.roles))
    return towers


def load_model(member: ImageMember) -> PreTrainedModel:
    """Load a member's model, without a head of its own file. Raises MemberError, or RunError where memory is short."""
    config = member.config
    try:
        model, report = _class_of(member).from_pretrained(
            config.model,
            revision=config.revision,
            dtype=config.dtype,
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
        raise MemberError(f"{config.model} cannot be loaded: {one_line(error)}") from error
    return model.requires_grad_(False)


def _class_of(member: ImageMember) -> Any:
    """The class of the model: towers with a projection go by their own name, which AutoModel does not look at."""
    if member.kind == CLASSIFIER:
        return AutoModelForImageClassification
    name = next(iter(member.model_config.architectures or []), "")
    return AutoModel if "ForImageClassification" in name else getattr(transformers, name, AutoModel)


def _head(member: ImageMember, model: PreTrainedModel, tower: Tower, checked: CheckedImages) -> nn.Module:
    if member.kind == CLASSIFIER:
        return model.classifier if tower.roles else nn.Identity()
    if member.kind == ZERO_SHOT:
        return zero_shot_head(member, model, checked)
    head = load_head(Path(str(member.config.head)), normalize=member.normalize).to(model.device)
    try:
        num_features = tower.blank_features().shape[1]
    except MemberError:
        raise
    except Exception as error:  # models raise what they like for images that they were not made for
        raise MemberError(f"{member.config.model} makes no features of an image: {one_line(error)}") from error
    if head.weight.shape[1] != num_features:
        raise MemberError(
            f"its head reads {head.weight.shape[1]} features, and {member.config.model} has {num_features}; give the "
            "head that was trained on it"
        )
    return head
