"""Choose the backend that runs an ensemble, transformers or vLLM, and check that it can. Loads neither."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ensembler.errors import ConfigError
from ensembler.preflight import CheckedEnsemble
from ensembler.serving.checks import check_servable, common_dtype, require_vllm

TRANSFORMERS, VLLM = BACKENDS = ("transformers", "vllm")
_OURS = ("model", "load_format", "worker_extension_cls", "hf_overrides")
_OTHER = ("quantization", "pipeline_parallel_size", "speculative_config", "skip_tokenizer_init", "runner", "convert")
_MEANING = ("logprobs_mode", "max_logprobs")


@dataclass(frozen=True)
class BackendChoice:
    """A backend by name; `arguments` are those of `vllm.LLM`. Raises ConfigError."""

    name: str = TRANSFORMERS
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in BACKENDS:
            raise ConfigError(f"unknown backend {self.name!r}; expected {' or '.join(BACKENDS)}")
        if self.arguments and self.name != VLLM:
            raise ConfigError(f"arguments of vLLM's engine were given to the backend {self.name}; choose vllm")
        for names, reason in (
            (_OURS, "is given to vLLM's engine by ensembler itself"),
            (_OTHER, "is nothing that vLLM can do with one member of several"),
            (_MEANING, "would change what the numbers mean"),
        ):
            for name in names:
                if name in self.arguments:
                    raise ConfigError(f"{name} {reason}; leave it out")
        for name in ("max_model_len", "tensor_parallel_size"):
            value = self.arguments.get(name, 1)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; expected a whole number from 1")

    def check(self, checked: CheckedEnsemble) -> None:
        """Raise an InputError for what this backend cannot run, before work is planned for it."""
        if self.name == VLLM:
            require_vllm()
            check_servable(checked, num_ranks=self.arguments.get("tensor_parallel_size", 1))
            common_dtype(checked, self.arguments.get("dtype"))

    def describe(self, checked: CheckedEnsemble) -> dict[str, Any]:
        """Return all of it that results may depend on, as JSON."""
        if self.name != VLLM:
            return {"name": self.name}
        return {"name": self.name, **self.arguments, "dtype": common_dtype(checked, self.arguments.get("dtype"))}

    def shortest_context(self, checked: CheckedEnsemble) -> tuple[str, int] | None:
        """Return what sets the shortest limit to a text with its answer, and that limit in tokens, or None."""
        limits = [] if checked.shortest_context is None else [checked.shortest_context]
        if "max_model_len" in self.arguments:
            limits.append(("vLLM's engine (max_model_len)", self.arguments["max_model_len"]))
        return min(limits, key=lambda limit: limit[1], default=None)

    def max_length(self, checked: CheckedEnsemble) -> int | None:
        """Return how many tokens a member may read of a text that is scored; None where nothing sets a limit.

        vLLM reads a text's last token too, and wants room for a token behind it.
        """
        limit = self.shortest_context(checked)
        if limit is None:
            return None
        return limit[1] - 2 if self.name == VLLM else limit[1]
