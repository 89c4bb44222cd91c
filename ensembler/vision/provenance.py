"""What an ensemble of image classifiers computes, as JSON, so that rows of two ensembles are told apart."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ensembler.evaluation.provenance import describe_ensemble
from ensembler.vision.members import ZERO_SHOT, ImageMember
from ensembler.vision.preflight import CheckedImages
from ensembler.vision.zero_shot import DEFAULT_TEMPLATES, tokenizer_hash

_HASH = 16  # hexadecimal digits


def describe_images(checked: CheckedImages) -> dict[str, Any]:
    """Return the rule's numbers, the classes, and each member with the hashes of its weights, head and processor.

    Heads that are made from texts go by their prompts and their tokenizer as well.
    """
    described = describe_ensemble(checked)
    for role, member in checked.members.items():
        described["members"][role] |= _describe(member, checked)
    return {**described, "classes": _hash(json.dumps(checked.classes).encode())}


def _describe(member: ImageMember, checked: CheckedImages) -> dict[str, Any]:
    config = checked.config
    found: dict[str, Any] = {
        "kind": member.kind,
        "processor": _hash(json.dumps(member.processor.to_dict(), sort_keys=True, default=str).encode()),
    }
    if member.config.head is not None:
        found |= {"head": Path(member.config.head).name, "head_sha256": _hash(Path(member.config.head).read_bytes())}
    if member.kind == ZERO_SHOT:
        prompts = [config.templates or list(DEFAULT_TEMPLATES), config.class_texts]
        found |= {
            "prompts": _hash(json.dumps(prompts, sort_keys=True).encode()),
            "tokenizer": tokenizer_hash(member)[:_HASH],
        }
    return found


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_HASH]
