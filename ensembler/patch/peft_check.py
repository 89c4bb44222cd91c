"""Put a LoRA on a model without memory, and check that PEFT reads it as it was written: all of its tensors are used."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from ensembler.files import one_line, read_json
from ensembler.patch.formats import ADAPTER_WEIGHTS
from ensembler.patch.model_layout import MAPPINGS
from ensembler.safetensors_files import stored_tensors


def adapt_on_meta(model: PreTrainedModel, settings: Any) -> Any:
    """Return the PeftModel of a PeftConfig on a model on the meta device; raises what PEFT raises."""
    from peft import get_peft_model

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, settings, low_cpu_mem_usage=True)


def why_not_read_by_peft(patch: Path, base: Path) -> str | None:
    """Return why PEFT does not load the LoRA in `patch` whole onto its base, or None where it does.

    The base is built without memory, as transformers loads it for texts, or for images and texts. Code of its own is
    not run.
    """
    from peft import PeftConfig, set_peft_model_state_dict

    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    except Exception as error:  # unknown types and damaged settings: each raises what it likes
        has_code = "auto_map" in read_json(base / "config.json")
        return "its base has code of its own, which is not run to try it" if has_code else one_line(error)
    reason = "transformers does not know the model"
    for mapping in MAPPINGS:
        if type(config) not in mapping:
            continue
        try:
            with torch.device("meta"):
                model = mapping[type(config)](config)
            adapted = adapt_on_meta(model, PeftConfig.from_pretrained(patch))
            state = {
                name: torch.empty(stored.shape, device="meta")
                for name, stored in stored_tensors(patch / ADAPTER_WEIGHTS).items()
            }
            found = set_peft_model_state_dict(adapted, state, low_cpu_mem_usage=True)
        except Exception as error:  # transformers and PEFT refuse in their own ways
            reason = one_line(error)
            continue
        left = [*found.unexpected_keys, *(key for key in found.missing_keys if "lora_" in key)]
        if not left:
            return None
        reason = f"it finds no place for {left[0]}"
    return reason
