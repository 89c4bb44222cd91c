"""Ensembler: decode with an ensemble of language models, as if it were one."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ensembler.auto_classes import register_when_loaded

__version__ = "0.1.0"

__all__ = [
    "EnsembleCache",
    "EnsembleConfig",
    "EnsembleForCausalLM",
    "EnsembleForImageClassification",
    "EnsemblerError",
    "MemberConfig",
    "register_rule",
    "score",
]

if TYPE_CHECKING:
    from ensembler.config import EnsembleConfig, MemberConfig
    from ensembler.engine.ensemble_cache import EnsembleCache
    from ensembler.errors import EnsemblerError
    from ensembler.evaluation.backends import score
    from ensembler.modeling import EnsembleForCausalLM
    from ensembler.rules import register_rule
    from ensembler.vision.image_modeling import EnsembleForImageClassification

_MODULES = {
    "EnsembleCache": "ensembler.engine.ensemble_cache",
    "EnsembleConfig": "ensembler.config",
    "EnsembleForCausalLM": "ensembler.modeling",
    "EnsembleForImageClassification": "ensembler.vision.image_modeling",
    "EnsemblerError": "ensembler.errors",
    "MemberConfig": "ensembler.config",
    "register_rule": "ensembler.rules",
    "score": "ensembler.evaluation.backends",
}

register_when_loaded()


def __getattr__(name: str) -> Any:
    # Imported at first use: `import ensembler` and `ensembler --help` load no torch.
    if name not in _MODULES:
        raise AttributeError(f"module 'ensembler' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
