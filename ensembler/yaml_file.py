"""Read YAML that people write, recipes and files of options, without some of its surprises."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ensembler.errors import ConfigError

_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


class _Loader(yaml.SafeLoader):  # type: ignore[misc,unused-ignore]
    """YAML without some of its surprises.

    A later key takes the place of an earlier one in silence: a figure, or a model, would be lost. The key `on` is true.
    0:1:0.1, a grid to us, is a number to the base of 60. And 1e9 is a text.
    """

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        tag: str = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call,unused-ignore]
        if kind is not yaml.ScalarNode or not implicit[0]:
            return tag
        if _FLOAT.fullmatch(value):
            return "tag:yaml.org,2002:float"
        return self.DEFAULT_SCALAR_TAG if ":" in value and tag.endswith((":int", ":float")) else tag

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for index, key in enumerate(keys):
            if key.value in [other.value for other in keys[:index]]:
                raise yaml.composer.ComposerError(None, None, f"the key {key.value!r} is there twice", key.start_mark)
            key.tag = key.tag if key.value == "<<" else self.DEFAULT_SCALAR_TAG
        return node


def read_yaml(path: Path, purpose: str, remedy: str) -> Any:
    """Return the content of a file; raise ConfigError, which says for what `purpose` and names the `remedy`."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join((getattr(error, "strerror", None) or str(error)).split())[:200]
        raise ConfigError(f"{path} cannot be read {purpose}: {reason}; {remedy}") from error
