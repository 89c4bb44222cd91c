"""The model card of a patched model: what was added to what, so that it can be checked and done again."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ensembler.patch.formats import Patch
from ensembler.patch.headers import fingerprint, stored_tensors
from ensembler.patch.layout import CARD
from ensembler.patch.places import model_name
from ensembler.patch.plan import Plan

_KEPT = ("license", "license_name", "license_link", "language")
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_TEXT = """
# {title}

Made by addition, without training: a model and {count} (PortLLM, [arXiv 2410.10870](https://arxiv.org/abs/2410.10870),
eq. 6), with `ensembler patch apply`.

| | what | made for | strength | hash |
|---|---|---|---|---|
| model | {model} | | | {before} |
{rows}
| result | {num_changed} of {num_tensors} tensors changed | | | {after} |

The hash of a patch is the SHA-256 of its weights file. That of a model is a fingerprint: the SHA-256 over name, dtype,
shape and the first 4 KiB of every tensor in the order of names.
{notes}
"""


def write_card(plan: Plan, made: Path, title: str) -> None:
    """Write the card of the patched model in `made`, with the licence and languages that the model's own card says."""
    written = [tensor for file in made.glob("*.safetensors") for tensor in stored_tensors(file).values()]
    data = ModelCardData(
        base_model=model_name(plan.model), tags=["ensembler", "model-patch"], **_kept(plan.model / CARD)
    )
    text = _TEXT.format(
        title=title,
        count="a patch" if len(plan.parts) == 1 else f"{len(plan.parts)} patches",
        model=model_name(plan.model),
        before=f"fingerprint {fingerprint(plan.tensors.values())}",
        rows="\n".join(_row(patch, scale) for patch, scale in plan.parts),
        num_changed=len(plan.names),
        num_tensors=len(plan.tensors),
        after=f"fingerprint {fingerprint(written)}",
        notes="".join(f"\n- {note}" for note in plan.notes),
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n{text.rstrip()}\n").save(made / CARD)


def _row(patch: Patch, scale: float) -> str:
    hashes = ", ".join(f"{path.name} {_sha256(path)}" for path in patch.files)
    base = (patch.base if _HUB_ID.fullmatch(patch.base) else Path(patch.base).name) if patch.base else "not said"
    return f"| patch | {model_name(patch.folder)} | {base} | {scale:g} | {hashes} |"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _kept(card: Path) -> dict[str, object]:
    if not card.is_file():
        return {}
    try:
        old = ModelCard.load(card).data
    except Exception:  # a card is prose: one that cannot be read is no reason to refuse the weights
        return {}
    return {key: value for key in _KEPT if (value := old.get(key)) is not None}
