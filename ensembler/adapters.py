"""A LoRA adapter as part of a member: find its base, check that it fits, merge it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
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
    if config.adapter is not None:
        raise MemberError(f"{role}: {folder} is an adapter itself; give its base as the model, or merge the two first")
    base = _read_json(role, folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not base:
        raise MemberError(f"{role}: {folder / ADAPTER_CONFIG} names no base model; set base_model_name_or_path in it")
    if (folder / base).is_dir():
        base = str((folder / base).resolve())
    return replace(config, model=base, adapter=config.model)


def check_adapter(role: str, adapter: str, model: str, model_config: Any) -> None:
    """Compare names and shapes in the adapter's header with what PEFT would make on this base, built without memory.

    Raises MemberError; a base of another name is only said, since patches are meant to be carried to new bases.
    """
    settings = _read_json(role, _find(role, adapter, ADAPTER_CONFIG))
    base = settings.get("base_model_name_or_path")
    if base and Path(base).name != Path(model).name:
        _logger.warning("%s: the adapter %s was made for %s, not %s", role, adapter, base, model)
    if settings.get("peft_type") != "LORA":
        kind = settings.get("peft_type")
        raise MemberError(f"{role}: the adapter {adapter} is of kind {kind!r}; only LORA can be merged into weights")
    weights = _find(role, adapter, ADAPTER_WEIGHTS)
    with naming(role):
        header = safetensors_header(weights)
    found = {name: tuple(tensor["shape"]) for name, tensor in header.items() if "lora_" in name}
    expected = _expected_tensors(role, adapter, model, model_config)
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unknown:
        what = f"lacks {missing[0]}" if missing else f"changes {unknown[0]}, which is not there"
        raise MemberError(f"{role}: the adapter {adapter} was made for another base: for {model} it {what}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise MemberError(
                f"{role}: {name} in the adapter {adapter} has shape {found[name]}; for {model} it must be {shape}: it "
                "was made for another base"
            )


def _expected_tensors(role: str, adapter: str, model: str, model_config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the LoRA tensors that PEFT would save for this adapter on this base."""
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    try:
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(model_config)
            patched = get_peft_model(base, PeftConfig.from_pretrained(adapter), low_cpu_mem_usage=True)
    except Exception as error:  # PEFT refuses settings in its own ways: unknown modules, kinds, keys
        raise MemberError(f"{role}: the adapter {adapter} does not fit {model}: {one_line(error)}") from error
    state = get_peft_model_state_dict(patched, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in state.items() if "lora_" in name}


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
