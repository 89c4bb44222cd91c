"""lm-eval and datasets without their chatter: results alone go to stdout, and what matters is said by us."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from ensembler.extras import require


@contextmanager
def quiet() -> Iterator[None]:
    """Within: lm-eval logs errors only, datasets shows no bars, and nothing is printed."""
    datasets = require("datasets", "eval")
    logger = logging.getLogger("lm_eval")
    level, had_bars = logger.level, datasets.are_progress_bars_disabled() is False
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        if had_bars:
            datasets.enable_progress_bars()
