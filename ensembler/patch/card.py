"""The card of a patched model: what was added to which model, by hashes, and what quantising again lost of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ensembler.files import file_digest, model_name
from ensembler.patch.formats import Patch
from ensembler.patch.patch_plan import PatchPlan
from ensembler.safetensors_files import fingerprint, listed, stored_tensors

CARD = "README.md"
MADE_BY = "`ensembler patch apply`"
_KEPT_IN_CARD = ("license", "license_name", "license_link", "language")
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_CARD_TEXT = """
# {title}

Made by addition, without training: a model and {count} (PortLLM, [arXiv 2410.10870](https://arxiv.org/abs/2410.10870),
eq. 6), with {made_by}.

| | what | made for | strength | hash |
|---|---|---|---|---|
| model | {model} | | | {before} |
{rows}
| result | {num_changed} of {num_tensors} tensors changed | | | {after} |

The hash of a patch is the SHA-256 of its weights file. That of a model is a fingerprint: the SHA-256 over name, dtype,
shape and the first 4 KiB of every tensor in the order of names.
{notes}
"""


@dataclass(frozen=True)
class Applied:
    """The bytes of the weights that were written, and the losses of quantising again, by module.

    `losses`: ‖requantised - exact‖ / ‖Δ‖ of each quantised module that changed; `kept`: modules that are
    not quantised any more.
    """

    num_bytes: int
    losses: Mapping[str, float]
    kept: tuple[str, ...]


def write_card(plan: PatchPlan, made: Path, title: str, applied: Applied) -> None:
    """Write the card of the patched model in `made`, with the licence and languages that the model's own card says."""
    model = plan.model
    kept: dict[str, Any] = {}
    if (model.folder / CARD).is_file():
        try:
            old = ModelCard.load(model.folder / CARD).data
            kept = {key: value for key in _KEPT_IN_CARD if (value := old.get(key)) is not None}
        except Exception:  # a card is prose: one that cannot be read is no reason to refuse the weights
            kept = {}
    written = [tensor for file in made.glob("*.safetensors") for tensor in stored_tensors(file).values()]
    data = ModelCardData(base_model=model.name, tags=["ensembler", "model-patch"], **kept)
    text = _CARD_TEXT.format(
        title=title,
        count="a patch" if len(plan.patches) == 1 else f"{len(plan.patches)} patches",
        made_by=MADE_BY,
        model=model.name,
        before=f"fingerprint {model.fingerprint()}",
        rows="\n".join(_card_row(patch) for patch in plan.patches),
        num_changed=len(plan.names),
        num_tensors=plan.num_weights,
        after=f"fingerprint {fingerprint(written)}",
        notes="".join(f"\n- {note}" for note in [*plan.notes, *_loss_notes(plan, applied)]),
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n{text.rstrip()}\n").save(made / CARD)


def _loss_notes(plan: PatchPlan, applied: Applied) -> list[str]:
    notes = []
    if applied.losses:
        found = sorted(applied.losses.values())
        again = [weight for name, weight in plan.quantized.items() if name.removesuffix(".weight") in applied.losses]
        labels = " and ".join(dict.fromkeys(weight.scheme.label for weight in again))
        notes.append(
            f"{len(found):,} modules were quantised again ({labels}), which lost {found[0]:.2f} to {found[-1]:.2f} of "
            f"the patch (‖requantised - exact‖ / ‖Δ‖, median {median(found):.2f})"
        )
    if applied.kept:
        notes.append(f"not quantised any more: {listed(applied.kept)}")
    return notes


def _card_row(patch: Patch) -> str:
    hashes = ", ".join(f"{path.name} {file_digest(path)}" for path in patch.files)
    base = (patch.base if _HUB_ID.fullmatch(patch.base) else Path(patch.base).name) if patch.base else "not said"
    return f"| patch | {model_name(patch.folder)} | {base} | {patch.scale:g} | {hashes} |"
