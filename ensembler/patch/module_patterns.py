"""Patterns of module names: a name with * and ?, or the end of one from a dot on: 'down_proj', 'layers.0.*'."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase

from ensembler.errors import ConfigError


def find_modules(option: str, pattern: str, names: Iterable[str], kind: str = "module") -> list[str]:
    """Return the weights whose module a pattern matches, of those that a patch changes; `kind` is what they are called.

    Raises ConfigError for a pattern that matches nothing, with the nearest module or kind of module.
    """
    modules = {name.removesuffix(".weight"): name for name in names}
    found = [name for module, name in modules.items() if fnmatchcase(f".{module}", f"*.{pattern}")]
    if not found:
        raise ConfigError(
            f"{option} {pattern} matches no {kind} that the patch changes; {_remedy(option, pattern, modules)}"
        )
    return found


def _remedy(option: str, pattern: str, modules: Iterable[str]) -> str:
    last_names = dict.fromkeys(module.rpartition(".")[2] for module in modules)
    if not last_names:
        return f"there is none: leave {option} out"
    near = get_close_matches(pattern, [*last_names, *modules], n=1)
    return f"did you mean {near[0]}?" if near else f"expected one of {', '.join(last_names)}, or the name of one"
