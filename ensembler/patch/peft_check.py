"""Check that PEFT reads a LoRA as it was written: that each of its tensors finds its place in the model."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from ensembler.files import one_line
from ensembler.patch.formats import ADAPTER_WEIGHTS


def why_not_read_by_peft(patch: Path, base: Path) -> str | None:
    """Return why PEFT does not load the LoRA in `patch` whole onto its base, or None where it does.

    The base is built without memory, as transformers loads it for texts, or for images and texts.
    """
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

    reason = "transformers does not know the model"
    state = load_file(patch / ADAPTER_WEIGHTS)
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        try:
            config = AutoConfig.from_pretrained(base)
            if type(config) not in mapping:
                continue
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = mapping[type(config)](config)
                adapted = get_peft_model(model, PeftConfig.from_pretrained(patch), low_cpu_mem_usage=True)
            found = set_peft_model_state_dict(adapted, state, low_cpu_mem_usage=True)
        except Exception as error:  # transformers and PEFT refuse in their own ways
            reason = one_line(error)
            continue
        left = [*found.unexpected_keys, *(key for key in found.missing_keys if "lora_" in key)]
        if not left:
            return None
        reason = f"it finds no place for {left[0]}"
    return reason
