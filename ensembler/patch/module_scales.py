"""Strengths of a patch for some of its modules, by patterns of their names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ensembler.errors import ConfigError, PatchError
from ensembler.patch.module_patterns import find_modules
from ensembler.patch.patch_plan import PatchPlan


@dataclass(frozen=True)
class Strengths:
    """The strength of a patch, and others by pattern of modules (`module_patterns`); validated when made."""

    scale: float = 1.0
    by_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, scale in (("for all modules", self.scale), *self.by_pattern.items()):
            if not math.isfinite(scale):
                raise ConfigError(f"--scale {name} is {scale}; expected a finite number")

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Strengths:
        """Return the strengths that numbers and PATTERN=NUMBER say. Raises ConfigError."""
        scales: list[float] = []
        by_pattern: dict[str, float] = {}
        for text in texts:
            pattern, equals, number = text.rpartition("=")
            try:
                scale = float(number)
            except ValueError as error:
                raise ConfigError(
                    f"--scale {text!r} is no number and no PATTERN=NUMBER (0.8, down_proj=0.5)"
                ) from error
            if not equals:
                scales.append(scale)
            elif not pattern or pattern in by_pattern:
                fault = "names no module before =" if not pattern else "is given twice"
                raise ConfigError(f"--scale {text!r} {fault}; give each pattern one number, as in down_proj=0.5")
            else:
                by_pattern[pattern] = scale
        if len(scales) > 1:
            raise ConfigError(f"--scale is given {len(scales)} times for all modules; give one number for all")
        return cls(scales[0] if scales else 1.0, by_pattern)


def scale_modules(plan: PatchPlan, by_pattern: Mapping[str, float]) -> PatchPlan:
    """Return the plan with the first patch at other strengths in some modules; of patterns the last one counts.

    Raises ConfigError for a pattern that matches nothing, PatchError where a value has no strength.
    """
    if not by_pattern:
        return plan
    patch, *others = plan.patches
    changed = [name for name in plan.names if name in patch.names]
    scales = {
        name: scale for pattern, scale in by_pattern.items() for name in find_modules("--scale", pattern, changed)
    }
    replaced = next((name for name, scale in scales.items() if name in patch.replaced and scale != 1), None)
    if replaced is not None:
        raise PatchError(
            f"{patch.folder} replaces {replaced} (modules_to_save, bias), which has no strength; leave it out of "
            "--scale"
        )
    said = ", ".join(f"{pattern} {scale:g}" for pattern, scale in by_pattern.items())
    note = f"{patch.folder}: other strengths of some modules: {said}"
    return replace(plan, patches=(replace(patch, scales=scales, notes=(*patch.notes, note)), *others))
