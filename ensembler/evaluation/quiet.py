"""lm-eval and datasets without their chatter: results alone go to stdout, and what matters is said by us."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from ensembler.extras import require


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
