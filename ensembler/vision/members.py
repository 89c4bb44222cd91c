"""Find and check the members of an ensemble of image classifiers; nothing of their weights is read here.

classifier   a model of `AutoModelForImageClassification`
head         the vision tower of a model, frozen, with a linear head in a file of its own
zero-shot    a dual encoder such as CLIP, whose head is made from the names of the classes
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoImageProcessor

from ensembler.config import MemberConfig
from ensembler.engine.members import DUAL_ENCODERS, MemberFiles
from ensembler.errors import MemberError
from ensembler.extras import require
from ensembler.sources import is_local, not_found, one_line
from ensembler.vision.classes import label_names
from ensembler.vision.heads import HeadInfo, read_info
from ensembler.weights import check_folder

CLASSIFIER, HEAD, ZERO_SHOT = "classifier", "head", "zero-shot"
_REFUSED = {
    "adapter": "merge it into the model's files first",
    "quantization": "leave it out, or give a dtype",
    "device_map": "give one device",
}


@dataclass(frozen=True)
class ImageMember(MemberFiles):
    """A member whose files were found and checked.

    `kind`: 'classifier', 'head' or 'zero-shot'. `processor`: its own image processor. `classes`: the names of its
    logits in their order, None where it takes the ensemble's; `head`: what its head's file says.
    """

    kind: str = CLASSIFIER
    processor: Any = None
    classes: tuple[str, ...] | None = None
    head: HeadInfo | None = None

    @property
    def is_dual(self) -> bool:
        """Whether the model has a text tower too, and compares features by their angles."""
        return self.model_config.model_type in DUAL_ENCODERS

    @property
    def normalize(self) -> bool:
        """Whether its head is for features of length 1."""
        return self.is_dual if self.head is None or self.head.normalize is None else self.head.normalize

    @property
    def assumptions(self) -> list[str]:
        """What is taken for granted since its head's file does not say it, a line each."""
        found = []
        if self.head is not None and self.head.normalize is None:
            how = "they are, as a dual encoder's" if self.is_dual else "they are not"
            found.append(f"whether features are scaled to length 1 ('normalize' in its metadata); assumed: {how}")
        if self.head is not None and self.head.classes is None:
            found.append("which classes it has ('classes' in its metadata); assumed: the ensemble's, in their order")
        return [f"{self.role}: its head does not say {each}" for each in found]


def check_image_member(role: str, config: MemberConfig) -> ImageMember:
    """Find and check a member's files: configs, processor, safetensors headers, head. Raises MemberError."""
    require("PIL.Image", "vision")
    for name, remedy in _REFUSED.items():
        if getattr(config, name) is not None:
            raise MemberError(f"{role}: an image classifier takes no {name}; {remedy}")
    config = config.absolute()
    if is_local(config.model):
        check_folder(role, Path(config.model))
    try:
        model_config = AutoConfig.from_pretrained(config.model, revision=config.revision)
    except (OSError, ValueError, KeyError) as error:
        raise not_found(role, config.model, error) from error
    head = None if config.head is None else read_info(role, Path(config.head))
    kind = _kind(role, config, model_config)
    try:  # in the variant that needs Pillow and no torchvision
        processor = AutoImageProcessor.from_pretrained(config.model, revision=config.revision, backend="pil")
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise MemberError(
            f"{role}: the image processor of {config.model} (preprocessor_config.json) cannot be read: "
            f"{one_line(error)}"
        ) from error
    classes = label_names(model_config) if kind == CLASSIFIER else None if head is None else head.classes
    return ImageMember(role, config, model_config, None, None, False, kind, processor, classes, head)


def _kind(role: str, config: MemberConfig, model_config: Any) -> str:
    names = model_config.architectures or []
    if config.head is not None:
        return HEAD
    if any("ForImageClassification" in name for name in names):
        return CLASSIFIER
    if model_config.model_type in DUAL_ENCODERS:
        return ZERO_SHOT
    raise MemberError(
        f"{role}: {config.model} is a {', '.join(names) or model_config.model_type}; expected an image classifier, a "
        "dual encoder such as CLIP, or a vision tower with --head"
    )
