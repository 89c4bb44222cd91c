"""Answer documents of lm-eval with an ensemble of language models, at all points of a grid."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ensembler.engine.grid import GridPoint
from ensembler.errors import PromptError
from ensembler.evaluation.backends import open_backend
from ensembler.evaluation.documents import Answer, Document, EncodedDocument
from ensembler.evaluation.encoded_request import EncodedRequest
from ensembler.evaluation.grid_lm import GridLM
from ensembler.evaluation.lm_eval_settings import silence_lm_eval
from ensembler.evaluation.provenance import describe_ensemble, versions
from ensembler.files import digest
from ensembler.preflight import CheckedEnsemble
from ensembler.serving.choice import VLLM, BackendChoice


@dataclass(eq=False)
class TextAnswerer:
    """Answers documents with an ensemble that is loaded by `open`.

    `seed`: of sampled texts, which depend on it and the document alone. Raises an InputError for members that the
    backend cannot run.
    """

    checked: CheckedEnsemble
    seed: int = 0
    backend: BackendChoice = field(default_factory=BackendChoice)

    def __post_init__(self) -> None:
        self.backend.check(self.checked)

    @cached_property
    def model(self) -> GridLM:
        """The model of lm-eval that asks; it has no members before `open`."""
        with silence_lm_eval():
            length = self.backend.max_length(self.checked)
            return GridLM(self.checked, points=(), max_length=length, seed=self.seed)

    def describe(self, *, verify_weights: bool = False) -> dict[str, Any]:
        """Return the ensemble, the backend and versions, as JSON; see `describe_ensemble`."""
        return {
            "versions": versions(),
            "ensemble": describe_ensemble(self.checked, verify_weights=verify_weights),
            "backend": self.backend.describe(self.checked),
        }

    def encode(self, document: Document) -> EncodedDocument:
        """Return how the members read a document. Raises PromptError, which names it, for what they cannot be asked."""
        requests = self.encode_requests(document)
        read = [*(one.tokens for one in requests), *(one.others for one in requests if one.others)]
        return EncodedDocument(
            max((one.length for one in requests), default=0),
            digest(repr(read), 16),
            sum(len(one.tokens[-1]) for one in requests),
            sum(one.is_cut for one in requests),
        )

    def encode_requests(self, document: Document) -> list[EncodedRequest]:
        """Return a document's requests as the members read them. Raises PromptError, which names it."""
        try:
            with self.model.noting() as requests:
                self._ask(document.requests)
        except PromptError as error:
            raise PromptError(f"{document.name}: {error}") from error
        except IndexError as error:  # lm-eval looks at the first token of an empty continuation
            raise PromptError(f"{document.name}: an answer is no token of its own; give it more text") from error
        return requests

    def _ask(self, requests: Sequence[Any]) -> list[list[Any]]:
        """Return a list of answers to each of lm-eval's instances: one text per repeat, or one log-prob."""
        answers: list[list[Any]] = [[] for _ in requests]
        for kind in dict.fromkeys(request.request_type for request in requests):
            numbers = [
                number
                for number, request in enumerate(requests)
                if request.request_type == kind
                for _ in range((request.repeats or 1) if kind == "generate_until" else 1)
            ]
            found = getattr(self.model, kind)([requests[number] for number in numbers], disable_tqdm=True)
            for number, answer in zip(numbers, found, strict=True):
                answers[number].append(answer)
        return answers

    @contextmanager
    def open(self) -> Iterator[None]:
        """Load the members. Raises MemberError or RunError."""
        with open_backend(self.backend, self.checked) as members:
            self.model.take(members)
            try:
                yield
            finally:
                self.model.take(None)

    def largest_batch(self, document: Document, points: Sequence[GridPoint]) -> int:
        """Return how many such documents fit into memory at once, as lm-eval finds it; the members are loaded.

        A generation is taken for as many sequences as it may become: its repeats, at each of the points.
        """
        if self.backend.name == VLLM:  # whose engine makes its own batches
            return int(self.model.max_batch_size)
        repeats = [one.repeats or 1 for one in document.requests if one.request_type == "generate_until"]
        num_rows = len(points) * max(repeats) if repeats else 1
        with silence_lm_eval():
            return self.model.largest_batch(max(self.encode(document).length, 1), num_rows)

    def answer(
        self, batches: Iterable[Sequence[Document]], points: Sequence[GridPoint]
    ) -> Iterator[list[list[Answer]]]:
        """Yield the answers to one batch after another: of each document, at each point."""
        self.model.points = tuple(points)
        for batch in batches:
            self.model.batch_size_per_gpu = len(batch)
            found = iter(self._ask([request for document in batch for request in document.requests]))
            yield [_by_point(document, found, len(points)) for document in batch]

    def thumbnail(self, document: Document) -> str | None:
        """Return None: a text has no picture."""
        return None


def _by_point(document: Document, found: Iterator[list[Any]], num_points: int) -> list[Answer]:
    """Take a document's answers off `found`, which holds them over the points, and turn them into JSON by point."""
    answers: list[Answer] = [[] for _ in range(num_points)]
    for request in document.requests:
        first, *others = next(found)
        if request.request_type == "generate_until":
            over_points = [list(texts) for texts in zip(first, *others, strict=True)]
        elif request.request_type == "loglikelihood":
            over_points = [list(pair) for pair in zip(*(each.tolist() for each in first), strict=True)]
        else:
            over_points = first.tolist() if hasattr(first, "tolist") else [first] * num_points  # of an empty text
        for answer, one in zip(answers, over_points, strict=True):
            answer.append(one)
    return answers
