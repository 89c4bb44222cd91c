"""What runs an ensemble in an evaluation: this package's own model, or vLLM's engine around the same members."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from ensembler.decoding.options import DecodingOptions
from ensembler.decoding.prompts import EncodedPrompt
from ensembler.decoding.texts import GridCompletion, complete_grid
from ensembler.engine.grid import GridPoint
from ensembler.evaluation.batches import Batch
from ensembler.evaluation.scoring import ScoredRequest, score_together
from ensembler.modeling import EnsembleForCausalLM
from ensembler.preflight import CheckedEnsemble
from ensembler.serving.choice import VLLM, BackendChoice


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
        yield from complete_grid(self.model, self.tokenizer, prompts, grid, options, batch_size=len(prompts))


def open_backend(choice: BackendChoice, checked: CheckedEnsemble) -> AbstractContextManager[Backend]:
    """Load the members; a `with` block gets the backend and ends it. Raises MemberError or RunError."""
    if choice.name != VLLM:
        model = EnsembleForCausalLM.from_checked(checked)
        return nullcontext(TransformersBackend(model, checked.require_tokenizer()))
    from ensembler.evaluation.vllm_backend import VllmBackend

    return VllmBackend(checked, choice)
