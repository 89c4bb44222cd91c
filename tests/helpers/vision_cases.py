"""Image classifiers small enough for a unit test: real families with random weights, each with its own input size."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers.tiny import make_tokenizer
from PIL import Image
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoTokenizer,
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessorPil,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    SegformerConfig,
    SegformerModel,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

TRIO = ("source_ft", "source_pt", "target_pt")
CLASSES = ("cat", "dog", "owl", "bee", "fox", "hen", "pig")
_SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "initializer_range": 0.5,
}
_DUAL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def labels(classes: Sequence[str] = CLASSES) -> dict[str, Any]:
    return {
        "id2label": dict(enumerate(classes)),
        "label2id": {name: index for index, name in enumerate(classes)},
        "num_labels": len(classes),
    }


def save_vit(folder: Path, seed: int = 0, classes: Sequence[str] = CLASSES, **settings: Any) -> Path:
    """16 × 16 pixels."""
    torch.manual_seed(seed)
    config = ViTConfig(image_size=16, patch_size=8, **{**_SMALL, **settings}, **labels(classes))
    return _save(folder, ViTForImageClassification(config), ViTImageProcessorPil(size={"height": 16, "width": 16}))


def save_convnext(folder: Path, seed: int = 0, classes: Sequence[str] = CLASSES) -> Path:
    """32 × 32 pixels."""
    torch.manual_seed(seed)
    config = ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, initializer_range=0.5, **labels(classes))
    return _save(folder, ConvNextForImageClassification(config), ConvNextImageProcessorPil(size={"shortest_edge": 32}))


def _crop(size: int) -> dict[str, Any]:
    return {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}


def save_dinov2(folder: Path, seed: int = 0, classes: Sequence[str] = CLASSES, *, head: bool = True) -> Path:
    """28 × 28 pixels; without `head` the bare model."""
    torch.manual_seed(seed)
    config = Dinov2Config(image_size=28, patch_size=14, **{**_SMALL, "mlp_ratio": 2}, **labels(classes))
    model = Dinov2ForImageClassification(config) if head else Dinov2Model(config)
    return _save(folder, model, BitImageProcessorPil(**_crop(28)))


def save_segformer(folder: Path, seed: int = 0) -> Path:
    """A model whose features are not pooled."""
    torch.manual_seed(seed)
    lists = {"depths": 1, "sr_ratios": 1, "hidden_sizes": 16, "patch_sizes": 7, "strides": 4, "mlp_ratios": 2}
    one = {name: [value] for name, value in {**lists, "num_attention_heads": 2}.items()}
    config = SegformerConfig(num_encoder_blocks=1, **one)
    return _save(folder, SegformerModel(config), ViTImageProcessorPil(size={"height": 16, "width": 16}))


def save_clip(folder: Path, seed: int = 0) -> Path:
    """24 × 24 pixels, and a text tower with the tokenizer of characters."""
    torch.manual_seed(seed)
    text = {**_DUAL, "vocab_size": 64, "max_position_embeddings": 32, "eos_token_id": 2, "bos_token_id": 1}
    vision = {**_DUAL, "image_size": 24, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12, initializer_factor=10.0)
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "right"
    ends = [("<s>", 1), ("</s>", 2)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A </s>", special_tokens=ends)
    tokenizer.save_pretrained(folder)
    return _save(folder, CLIPModel(config), CLIPImageProcessorPil(**_crop(24)))


def save_siglip(folder: Path, seed: int = 0) -> Path:
    """16 × 16 pixels; trained on padded texts without a mask, with a bias of the logits."""
    torch.manual_seed(seed)
    text = {**_DUAL, "vocab_size": 64, "max_position_embeddings": 32, "projection_size": 16}
    vision = {**_DUAL, "image_size": 16, "patch_size": 8}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    torch.nn.init.constant_(model.logit_scale, 2.0)
    torch.nn.init.constant_(model.logit_bias, -3.0)
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "right"
    tokenizer.model_input_names = ["input_ids"]
    tokenizer.save_pretrained(folder)
    return _save(folder, model, SiglipImageProcessorPil(size={"height": 16, "width": 16}))


def save_head(path: Path, num_features: int, seed: int = 0, *, bias: bool = True, **metadata: str | None) -> Path:
    """A linear head; `metadata` as in its file, with the classes unless they are None."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {"weight": torch.randn(len(CLASSES), num_features, generator=generator)}
    if bias:
        tensors["bias"] = torch.randn(len(CLASSES), generator=generator)
    said = {"classes": json.dumps(CLASSES), **metadata}
    save_file(tensors, path, metadata={key: value for key, value in said.items() if value is not None})
    return path


def _save(folder: Path, model: Any, processor: Any) -> Path:
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def with_other_classifier(folder: Path, out: Path, seed: int) -> Path:
    """The same classifier with a `classifier` of its own, as fine-tuning of the head alone leaves it."""
    model = AutoModelForImageClassification.from_pretrained(folder)
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.classifier.weight)
    torch.nn.init.normal_(model.classifier.bias)
    model.save_pretrained(out)
    shutil.copy(folder / "preprocessor_config.json", out)
    return out


def random_images(num: int, seed: int = 0) -> list[Image.Image]:
    """Images of several sizes and shapes."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(17, 60, size=(num, 2))
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8), "RGB") for size in sizes]


def save_images(folder: Path, per_class: int, seed: int = 0, classes: Sequence[str] = CLASSES) -> Path:
    """class/number.png"""
    images = iter(random_images(per_class * len(classes), seed))
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            next(images).save(folder / name / f"{number:03}.png")
    return folder


@torch.no_grad()
def weighted_sum(logits: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The reference: Σ weight · logits in float64."""
    return sum((weights[role] * logits[role].double() for role in weights), torch.zeros(1, dtype=torch.float64))


@torch.no_grad()
def alone(folder: Path, images: list[Any]) -> torch.Tensor:
    """A classifier by transformers alone, with its own processor."""
    inputs = AutoImageProcessor.from_pretrained(folder, backend="pil")(images=images, return_tensors="pt")
    return AutoModelForImageClassification.from_pretrained(folder).eval()(**inputs).logits


@torch.no_grad()
def zero_shot_alone(folder: Path, images: list[Any], prompts: list[str]) -> torch.Tensor:
    """CLIP by transformers alone, with one prompt for each class."""
    inputs = AutoImageProcessor.from_pretrained(folder, backend="pil")(images=images, return_tensors="pt")
    texts = AutoTokenizer.from_pretrained(folder)(prompts, padding=True, return_tensors="pt")
    model = CLIPModel.from_pretrained(folder).eval()
    return model(input_ids=texts.input_ids, attention_mask=texts.attention_mask, **inputs).logits_per_image


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the content of a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
