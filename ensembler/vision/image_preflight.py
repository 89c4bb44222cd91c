"""Check from configs and file headers, before any weight is read, that an ensemble of image classifiers is possible.

classifier   a model of `AutoModelForImageClassification`
head         the vision tower of a model, frozen, with a linear head in a file of its own
zero-shot    a dual encoder such as CLIP, whose head is made from the names of the classes
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor

from ensembler.config import IMAGES, EnsembleConfig, MemberConfig, check_roles
from ensembler.engine.members import DUAL_ENCODERS, MemberFiles, read_model_config
from ensembler.errors import ClassesError, ConfigError, MemberError
from ensembler.extras import require
from ensembler.files import naming, one_line
from ensembler.preflight import CheckedEnsemble
from ensembler.vision.heads import HeadInfo, agree, read_info
from ensembler.vocab import VocabularyContract

CLASSIFIER, HEAD, ZERO_SHOT = "classifier", "head", "zero-shot"
_REFUSED = {
    "adapter": "merge it into the model's files first",
    "quantization": "leave it out, or give a dtype",
    "device_map": "give one device",
}


@dataclass(frozen=True, kw_only=True)
class ImageMember(MemberFiles):
    """A member whose files were found and checked.

    `kind`: 'classifier', 'head' or 'zero-shot'. `processor`: its own image processor. `classes`: the names of its
    logits in their order, None where it takes the ensemble's; `head`: the header of its head's file.
    """

    kind: str
    processor: Any
    classes: tuple[str, ...] | None
    head: HeadInfo | None

    @property
    def normalize(self) -> bool:
        """Return whether its head takes features of length 1: as its file says, else for dual encoders."""
        stored = None if self.head is None else self.head.normalize
        return self.model_config.model_type in DUAL_ENCODERS if stored is None else stored

    @property
    def assumptions(self) -> list[str]:
        """Assumptions about a head whose file does not say more, a line each."""
        found = []
        if self.head is not None and self.head.normalize is None:
            scaled = "they are, as a dual encoder's" if self.normalize else "they are not"
            found.append(f"whether features are scaled to length 1 ('normalize' in its metadata); assumed: {scaled}")
        if self.head is not None and self.head.classes is None:
            found.append("which classes it has ('classes' in its metadata); assumed: the ensemble's, in their order")
        return [f"{self.role}: its head does not say {each}" for each in found]


@dataclass(frozen=True)
class CheckedImages(CheckedEnsemble):
    """A configuration whose members, classes and files were found to fit; no weight is loaded."""

    files: Mapping[str, ImageMember]

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels in the order of the logits."""
        return tuple(self.config.classes or ())

    @property
    def assumptions(self) -> list[str]:
        """Assumptions about the members' heads, a line each."""
        return [line for member in self.files.values() for line in member.assumptions]


def check_images(config: EnsembleConfig) -> CheckedImages:
    """Check every member and the contract of classes; `config` gets the classes and absolute paths.

    Raises ConfigError for an ensemble of language models, MemberError, or ClassesError.
    """
    if config.task != IMAGES:
        raise ConfigError(
            f"{config.name_or_path or 'this'} is an ensemble of language models, which see no images; use ensembler "
            "generate, or make one with: ensembler create --task image-classification"
        )
    rule = config.get_rule()
    check_roles(rule, config.members)
    members = {role: _check_member(role, config.members[role]) for role in rule.roles}
    classes = agree(config.classes, {role: member.classes for role, member in members.items()}, config.aliases)
    for role, member in members.items():
        if member.head is not None and member.head.num_classes != len(classes):
            raise ClassesError(f"{role}: its head has {member.head.num_classes:,} classes; expected {len(classes):,}")
        config.members[role] = member.config
    unknown = [name for name in config.class_texts or {} if name not in classes]
    if unknown:
        raise ClassesError(f"there are words for the class {unknown[0]!r}, which is not one of the ensemble's classes")
    config.name_classes(classes)
    widths = dict.fromkeys(rule.roles, len(classes))
    contract = VocabularyContract("identical", len(classes), widths, widths, dict.fromkeys(rule.roles, 0))
    return CheckedImages(config, members, {role: member.model_config for role, member in members.items()}, contract)


def _check_member(role: str, config: MemberConfig) -> ImageMember:
    """Find and check a member's files: configs, processor, safetensors headers, head. Raises MemberError."""
    require("PIL.Image", "vision")
    for name, remedy in _REFUSED.items():
        if getattr(config, name) is not None:
            raise MemberError(f"{role}: an image classifier takes no {name}; {remedy}")
    if config.trust_remote_code:
        raise MemberError(f"{role}: an image classifier may not run code of its own; leave --trust-remote-code out")
    config = config.absolute()
    model_config = read_model_config(role, config.model, revision=config.revision)
    with naming(role):
        head = None if config.head is None else read_info(Path(config.head))
        kind = HEAD if head is not None else _kind(config.model, model_config)
        try:  # in the variant that needs Pillow and no torchvision
            processor = AutoImageProcessor.from_pretrained(config.model, revision=config.revision, backend="pil")
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise MemberError(
                f"the image processor of {config.model} (preprocessor_config.json) cannot be read: {one_line(error)}"
            ) from error
    classes = None if head is None else head.classes
    if kind == CLASSIFIER:
        classes = tuple(str(name) for _, name in sorted(model_config.id2label.items()))
    return ImageMember(role, config, model_config, None, kind=kind, processor=processor, classes=classes, head=head)


def _kind(model: str, model_config: Any) -> str:
    names = model_config.architectures or []
    if any("ForImageClassification" in name for name in names):
        return CLASSIFIER
    if model_config.model_type in DUAL_ENCODERS:
        return ZERO_SHOT
    raise MemberError(
        f"{model} is a {', '.join(names) or model_config.model_type}; expected an image classifier, a dual encoder "
        "such as CLIP, or a vision tower with --head"
    )
