"""lm-eval and datasets without their chatter and their processes: results alone go to stdout."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from ensembler.extras import require

_ONE_PROCESS = "DISABLE_MULTIPROC"  # lm-eval's own switch; forking a process that runs models may hang


@contextmanager
def unprinted() -> Iterator[None]:
    """Within, nothing is printed, nor is what is logged without a handler. Cheap enough for every document."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Within, nothing is printed, lm-eval logs errors only, and datasets shows no bars."""
    datasets = require("datasets", "eval")
    logger = logging.getLogger("lm_eval")
    level, had_bars = logger.level, not datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with unprinted():
            yield
    finally:
        logger.setLevel(level)
        if had_bars:
            datasets.enable_progress_bars()


@contextmanager
def one_process() -> Iterator[None]:
    """Within, lm-eval starts no processes for its bootstrap."""
    before = os.environ.get(_ONE_PROCESS)
    os.environ[_ONE_PROCESS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ONE_PROCESS]
        else:
            os.environ[_ONE_PROCESS] = before
