"""What is run on images: a classifier, or a tower with heads; members that share their tower run it once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ensembler.engine.devices import out_of_memory
from ensembler.errors import MemberError, RunError
from ensembler.sources import one_line

CLASSIFIER_MODULE = "classifier"  # the last module of the image classifiers of transformers


class SharedTower(nn.Module):
    """One model, and a head for each of the members that it serves.

    `heads`: by role; `processor`: how images are prepared for all of them. A head is what `classifier` is in a
    classifier, or a `Head` over the features of another model.
    """

    def __init__(self, model: PreTrainedModel, heads: Mapping[str, nn.Module], processor: Any) -> None:
        super().__init__()
        self.model = model
        self.heads = nn.ModuleDict(dict(heads))
        self.processor = processor

    @property
    def roles(self) -> tuple[str, ...]:
        """The members that it serves."""
        return tuple(self.heads)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        device: torch.device = self.model.device
        return device

    def prepare(self, image: Any) -> Tensor:
        """Return an image of Pillow as pixel values (1, channels, height, width) float32, on the CPU."""
        values: Tensor = self.processor(images=[image], return_tensors="pt")["pixel_values"]
        return values

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Return the logits (rows, C) of its members by role. Raises RunError naming them where the model fails."""
        try:
            features = self.features(pixel_values.to(self.device, self.model.dtype))
            return {role: head(features) for role, head in self.heads.items()}
        except Exception as error:  # a model may raise anything; the user has to learn which of them it was
            roles = " and ".join(self.roles)
            if out_of_memory(error):
                raise RunError(
                    f"{roles} ran out of memory on {self.device} for {len(pixel_values)} images; use a smaller batch"
                ) from error
            raise RunError(f"{roles} failed: {type(error).__name__}: {one_line(error)}") from error

    def features(self, pixel_values: Tensor) -> Tensor:
        """Return what its heads read: the pooled features (rows, F), projected where the model does that."""
        raise NotImplementedError


class FeatureTower(SharedTower):
    """A model that is no classifier: the vision side of a dual encoder, or a vision model."""

    def features(self, pixel_values: Tensor) -> Tensor:
        """Return the pooled features (rows, F), projected where the model does that.

        Raises MemberError for a model that does not pool.
        """
        model: Any = self.model
        run = model.get_image_features if hasattr(model, "get_image_features") else model
        output = run(pixel_values=pixel_values)
        if isinstance(output, Tensor):
            return output
        pooled: Tensor | None = getattr(output, "image_embeds", None)
        pooled = getattr(output, "pooler_output", None) if pooled is None else pooled
        if pooled is None:
            raise MemberError(
                f"a {type(model).__name__} has no pooled features for a head; give a model that has, or one with a "
                "classifier of its own"
            )
        return pooled.flatten(1)  # convolutional models keep two axes of length 1


class ClassifierTower(SharedTower):
    """Image classifiers that differ in nothing but the module `classifier`; each head is that of a member."""

    def features(self, pixel_values: Tensor) -> Tensor:
        """Return the input of the model's own `classifier`."""
        _, calls = _run_classifier(self.model, pixel_values)
        features: Tensor = calls[0][0][0]
        return features


class WholeClassifier(SharedTower):
    """One image classifier, run as it is, with a head that changes nothing."""

    def features(self, pixel_values: Tensor) -> Tensor:
        """Return its logits, which need no head."""
        logits: Tensor = self.model(pixel_values=pixel_values).logits
        return logits

    @torch.inference_mode()
    def parted(self, pixel_values: Tensor) -> ClassifierTower | None:
        """Return the same with its module `classifier` as a head; None where the logits are not what that returns."""
        logits, calls = _run_classifier(self.model, pixel_values)
        if len(calls) != 1 or len(calls[0][0]) != 1 or calls[0][1] is not logits:
            return None
        heads = dict.fromkeys(self.roles, self.model.get_submodule(CLASSIFIER_MODULE))
        return ClassifierTower(self.model, heads, self.processor)


def _run_classifier(model: PreTrainedModel, pixel_values: Tensor) -> tuple[Tensor, list[tuple[Any, Any]]]:
    """The logits of a classifier, and what its module `classifier` was given and returned, call by call."""
    calls: list[tuple[Any, Any]] = []
    module = model.get_submodule(CLASSIFIER_MODULE)
    handle = module.register_forward_hook(lambda _, inputs, output: calls.append((inputs, output)))
    try:
        return model(pixel_values=pixel_values).logits, calls
    finally:
        handle.remove()
