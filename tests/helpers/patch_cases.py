"""What the tests of patches share: tiny LoRAs made by PEFT, and models read back as tensors."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from helpers.tiny import make_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

FAMILIES = ("llama", "mistral", "gemma2", "qwen2", "gpt_neox")


def save_model(folder: Path, family: str = "llama", seed: int = 1, **settings: Any) -> Path:
    """Save a tiny model; `shards`: in files of 10 kB; `dtype`: of its weights."""
    dtype, shards = settings.pop("dtype", torch.float32), settings.pop("shards", False)
    model = make_model(family, seed, **settings).to(dtype)
    model.save_pretrained(folder, max_shard_size="10KB" if shards else "5GB")
    return folder


def save_lora(
    folder: Path, family: str = "llama", seed: int = 1, *, size: dict[str, Any] | None = None, **config: Any
) -> Path:
    """Save a LoRA on all linear layers of a tiny model with random factors, made by PEFT."""
    return save_lora_of(make_model(family, seed, **(size or {})), folder, seed, **config)


def save_lora_of(model: PreTrainedModel, folder: Path, seed: int = 1, **config: Any) -> Path:
    """Save a LoRA of `model` with random factors; `save`: options of PEFT's save_pretrained."""
    save = config.pop("save", {})
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    adapted = get_peft_model(model, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder, **save)
    return folder


_TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.3,
}
_EYE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_TEXT = {**_TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
_QWEN_EYE = {"depth": 1, "hidden_size": 16, "num_heads": 2, "patch_size": 14}
MULTIMODAL: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": _TEXT, "vision_config": _EYE, "mm_tokens_per_image": 4},
    "llava": {
        "text_config": {"model_type": "llama", **_TEXT},
        "vision_config": {"model_type": "clip_vision_model", **_EYE},
    },
    "mistral3": {"text_config": {"model_type": "mistral", **_TEXT}, "vision_config": {"model_type": "pixtral", **_EYE}},
    "qwen2_vl": {"text_config": _QWEN_TEXT, "vision_config": {**_QWEN_EYE, "embed_dim": 16, "mlp_ratio": 2}},
    "qwen2_5_vl": {
        "text_config": _QWEN_TEXT,
        "vision_config": {**_QWEN_EYE, "out_hidden_size": 16, "intermediate_size": 24},
    },
    "paligemma": {
        "text_config": {"model_type": "gemma", **_TEXT},
        "vision_config": {"model_type": "siglip_vision_model", **_EYE, "projection_dim": 16},
        "projection_dim": 16,
    },
    "internvl": {
        "text_config": {"model_type": "qwen2", **_TEXT},
        "vision_config": {**_EYE, "image_size": [28, 28], "patch_size": [14, 14]},
    },
}


def make_multimodal(kind: str, seed: int) -> PreTrainedModel:
    """Return a tiny random model of images and text."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **MULTIMODAL[kind])
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config).eval()
    return model


def peft_merged(model: Path, lora: Path, auto: Any = AutoModelForCausalLM) -> dict[str, Tensor]:
    """What PEFT writes after its own merge into the model that `auto` loads, under the names of the files."""
    base = auto.from_pretrained(model, dtype="auto")
    merged = PeftModel.from_pretrained(base, lora).merge_and_unload()
    with tempfile.TemporaryDirectory() as folder:
        merged.save_pretrained(folder)
        return weights(Path(folder))


def own_merge(model: Path, lora: Path) -> dict[str, Tensor]:
    """W + 1.5 · B A of every LoRA, where PEFT would also put the old base's embedding or head into the new one."""
    result, factors = weights(model), {}
    for key, factor in weights(lora).items():
        module, is_factor, kind = key.removeprefix("base_model.model.").replace(".default", "").partition(".lora_")
        if is_factor:
            factors.setdefault(f"{module}.weight", {})[kind.removesuffix(".weight")] = factor
    for name, pair in factors.items():
        on_disk = name if name in result else "embed_out.weight"
        result[on_disk] += 1.5 * (
            pair["B"] @ pair["A"] if "A" in pair else (pair["embedding_B"] @ pair["embedding_A"]).T
        )
    return result


def weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model or patch folder."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return found


def exact(model: Path, lora: Path, scale: float = 1.0) -> dict[str, Tensor]:
    """W + scale · α/r · B A of every tensor, in float64 (for a LoRA with no patterns)."""
    config = json.loads((lora / "adapter_config.json").read_text())
    strength = scale * config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    factors = weights(lora)
    result = {}
    for name, weight in weights(model).items():
        key = "base_model.model." + name.removesuffix(".weight")
        result[name] = weight.double()
        if f"{key}.lora_A.weight" in factors:
            product = factors[f"{key}.lora_B.weight"].double() @ factors[f"{key}.lora_A.weight"].double()
            result[name] += strength * product
    return result


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(path: Path, change: Any) -> None:
    """Rewrite a safetensors file with the mapping of tensors that `change` returns or has edited."""
    tensors = load_file(path)
    save_file(change(tensors) or tensors, path)
