"""Teach the Auto classes of `transformers` the folders of ensembles, without importing it before it is used.

`AutoConfig` learns of `EnsembleConfig` when its module is loaded; making such a configuration loads the model's class.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

AUTO_CONFIG = "transformers.models.auto.configuration_auto"  # where the registry of AutoConfig is


class _Finder:
    """Finds one module, once, by the other finders, and adds the registration behind its code."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != AUTO_CONFIG:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                import_module("ensembler.config")

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_name(model_class: type) -> None:
    """Let `transformers` find a class by its name, as `transformers serve` and pipeline(assistant_model=) look it up.

    They ask the module, which is made anew when processors are loaded; what is set on its type stays. All lazy modules
    of `transformers` are of that type, so all of them know the name.
    """
    setattr(type(import_module("transformers")), model_class.__name__, model_class)


def register_when_loaded() -> None:
    """Register ensembles with `AutoConfig` as soon as `transformers` loads it; at once where it has."""
    if AUTO_CONFIG in sys.modules:
        import_module("ensembler.config")
    else:
        sys.meta_path.insert(0, _Finder())
