"""Is this ensemble of image classifiers possible? Answered from configs and file headers, before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass

from ensembler.config import IMAGES, EnsembleConfig, check_roles
from ensembler.errors import ClassesError, ConfigError
from ensembler.preflight import CheckedEnsemble
from ensembler.vision.classes import agree
from ensembler.vision.members import ImageMember, check_image_member
from ensembler.vocab import VocabularyContract


@dataclass(frozen=True)
class CheckedImages(CheckedEnsemble):
    """A configuration whose members, classes and files were found to fit; no weight is loaded.

    `members`: by role, the anchor first. `classes`: the labels in the order of the logits.
    """

    members: dict[str, ImageMember]
    classes: tuple[str, ...]

    @property
    def assumptions(self) -> list[str]:
        """What is taken for granted of the members' heads, a line each."""
        return [line for member in self.members.values() for line in member.assumptions]


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
    members = {role: check_image_member(role, config.members[role]) for role in rule.roles}
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
    return CheckedImages(
        config=config,
        files=dict(members),
        loaded={},
        model_configs={role: member.model_config for role, member in members.items()},
        contract=VocabularyContract("identical", len(classes), widths, widths, dict.fromkeys(rule.roles, 0)),
        tokenizer=None,
        generation_config=None,
        members=members,
        classes=classes,
    )
