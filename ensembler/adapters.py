"""A LoRA adapter as part of a member: find its base, check that it fits, merge it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ensembler.config import MemberConfig
from ensembler.errors import MemberError
from ensembler.sources import find_file, one_line
from ensembler.weights import naming, safetensors_header

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_PICKLE = "adapter_model.bin"

_logger = logging.get_logger(__name__)


def resolve_adapter(role: str, config: MemberConfig) -> MemberConfig:
    """Where `model` is a PEFT folder, return its base as the model and the folder as the adapter."""
    folder = Path(config.model)
    if not (folder / ADAPTER_CONFIG).is_file() or (folder / "config.json").is_file():
        return config
    base = _read_json(role, folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not base:
        raise MemberError(f"{role}: {folder / ADAPTER_CONFIG} names no base model; give the base and the adapter apart")
    if (folder / base).is_dir():
        base = str((folder / base).resolve())
    return replace(config, model=base, adapter=config.model)


def check_adapter(role: str, adapter: str, model: str, model_config: Any) -> None:
    """Compare the shapes in the adapter's header with those of its base, built from `model_config` without memory.

    Raises MemberError; a base of another name is only said, since patches are meant to be carried to new bases.
    """
    settings = _read_json(role, _find(role, adapter, ADAPTER_CONFIG))
    base = settings.get("base_model_name_or_path")
    if base and Path(base).name != Path(model).name:
        _logger.warning("%s: the adapter %s was made for %s, not %s", role, adapter, base, model)
    with naming(role):
        header = safetensors_header(_find(role, adapter, ADAPTER_WEIGHTS))
    with torch.device("meta"):
        modules = dict(AutoModelForCausalLM.from_config(model_config).named_modules())
    for name, factor, shape in _lora_factors(header):
        weight = getattr(modules.get(name), "weight", None)
        if weight is None:
            raise MemberError(f"{role}: the adapter {adapter} changes {name}, which {model} does not have")
        out_features, in_features = weight.shape[::-1] if isinstance(modules[name], Conv1D) else weight.shape
        fits = shape[1] == in_features if factor == "lora_A" else shape[0] == out_features
        if not fits:
            raise MemberError(
                f"{role}: {factor} of {name} in the adapter {adapter} has shape {tuple(shape)}; "
                f"the weight in {model} has {tuple(weight.shape)}: it was made for another base"
            )


def _lora_factors(header: Mapping[str, Any]) -> Iterator[tuple[str, str, list[int]]]:
    """Yield (module, 'lora_A' or 'lora_B', shape) for the LoRA factors of linear layers in an adapter's header."""
    for key, tensor in header.items():
        for factor in ("lora_A", "lora_B"):
            module, found, _ = key.partition(f".{factor}.")
            if found:
                yield module.removeprefix("base_model.model."), factor, tensor["shape"]


def merge_adapter(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """Add the adapter's update to the weights: one forward then costs what the base costs."""
    from peft import PeftModel

    merged: PreTrainedModel = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    return merged


def _find(role: str, adapter: str, name: str) -> Path:
    path = find_file(role, adapter, name)
    if path is not None:
        return path
    if name == ADAPTER_WEIGHTS and find_file(role, adapter, ADAPTER_PICKLE) is not None:
        raise MemberError(f"{role}: {adapter}/{ADAPTER_PICKLE} is a pickle file; convert it to safetensors")
    raise MemberError(f"{role}: {adapter}/{name} is not there; expected a PEFT LoRA folder")


def _read_json(role: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MemberError(f"{role}: {path} cannot be read: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise MemberError(f"{role}: {path} holds no settings of an adapter; fetch it again")
    return content
