"""Quantise a member's weights when it is loaded: the methods of bitsandbytes, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ensembler.errors import ConfigError

METHODS = ("bnb-8bit", "bnb-nf4", "bnb-fp4")
COMPUTE_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Quantization:
    """Weights of linear layers in 8 or 4 bits; embeddings, norms and the vocabulary head keep their dtype.

    `method`: 'bnb-8bit' (LLM.int8(), Dettmers et al. 2022), 'bnb-nf4' or 'bnb-fp4' (QLoRA, Dettmers et al. 2023). The
    4-bit methods multiply in `compute_dtype` (None: the member's dtype); `double_quant`: the scales are quantised too.
    """

    method: str
    compute_dtype: str | None = None
    double_quant: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"unknown quantization {self.method!r}; expected one of: {', '.join(METHODS)}")
        if self.compute_dtype is not None and self.compute_dtype not in COMPUTE_DTYPES:
            raise ConfigError(
                f"compute dtype {self.compute_dtype!r} is not known; expected one of: {', '.join(COMPUTE_DTYPES)}"
            )
        if not isinstance(self.double_quant, bool):
            raise ConfigError(f"double_quant is {self.double_quant!r}; expected true or false")
        if self.bits == 8 and (self.compute_dtype or self.double_quant):
            raise ConfigError("bnb-8bit takes no compute dtype and no double quantisation; they belong to nf4 and fp4")

    @classmethod
    def parse(cls, value: Quantization | Mapping[str, Any] | str) -> Quantization:
        """Return a Quantization from one, from the mapping in config.json, or from text.

        The text is a method, the compute dtype and 'double' behind colons where they are wanted: 'nf4',
        'bnb-nf4:float16', 'fp4:bfloat16:double'; 'bnb-' may be left out.
        """
        if isinstance(value, Quantization):
            return value
        if isinstance(value, str):
            method, *details = value.split(":")
            dtypes = [detail for detail in details if detail != "double"]
            if len(dtypes) > 1 or len(details) > len(set(details)) or "" in details:
                raise ConfigError(f"quantization {value!r} is not of the form METHOD[:COMPUTE_DTYPE][:double]")
            return cls(f"bnb-{method.removeprefix('bnb-')}", dtypes[0] if dtypes else None, "double" in details)
        if not isinstance(value, Mapping):
            raise ConfigError(f"quantization is {value!r}; expected one of {', '.join(METHODS)}, or a mapping")
        known = {entry.name for entry in fields(cls)}
        unknown = sorted(set(value) - known)
        if unknown:
            raise ConfigError(f"unknown key {unknown[0]!r} of a quantization; expected: {', '.join(sorted(known))}")
        if "method" not in value:
            raise ConfigError(f"a quantization has no 'method'; expected one of: {', '.join(METHODS)}")
        return cls(**value)

    @property
    def bits(self) -> int:
        """Bits of a quantised weight, its scales apart."""
        return 8 if self.method == "bnb-8bit" else 4

    def to_dict(self) -> str | dict[str, Any]:
        """Return the entry of config.json: the method alone where the rest is left at its default."""
        content = {key: value for key, value in asdict(self).items() if value}
        return self.method if len(content) == 1 else content

    def __str__(self) -> str:
        return ":".join(filter(None, (self.method, self.compute_dtype, "double" if self.double_quant else None)))
