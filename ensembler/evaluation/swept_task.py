"""What a sweep needs of a task: those of lm-eval have it (`EvalTask`), and labelled images on disk (`vision.tasks`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ensembler.evaluation.examples import Answer, Example, Measurement, Metric, Request


class SweptTask(Protocol):
    """Examples by split, and how their answers become values and a figure."""

    @property
    def name(self) -> str:
        """The name of the task."""

    @property
    def version(self) -> str:
        """The version of its examples and metrics; figures of two versions are not to be compared."""

    @property
    def num_fewshot(self) -> int | None:
        """How many solved examples stand before each question; None where there is no prompt."""

    @property
    def limit(self) -> int | None:
        """Only so many examples of a split: of texts the first, of images some that are drawn."""

    @property
    def splits(self) -> Mapping[str, int]:
        """The number of examples of each split."""

    @property
    def default_split(self) -> str:
        """The split that is reported."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Its metrics, the first of which counts if no other is asked for."""

    def choose_metric(self, key: str | None = None) -> Metric:
        """Return the metric of a key, or the first; raise ConfigError if unknown."""

    def describe(self) -> dict[str, Any]:
        """Return what was evaluated, as JSON."""

    def examples(self, split: str | None = None) -> list[Example]:
        """Return the examples of a split."""

    def bare_requests(self, example: Example) -> tuple[Request, ...]:
        """Return what tells examples apart: equal ones are of equal documents."""

    def measure(self, example: Example, answers: Sequence[Answer]) -> Measurement:
        """Return what the answers to an example come to."""

    def aggregate(self, key: str, values: Sequence[Any]) -> float:
        """Return the figure of a metric from the values of all examples."""

    def standard_error(self, key: str, values: Sequence[Any], *, num_resamples: int = 1000) -> float | None:
        """Return the standard error of a figure, or None where there is none."""
