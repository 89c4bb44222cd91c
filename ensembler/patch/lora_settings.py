"""Ranks, strengths and targets of LoRAs, as the configuration of a PEFT adapter gives them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ensembler.errors import PatchError

_PATTERNS = ("rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class LoraSettings:
    """The content of an adapter's configuration file."""

    file: Path
    config: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        return self.file.parent

    @property
    def parameters(self) -> tuple[str, ...]:
        """Ends of the names of tensors that have a LoRA by themselves, and not as a layer's weight."""
        return tuple(self.config.get("target_parameters") or ())

    def parameters_of(self, module: str, *, is_stack: bool) -> list[str]:
        """Return the names of the tensors in `module` that may have a LoRA by themselves.

        A target without a module counts only if the module's factors are those of a stack of matrices (`is_stack`):
        any other module is a layer.
        """
        names = []
        for target in self.parameters:
            parent, _, name = target.rpartition(".")
            if (not parent and is_stack) or (parent and f".{module}".endswith(f".{parent}")):
                names.append(f"{module}.{name}")
        return list(dict.fromkeys(names))

    def rank(self, name: str) -> int:
        """Return r of a module or a tensor; raise PatchError where the configuration is damaged."""
        return int(self._configured("r", "rank_pattern", name))

    def scale(self, name: str) -> float:
        """Return α / r, or α / √r for rslora, of a module or a tensor."""
        rank = self.rank(name)
        alpha = self._configured("lora_alpha", "alpha_pattern", name)
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _configured(self, default: str, pattern: str, name: str) -> float:
        """Return a setting, with the pattern that PEFT matches against the end of a name."""
        try:
            for key, value in (self.config.get(pattern) or {}).items():
                if _is_match(key, name):
                    return float(value)
            return float(self.config[default])
        except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
            raise PatchError(f"{self.file}: {default} or {pattern} is damaged; mend it") from error

    def warnings(self, modules: Iterable[str]) -> list[str]:
        """Return a sentence for each pattern that matches none of the modules and tensors with a LoRA."""
        found = list(modules)
        known = list(dict.fromkeys([*found, *(module.rpartition(".")[2] for module in found)]))
        lines = []
        for pattern in _PATTERNS:
            for key in self.config.get(pattern) or {}:
                if not any(_is_match(key, module) for module in found):
                    near = get_close_matches(key, known, n=3)
                    hint = f"; the nearest names are {', '.join(near)}" if near else ""
                    lines.append(
                        f"{self.folder}: the key {key!r} in {pattern} matches no LoRA, so that it changes nothing{hint}"
                    )
        return lines


def _is_match(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None
