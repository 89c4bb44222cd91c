"""What runs an ensemble in an evaluation: this package's own model, or vLLM's engine around the same members."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

from ensembler.decoding.grid_texts import GridCompletion, complete_grid
from ensembler.decoding.points import GridPoint
from ensembler.decoding.prompts import EncodedPrompt
from ensembler.decoding.texts import DecodingOptions
from ensembler.errors import ConfigError
from ensembler.evaluation.batches import Batch
from ensembler.evaluation.scoring import ScoredRequest, score_together
from ensembler.modeling import EnsembleForCausalLM
from ensembler.preflight import CheckedEnsemble

TRANSFORMERS, VLLM = BACKENDS = ("transformers", "vllm")


class Backend(Protocol):
    """Answers at all points of a grid."""

    def score(self, batches: Sequence[Batch], grid: Sequence[GridPoint]) -> Iterator[list[ScoredRequest]]:
        """Yield the scores of one batch after another."""

    def complete(
        self, prompts: Sequence[EncodedPrompt], grid: Sequence[GridPoint], options: DecodingOptions
    ) -> Iterator[GridCompletion]:
        """Yield the texts of each prompt; sampled ones depend on the seed and the prompt's number alone."""


@dataclass(frozen=True)
class TransformersBackend:
    """All points of a grid from one set of member forwards."""

    model: EnsembleForCausalLM
    tokenizer: Any

    def score(self, batches: Sequence[Batch], grid: Sequence[GridPoint]) -> Iterator[list[ScoredRequest]]:
        """Yield the scores of one batch after another."""
        return score_together(self.model, batches, grid)

    def complete(
        self, prompts: Sequence[EncodedPrompt], grid: Sequence[GridPoint], options: DecodingOptions
    ) -> Iterator[GridCompletion]:
        """Yield the texts of the prompts, all decoded together."""
        for batch in complete_grid(self.model, self.tokenizer, prompts, grid, options, batch_size=len(prompts)):
            yield from batch.completions


@dataclass(frozen=True)
class BackendChoice:
    """Which backend runs an ensemble; `arguments` are those of `vllm.LLM`. Raises ConfigError."""

    name: str = TRANSFORMERS
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in BACKENDS:
            raise ConfigError(f"unknown backend {self.name!r}; expected {' or '.join(BACKENDS)}")
        if self.arguments and self.name != VLLM:
            raise ConfigError(f"arguments of vLLM's engine were given to the backend {self.name}; choose vllm")
        if self.name == VLLM:
            from ensembler.serving.engine import check_arguments

            check_arguments(self.arguments)

    def check(self, checked: CheckedEnsemble) -> None:
        """Raise an InputError for what this backend cannot run, before work is planned for it."""
        if self.name == VLLM:
            from ensembler.serving.checks import check_servable, require_vllm

            require_vllm()
            check_servable(checked)

    def shortest_context(self, checked: CheckedEnsemble) -> tuple[str, int] | None:
        """Return what sets the shortest limit to a text with its answer, and that limit in tokens, or None."""
        if self.name != VLLM:
            return checked.shortest_context
        from ensembler.serving.engine import shortest_context

        return shortest_context(checked, self.arguments)

    def max_length(self, checked: CheckedEnsemble) -> int | None:
        """Return how many tokens a member may read of a text that is scored; None where nothing sets a limit.

        vLLM reads a text's last token too, and wants room for a token behind it.
        """
        limit = self.shortest_context(checked)
        if limit is None:
            return None
        return limit[1] - 2 if self.name == VLLM else limit[1]

    def open(self, checked: CheckedEnsemble) -> AbstractContextManager[Backend]:
        """Load the members; a `with` block gets the backend and ends it. Raises MemberError or RunError."""
        if self.name != VLLM:
            model = EnsembleForCausalLM.from_checked(checked)
            return nullcontext(TransformersBackend(model, checked.require_tokenizer()))
        from ensembler.evaluation.vllm_backend import VllmBackend

        return VllmBackend(checked, self.arguments)
