"""Work done ahead of its use, in threads: images are read, decoded and prepared while a model runs."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

NUM_WORKERS = min(4, os.cpu_count() or 1)


def ahead(
    items: Iterable[Item], work: Callable[[Item], Result], *, num_workers: int = NUM_WORKERS, num_ahead: int = 2
) -> Iterator[Result]:
    """Yield work(item) in the order of the items, at most `num_workers` + `num_ahead` of them begun and not yet taken.

    What `work` raises is raised where its result would have been taken; no item behind it is begun then.
    """
    rest = iter(items)
    executor = ThreadPoolExecutor(num_workers)
    try:
        waiting = deque(executor.submit(work, item) for item in islice(rest, num_workers + num_ahead))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(executor.submit(work, item) for item in islice(rest, 1))
            yield result
    finally:
        executor.shutdown(cancel_futures=True)
