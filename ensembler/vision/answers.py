"""Answers of image classifiers: the classes of single images, and documents at all points of a grid from one pass."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import BaseModel, model_validator
from torch import Tensor

from ensembler.config import EnsembleConfig
from ensembler.engine.grid import Grid, GridPoint
from ensembler.errors import ConfigError, ImageError
from ensembler.evaluation.documents import Answer, Document, EncodedDocument
from ensembler.evaluation.provenance import describe_ensemble, versions
from ensembler.evaluation.recipe import Experiment, FoundPath, SpeedOrFalse
from ensembler.extras import require
from ensembler.files import digest, file_digest
from ensembler.preflight import CheckedEnsemble
from ensembler.vision.heads import as_images
from ensembler.vision.image_modeling import EnsembleForImageClassification
from ensembler.vision.image_preflight import ZERO_SHOT, CheckedImages, check_images
from ensembler.vision.image_tasks import TOP, ImageTask, load_image_task
from ensembler.vision.images import ImageSource, ahead
from ensembler.vision.zero_shot import DEFAULT_TEMPLATES, tokenizer_hash


def classify(
    model: EnsembleForImageClassification,
    sources: Sequence[ImageSource],
    *,
    top_k: int = 5,
    batch_size: int = 16,
    strict: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yield a row of JSON for each image, in their order; the next images are read while the model runs.

    `image`: its name; `classes`: the most probable ones, each with `label` and `probability`; `anchor`: the anchor's
    first. An image that cannot be read has an `error` in place of these; `strict` raises ImageError for the first one.
    """

    def prepare(batch: Sequence[ImageSource]) -> tuple[Sequence[ImageSource], dict[str, str], dict[str, Tensor]]:
        errors: dict[str, str] = {}
        return batch, errors, model.prepare(_readable(batch, errors, strict=strict))

    batches = [sources[start : start + batch_size] for start in range(0, len(sources), batch_size)]
    for batch, errors, prepared in ahead(batches, prepare):
        seen = iter(_classify(model, prepared, top_k) if prepared else ())
        for source in batch:
            row = {"error": errors[source.name]} if source.name in errors else next(seen)
            yield {"image": source.name, **row}


def _readable(batch: Sequence[ImageSource], errors: dict[str, str], *, strict: bool) -> Iterator[Any]:
    """Yield the images of a batch, each decoded when its turn comes; write the faults of others into `errors`."""
    for source in batch:
        try:
            yield source.open()
        except ImageError as error:
            if strict:
                raise ImageError(f"{error}; mend it, or add --skip-bad") from error
            errors[source.name] = str(error)


@torch.inference_mode()
def _classify(model: EnsembleForImageClassification, prepared: dict[str, Tensor], top_k: int) -> list[dict[str, Any]]:
    """Return the most probable classes of each image, and the anchor's first."""
    logits = model.member_logits(prepared)
    found = _top(model, model.combine(logits), top_k)
    anchors = _top(model, logits[model.rule.anchor].float(), 1)
    return [{"classes": classes, "anchor": first} for classes, (first,) in zip(found, anchors, strict=True)]


def _top(model: EnsembleForImageClassification, logits: Tensor, top_k: int) -> list[list[dict[str, Any]]]:
    values, classes = logits.softmax(-1).topk(min(top_k, logits.shape[-1]))
    return [
        [{"label": model.classes[index], "probability": value} for index, value in zip(*row, strict=True)]
        for row in zip(classes.tolist(), values.tolist(), strict=True)
    ]


_THUMBNAIL = 96  # pixels
_HASH = 16  # hexadecimal digits


