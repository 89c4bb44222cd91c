"""Standard errors by lm-eval's own functions, without the processes that it would start."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ensembler.evaluation.quiet import unprinted
from ensembler.extras import require

NUM_RESAMPLES = 1000
_ONE_PROCESS = "DISABLE_MULTIPROC"  # lm-eval's own switch; forking a process that runs models may hang


def standard_error(aggregation: Any, values: Sequence[Any], num_resamples: int = NUM_RESAMPLES) -> float | None:
    """Return lm-eval's standard error of `aggregation(values)`, or None where it has none, or fewer than two values.

    lm-eval bootstraps in blocks of at most 1,000 draws, each with its own seed: equal calls give equal numbers.
    """
    estimate = require("lm_eval.api.metrics", "eval").stderr_for_metric(aggregation, num_resamples)
    if estimate is None or len(values) < 2:
        return None
    with unprinted(), _one_process():
        return float(estimate(values))


@contextmanager
def _one_process() -> Iterator[None]:
    before = os.environ.get(_ONE_PROCESS)
    os.environ[_ONE_PROCESS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ONE_PROCESS]
        else:
            os.environ[_ONE_PROCESS] = before
