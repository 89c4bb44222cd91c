"""Optional packages: imported where they are needed, and met with the exact pip line where they are missing."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from ensembler.errors import MissingExtraError


def require(module: str, extra: str) -> ModuleType:
    """Return the imported `module`, or raise MissingExtraError that names the extra of logit-ensembler to install."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise  # the package is there; something that it needs itself is not
        raise MissingExtraError(module.partition(".")[0], extra) from error