class ImageAnswerer:
    """The members of a checked ensemble, which answer the documents of an `ImageTask`."""

    _model: EnsembleForImageClassification  # within `open`

    def __init__(self, checked: CheckedImages) -> None:
        self.checked = checked

    def describe(self, *, verify_weights: bool = False) -> dict[str, Any]:
        """Return the ensemble, the backend and versions, as JSON; see `describe_ensemble`."""
        ensemble = describe_images(self.checked, verify_weights=verify_weights)
        return {"versions": versions("pillow"), "ensemble": ensemble, "backend": {"name": "transformers"}}

    def encode(self, document: Document) -> EncodedDocument:
        """Return the hash of the image's file; of tokens there are none."""
        return EncodedDocument(0, document.requests[0].digest)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Load the members. Raises ConfigError, MemberError or RunError."""
        self._model = EnsembleForImageClassification.from_checked(self.checked)
        try:
            yield
        finally:
            del self._model

    def largest_batch(self, document: Document, points: Sequence[GridPoint]) -> int:
        """Return 8, the default: no largest one is searched for, and commands refuse `--batch-size auto` for images."""
        return 8

    def answer(
        self, batches: Iterable[Sequence[Document]], points: Sequence[GridPoint]
    ) -> Iterator[list[list[Answer]]]:
        """Yield the answers to one batch after another; the images of the next ones are prepared meanwhile."""
        model = self._model
        grid = Grid.of(points, model.rule, model.contract, model.config.outside).to(model.device)

        def prepare(batch: Sequence[Document]) -> tuple[Sequence[Document], dict[str, Tensor]]:
            return batch, model.prepare(document.requests[0].open() for document in batch)

        for batch, prepared in ahead(batches, prepare):
            yield answer_prepared(model, grid, batch, prepared)

    def thumbnail(self, document: Document) -> str:
        """Return a small picture of the image as a data URI. Raises ImageError."""
        image = document.requests[0].open()
        method = 0 if max(image.size) < _THUMBNAIL else 3  # nearest, so that pixels are seen; or bicubic
        image = require("PIL.ImageOps", "vision").contain(image, (_THUMBNAIL, _THUMBNAIL), method)
        buffer = io.BytesIO()
        image.save(buffer, "png")
        return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


_OF_TEXTS = (
    "num_fewshot",
    "apply_chat_template",
    "fewshot_as_multiturn",
    "system_instruction",
    "gen_kwargs",
    "chat_template_kwargs",
    "allow_renamed_special",
    "text_candidates",
    "text_tolerance",
    "chat_template",
    "transport_data",
    "transport_texts",
)


class ImageSettings(BaseModel, frozen=True, extra="forbid"):
    """Settings of image classifiers in a recipe, as of `ensembler create`: paths of files, or None."""

    classes: FoundPath | None = None
    templates: FoundPath | None = None
    aliases: FoundPath | None = None


class ImageExperiment(Experiment, frozen=True, extra="forbid"):
    """One set of image classifiers; `tasks` are folders of images."""

    images: ImageSettings
    speed: SpeedOrFalse = None

    @model_validator(mode="after")
    def _check_is_of_images(self) -> Self:
        if self.speed is not None:
            raise ConfigError("speed is measured of texts alone; leave it out, or write speed: false")
        of_texts = [key for key in _OF_TEXTS if key in self.model_fields_set and getattr(self, key)]
        if of_texts:
            raise ConfigError(f"{of_texts[0]} is a setting of texts; leave it out of an experiment on images")
        return self


KINDS = {"images": ImageExperiment}  # of experiments, by the key of a recipe that tells


class ImageModels:
    """Image classifiers on folders of images, each read once, for a benchmark; `loaded`: all tasks read so far.

    With `strict`, an image that cannot be read is refused, else it is left out.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self._strict = strict
        self.loaded: dict[str, ImageTask] = {}

    def answerer(self, experiment: ImageExperiment, config: EnsembleConfig) -> tuple[CheckedImages, ImageAnswerer]:
        """Return the checked members of a run, and their answerer. Raises as `check_images`."""
        checked = check_images(as_images(config, **dict(experiment.images)))
        return checked, ImageAnswerer(checked)

    def are_alike(self, checked: CheckedEnsemble) -> bool:
        """Return True: a classifier in an ensemble is what it is alone."""
        return True

    def tasks(self, experiment: ImageExperiment, answerer: ImageAnswerer) -> list[ImageTask]:
        """Return the tasks of an experiment, whose classes are those of the members.

        Raises as `load_image_task`, and ConfigError for two folders of one name.
        """
        checked = answerer.checked
        settings: dict[str, Any] = {"validation": experiment.validation, "limit": experiment.limit}
        settings |= {"aliases": checked.config.aliases, "seed": experiment.seed}
        found: dict[str, tuple[str, ImageTask]] = {}
        for folder in experiment.tasks:
            key = repr((folder, checked.classes, settings))
            if key not in self.loaded:
                self.loaded[key] = load_image_task(Path(folder), checked.classes, strict=self._strict, **settings)
            task = self.loaded[key]
            if task.name in found:
                raise ConfigError(
                    f"{found[task.name][0]} and {folder} are both called {task.name!r}, and their images would be "
                    "taken for each other's; rename one of them, or give a link of another name"
                )
            found[task.name] = folder, task
        return [task for _, task in found.values()]


@torch.inference_mode()
def answer_prepared(
    model: EnsembleForImageClassification, grid: Grid, documents: Sequence[Document], prepared: Mapping[str, Tensor]
) -> list[list[Answer]]:
    """Return [the most probable classes, [log-prob of the right one, is it the first]] of each image at each point.

    `prepared`: pixel values (rows, channels, height, width) by role, as `model.prepare` returns them.
    """
    logits = {role: values.to(model.device) for role, values in model.member_logits(prepared).items()}
    combined = grid.combine(logits).cpu().transpose(0, 1)  # (rows, points, C)
    right = torch.tensor([model.classes.index(str(document.gold)) for document in documents]).unsqueeze(-1)
    log_probs = combined.log_softmax(-1).gather(-1, right.expand(-1, len(grid)).unsqueeze(-1)).squeeze(-1)
    # Stable: of equal logits the first class is the answer, as for argmax.
    top = combined.sort(dim=-1, descending=True, stable=True).indices[..., :TOP]
    return [
        [
            [[model.classes[index] for index in classes], [log_prob, is_first]]
            for classes, log_prob, is_first in zip(*row, strict=True)
        ]
        for row in zip(top.tolist(), log_probs.tolist(), (top[..., 0] == right).tolist(), strict=True)
    ]


def describe_images(checked: CheckedImages, *, verify_weights: bool = False) -> dict[str, Any]:
    """Return the rule's numbers, the classes, and each member with the hashes of its weights, head and processor.

    Heads that are made from texts go by their prompts and their tokenizer as well.
    """
    described = describe_ensemble(checked, verify_weights=verify_weights)
    prompts = [checked.config.templates or list(DEFAULT_TEMPLATES), checked.config.class_texts]
    for role, member in checked.files.items():
        found = described["members"][role]
        found |= {"kind": member.kind, "processor": digest(member.processor.to_dict(), _HASH)}
        if member.config.head is not None:
            path = Path(member.config.head)
            found |= {"head": path.name, "head_sha256": file_digest(path)[:_HASH]}
        if member.kind == ZERO_SHOT:
            found |= {"prompts": digest(prompts, _HASH), "tokenizer": tokenizer_hash(member)[:_HASH]}
    return {**described, "classes": digest(checked.classes, _HASH)}
