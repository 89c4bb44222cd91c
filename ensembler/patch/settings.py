"""A LoRA's adapter_config.json, obeyed key by key: what is not understood is refused and never ignored. No torch."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from ensembler.errors import PatchError

ADAPTER_CONFIG = "adapter_config.json"

# Keys of an adapter's configuration that leave its arithmetic alone, or that are obeyed here.
_KNOWN_KEYS = {
    *("alpha_pattern", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out", "init_lora_weights"),
    *("layers_pattern", "layers_to_transform", "lora_alpha", "modules_to_save", "peft_type", "r", "rank_pattern"),
    *("target_modules", "use_rslora", "auto_mapping", "inference_mode", "lora_dropout", "megatron_core"),
    *("ensure_weight_tying", "eva_config", "peft_version", "qalora_group_size", "revision", "runtime_config"),
    *("task_type",),
}
# Ways to start a LoRA that leave the base's weights as they are; the others (pissa, olora ...) change them.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


class AdapterSettings:
    """An adapter's configuration, checked: every key that would change the arithmetic is known."""

    def __init__(self, folder: Path, values: dict[str, Any]) -> None:
        self.folder, self.values = folder, values
        kind = values.get("peft_type")
        if kind != "LORA":
            raise PatchError(f"{folder} is of kind {kind!r}; only LORA is a sum with the weights, give a LoRA")
        if values.get("use_dora"):
            raise PatchError(
                f"{folder} is a DoRA (use_dora); its update depends on the base's norms, give a plain LoRA"
            )
        start = values.get("init_lora_weights", True)
        if start not in _PLAIN_STARTS:
            raise PatchError(
                f"{folder} was started with init_lora_weights={start!r}, which changes the base's weights; convert it "
                "to a plain LoRA with PEFT first"
            )
        for key, value in values.items():
            if key not in _KNOWN_KEYS and value not in (None, False, "", [], {}):
                raise PatchError(f"{folder} uses {key}={value!r}, which is not understood here; give a plain LoRA")

    @property
    def targets(self) -> tuple[str, ...] | str | None:
        value = self.values.get("target_modules")
        restricted = any(self.values.get(key) is not None for key in ("layers_to_transform", "exclude_modules"))
        if value is None or value == "all-linear" or restricted:
            return None
        return value if isinstance(value, str) else tuple(value)

    @property
    def transposed(self) -> bool:
        return bool(self.values.get("fan_in_fan_out"))

    def scale(self, module: str, rank: int) -> float:
        """α / r, or α / √r for rslora, with the patterns that PEFT matches against the end of a module's name."""
        said = self._number(module, "rank_pattern", "r")
        if said != rank:
            raise PatchError(f"{self.folder}: {module} has rank {rank}; {ADAPTER_CONFIG} says {said:g}; mend it")
        alpha = self._number(module, "alpha_pattern", "lora_alpha")
        return alpha / (math.sqrt(rank) if self.values.get("use_rslora") else rank)

    def _number(self, module: str, pattern: str, default: str) -> float:
        try:
            for key, value in (self.values.get(pattern) or {}).items():
                if re.match(rf"(.*\.)?({key})$", module):
                    return float(value)
            return float(self.values[default])
        except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
            raise PatchError(f"{self.folder}/{ADAPTER_CONFIG}: {default} or {pattern} is damaged; mend it") from error
