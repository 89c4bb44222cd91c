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
from transformers import AutoModelForCausalLM

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
    """Save a LoRA on all linear layers with random factors, made by PEFT."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(make_model(family, seed, **(size or {})), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def peft_merged(model: Path, lora: Path) -> dict[str, Tensor]:
    """What PEFT writes after its own merge, under the names of the files."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    merged = PeftModel.from_pretrained(base, lora).merge_and_unload()
    with tempfile.TemporaryDirectory() as folder:
        merged.save_pretrained(folder)
        return weights(Path(folder))


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
