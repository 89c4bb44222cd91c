"""The methods of quantisation that a model's configuration may name, and where each lists what it leaves alone.

Loads no torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from ensembler.safetensors_files import StoredModel

METHOD, QUANTIZATION, COMPRESSION = "quant_method", "quantization_config", "compression_config"
IGNORED = {
    "fp8": ("ignored_layers", "modules_to_not_convert"),
    "compressed-tensors": ("ignore",),
    "gptq": ("dynamic",),
    "awq": ("modules_to_not_convert",),
    "bitsandbytes": ("llm_int8_skip_modules",),
    "mxfp4": ("modules_to_not_convert",),
}
METHODS = tuple(IGNORED)
SCHEMES = "FP8 (e4m3), INT4 of compressed-tensors, GPTQ or AWQ (gemm), bitsandbytes' 4 bits, MXFP4"
# Layers that servers run as one, by the name of that: all of them are quantised, or none.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
EXPERTS = ".experts."
_SAID = ("bits", "w_bit", "version", "format", "load_in_8bit")
_SCALE = re.compile(r"(scales?|scale_inv|absmax|quant_map|zero_point|SCB)$")
_OF_LAYER = ("weight_", "input_", "act")  # scales of a linear layer, and not of its place among keys and values


def settings_in(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the quantisation in a config.json, empty where it has none.

    Some models of images and text have them in the configuration of their text model.
    """
    text = config.get("text_config")
    places = [config, text] if isinstance(text, dict) else [config]
    found = (place.get(key) for place in places for key in (QUANTIZATION, COMPRESSION))
    return next((each for each in found if each and isinstance(each, dict)), {})


def quantization_of(model: StoredModel) -> dict[str, Any]:
    """Return the settings of a model's quantisation, empty where it has none."""
    return settings_in(model.config)


def said_scheme(model: StoredModel) -> str:
    """Return how the model says that it is quantised: "quant_method 'gptq', bits 8 in its config.json"."""
    settings = quantization_of(model)
    words = [f"{METHOD} {settings.get(METHOD)!r}", *(f"{key} {settings[key]!r}" for key in _SAID if key in settings)]
    return f"{', '.join(words)} in its config.json" if settings else "its config.json says of none"


def is_scale(name: str) -> bool:
    """Return whether a tensor of a quantised model belongs to a scheme by its name: its dtype is part of that."""
    return _SCALE.search(name) is not None


def scales_of(modules: Collection[str], names: Iterable[str]) -> set[str]:
    """Return the tensors that scale the weights or inputs of linear layers: servers know none of a plain layer."""
    parts = ((name, *name.rpartition(".")[::2]) for name in names)
    return {name for name, module, last in parts if module in modules and last.startswith(_OF_LAYER) and is_scale(last)}


def leave_alone(settings: dict[str, Any], modules: Iterable[str], plain: Sequence[str]) -> None:
    """Add modules to those that the method leaves as they are, in place: they hold plain weights now.

    `plain`: modules that did so before. A method finds these by itself only as long as its list is empty.
    """
    kept = set(modules)
    kept |= {name.partition(EXPERTS)[0] + EXPERTS.rstrip(".") for name in kept if EXPERTS in name}
    if settings[METHOD] == "gptq":  # rules by regular expressions, the first that matches; -: leaves alone
        parents = {name.rpartition(".")[::2] for name in kept}
        kept |= {f"{parent}.{one}" for one, parts in FUSED.items() for parent, last in parents if last in parts}
        rules: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in sorted(kept)}
        settings["dynamic"] = {**rules, **(settings.get("dynamic") or {})}
        return
    *others, last = IGNORED[settings[METHOD]]
    for key in [*(each for each in others if settings.get(each)), last]:
        settings[key] = list(dict.fromkeys([*(settings.get(key) or plain), *sorted(kept)]))
