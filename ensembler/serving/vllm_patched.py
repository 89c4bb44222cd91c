"""Load one model into vLLM with patches added on the way: the load format `patched`, of any model in a folder.

    vllm serve NEW_BASE --load-format patched --model-loader-extra-config '{"patch": "my-lora", "scale": 1.0}'

"patch" is a folder or hub id, or a list of them; "scale" their strength, or a list. Other keys are vLLM's own.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from ensembler.errors import ConfigError
from ensembler.files import find_folder
from ensembler.patch.formats import PATCH_FILES, read_patch
from ensembler.patch.loading import load_patched
from ensembler.patch.patch_plan import plan_patches

PATCH, SCALE = "patch", "scale"


class PatchedLoader(DefaultModelLoader):  # type: ignore[misc,unused-ignore]
    """vLLM's loader of files, whose tensors have the patches in `model_loader_extra_config` added."""

    def __init__(self, load_config: LoadConfig) -> None:
        """Raise ConfigError where no patch is named, or strengths are not as many."""
        extra = dict(load_config.model_loader_extra_config or {})
        self._patches = patches_of(extra)
        others = {key: value for key, value in extra.items() if key not in (PATCH, SCALE)}
        super().__init__(replace(load_config, load_format="safetensors", model_loader_extra_config=others))

    def get_all_weights(
        self, model_config: ModelConfig, model: nn.Module
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        """Yield the tensors of the model's files, θ + Δθ; raises what `plan_patches` raises."""
        if getattr(model, "secondary_weights", ()):
            raise ConfigError(f"{model_config.model} is loaded from several models, and a patch is for one")
        patches = [
            read_patch(find_folder(name, allow_patterns=PATCH_FILES), scale=scale) for name, scale in self._patches
        ]
        options = {"revision": model_config.revision, "cache_dir": self.load_config.download_dir}
        yield from load_patched(plan_patches(patches, find_folder(model_config.model, **options)))


def patches_of(extra: dict[str, Any]) -> list[tuple[str, float]]:
    """Return the patches and their strengths that a loader's configuration names; raise ConfigError where it cannot."""
    names, scales = extra.get(PATCH), extra.get(SCALE, 1.0)
    if isinstance(names, str):
        names = [names]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"the load format patched was given {PATCH} {names!r}; expected a folder, a hub id or a list of them in "
            '--model-loader-extra-config, such as {"patch": "my-lora"}'
        )
    if not isinstance(scales, list):
        scales = [scales] * len(names)
    are_numbers = all(isinstance(scale, int | float) and not isinstance(scale, bool) for scale in scales)
    if len(scales) != len(names) or not are_numbers:
        raise ConfigError(f"{SCALE} is {scales!r} for {len(names)} patches; give one number, or one for each")
    return [(name, float(scale)) for name, scale in zip(names, scales, strict=True)]
