"""What runs an ensemble in an evaluation: this package's own model, or vLLM's engine around the same members."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from ensembler.decoding.options import DecodingOptions
from ensembler.decoding.prompts import EncodedPrompt
from ensembler.decoding.texts import GridCompletion, complete_grid
from ensembler.engine.grid import Grid, GridPoint
from ensembler.evaluation.batches import Batch, Done, unfinished
from ensembler.evaluation.passes import run_passes
from ensembler.evaluation.scoring import ScoredRequest, score_batch
from ensembler.modeling import EnsembleForCausalLM
from ensembler.preflight import CheckedEnsemble
from ensembler.serving.choice import VLLM, BackendChoice

Advance = Callable[[int], object]
"""Is told how many requests have been gone over since it was called last."""


def ignore(num: int) -> None:
    """Show no progress."""


class Scorer(Protocol):
    """Scores requests at all points of a grid."""

    def score(
        self, batches: Sequence[Batch], points: Sequence[GridPoint], done: Done = frozenset(), advance: Advance = ignore
    ) -> Iterator[list[ScoredRequest]]:
        """Yield the scores of one batch after another, without the requests whose numbers are in `done`.

        Raises ConfigError for a rule of other roles than the members', and RunError.
        """


class Backend(Scorer, Protocol):
    """Scores and completes at all points of a grid."""

    def complete(
        self, prompts: Sequence[EncodedPrompt], points: Sequence[GridPoint], options: DecodingOptions
    ) -> Iterator[GridCompletion]:
        """Yield the texts of each prompt; sampled ones depend on the seed and the prompt's number alone."""


@dataclass(frozen=True)
class TransformersBackend:
    """All points of a grid from one set of member forwards. `tokenizer` is needed for texts alone."""

    model: EnsembleForCausalLM
    tokenizer: Any = None

    def score(
        self, batches: Sequence[Batch], points: Sequence[GridPoint], done: Done = frozenset(), advance: Advance = ignore
    ) -> Iterator[list[ScoredRequest]]:
        """Yield the scores of one batch after another."""
        model = self.model
        grid = Grid.of(points, model.rule, model.contract, model.config.outside).on(model.device)
        for batch in unfinished(batches, done):
            passes = run_passes(batch.passes, model.member_set.logits, model.new_cache)
            scored = score_batch(batch, passes, grid, done)
            advance(len(scored))
            yield scored

    def complete(
        self, prompts: Sequence[EncodedPrompt], points: Sequence[GridPoint], options: DecodingOptions
    ) -> Iterator[GridCompletion]:
        """Yield the texts of the prompts, all decoded together."""
        yield from complete_grid(self.model, self.tokenizer, prompts, points, options, batch_size=len(prompts))


@contextmanager
def open_backend(choice: BackendChoice, checked: CheckedEnsemble) -> Iterator[Backend]:
    """Load the members; a `with` block gets the backend and ends it. Raises MemberError or RunError."""
    tokenizer = checked.require_tokenizer()
    if choice.name != VLLM:
        yield TransformersBackend(EnsembleForCausalLM.from_checked(checked), tokenizer)
        return
    from ensembler.evaluation.vllm_backend import MOST_TOKENS, VllmBackend
    from ensembler.serving.engine import Engine

    with Engine(checked, {"max_num_batched_tokens": MOST_TOKENS, **choice.arguments}) as engine:
        yield VllmBackend(engine, tokenizer)
