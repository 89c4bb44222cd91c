"""Add patches to a model: its files copied block by block to a new folder, the patched rows changed on the way.

A block is a few rows of one tensor that stay in a core's cache; several tensors are on their way at once. Memory is a
few blocks and LoRA factors, whatever the size of the model.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ensembler.errors import OutputError, RunError
from ensembler.patch.card import write_card
from ensembler.patch.changes import BLOCK_ELEMENTS, DTYPES, Change, block_rows, fill, load_change, patched
from ensembler.patch.layout import FileLayout, Place, carry_files, plan_files, write_config
from ensembler.patch.plan import Part, Plan, make_plan

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Applied:
    """The result of a patched model: weights' bytes, the tensors that changed, and the seconds it took."""

    out: Path
    num_changed: int
    num_tensors: int
    num_bytes: int
    seconds: float


def apply_patches(
    parts: Sequence[Part],
    model: Path,
    out: Path,
    *,
    dtype: str | None = None,
    allow_pickle: bool = False,
    advance: Advance | None = None,
) -> Applied:
    """Write θ′ + Σ scale · Δθ to the new folder `out` (PortLLM, eq. 6), with all other files of `model`.

    `dtype`: float32, bfloat16 or float16 for all tensors in one of the three (default: each keeps its own). `advance`
    is called with the bytes of each tensor that is written, from several threads. Raises InputError (what does not fit,
    before anything is written; NaN in a patch, on the way) and RunError (a full disk, a sum out of range); neither
    leaves anything behind.
    """
    return run_plan(make_plan(parts, model, allow_pickle=allow_pickle), out, dtype=dtype, advance=advance)


def run_plan(plan: Plan, out: Path, *, dtype: str | None = None, advance: Advance | None = None) -> Applied:
    """Carry out a plan; see `apply_patches`."""
    start = time.monotonic()
    files = plan_files(plan, dtype)
    num_bytes = sum(file.num_bytes for file in files)
    with new_folder(out, num_bytes) as made:
        carry_files(plan.model, made)  # first: a file that cannot be read shows before the long part
        _write_weights(plan, files, made, advance or (lambda num_bytes: None))
        write_card(plan, made, out.name)
        write_config(plan.model, made, files, dtype)
    return Applied(out, len(plan.names), len(plan.tensors), num_bytes, time.monotonic() - start)


@contextmanager
def new_folder(out: Path, num_bytes: int) -> Iterator[Path]:
    """Yield a folder beside `out` that takes its name when the block ends well, and vanishes when it does not.

    Raises OutputError where `out` is taken or its disk has no `num_bytes` left, RunError where writing fails.
    """
    out = out.expanduser().resolve()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise OutputError(f"{out} exists already; choose another name for the output")
    if out.is_mount():
        raise OutputError(f"{out} is a disk's own folder, whose place no other can take; name a new folder in it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
    except OSError as error:
        raise OutputError(f"{out} cannot be made: {error.strerror}; choose another place") from error
    if free < num_bytes:
        raise OutputError(f"{out.parent} has {free:,} bytes free, and {num_bytes:,} are needed; choose another disk")
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.", ignore_cleanup_errors=True) as partial:
            made = Path(partial) / "made"
            made.mkdir()
            yield made
            made.rename(out)
    except OSError as error:
        reason = error.strerror or "not all files could be copied"
        raise RunError(f"{out} could not be written: {reason}; nothing was left") from error


def _write_weights(plan: Plan, files: Sequence[FileLayout], made: Path, advance: Advance) -> None:
    """Fill the weights files; the largest tensors first, so that all cores end together."""
    for file in files:
        with (made / file.name).open("wb") as opened:
            _reserve(opened.fileno(), file.num_bytes)
            opened.write(file.header)
    places = [(made / file.name, place) for file in files for place in file.places]
    places.sort(key=lambda item: item[1].num_bytes, reverse=True)
    changed = set(plan.names)
    stopped = threading.Event()
    own = threading.local()  # one buffer for each thread: fresh memory for every tensor would cost page faults

    def prepare() -> None:
        torch.set_num_threads(1)
        longest = max(_block_rows(place) * _row_bytes(place) for _, place in places)
        own.buffer = torch.empty(max(longest, 2 * BLOCK_ELEMENTS), dtype=torch.uint8)

    def write(path: Path, place: Place) -> int:
        change = load_change(plan.parts, place.stored.name) if place.stored.name in changed else None
        with place.stored.file.open("rb", buffering=0) as source, path.open("r+b", buffering=0) as target:
            source.seek(place.stored.start)
            target.seek(place.start)
            _write_tensor(source, target, place, change, own.buffer, stopped)
        return place.num_bytes

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=prepare) as pool:
        try:
            for done in as_completed([pool.submit(write, path, place) for path, place in places]):
                advance(done.result())
        except BaseException:  # Ctrl-C too: the others need not finish what is thrown away
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            torch.set_num_threads(threads)


def _reserve(descriptor: int, num_bytes: int) -> None:
    """Take the whole file's space on disk: a full disk shows at once, and writing into it is twice as quick on ext4."""
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except (AttributeError, OSError) as error:  # macOS has no such call, and some file systems refuse it
        if getattr(error, "errno", errno.EOPNOTSUPP) not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.truncate(descriptor, num_bytes)


def _write_tensor(
    source: FileIO, target: FileIO, place: Place, change: Change | None, buffer: Tensor, stopped: threading.Event
) -> None:
    """Copy one tensor from where `source` stands to where `target` stands, changed and cast on the way."""
    if change is None and place.dtype == place.stored.dtype:
        for start in range(0, place.num_bytes, len(buffer)):
            _write(target, _as_bytes(_read(source, buffer[: place.num_bytes - start], place)), stopped)
        return
    if place.num_bytes == 0:
        return
    change = change or Change(None, None, (), None)
    rows, columns = place.stored.matrix
    step = _block_rows(place)
    for start in range(0, rows, step):
        block = _read(source, buffer[: min(step, rows - start) * _row_bytes(place)], place)
        weight = block.view(DTYPES[place.stored.dtype]).view(-1, columns)
        _write(target, _as_bytes(patched(weight, change, dtype=DTYPES[place.dtype], start=start)), stopped)


def _row_bytes(place: Place) -> int:
    return place.stored.num_bytes // max(1, place.stored.matrix[0])


def _block_rows(place: Place) -> int:
    return block_rows(*place.stored.matrix)


def _read(source: FileIO, block: Tensor, place: Place) -> Tensor:
    """Fill the block of bytes."""
    fill(_as_bytes(block), source, place.stored)
    return block


def _as_bytes(values: Tensor) -> memoryview:
    array: Any = values.view(torch.uint8).numpy()  # a view: nothing is copied
    return memoryview(array).cast("B")


def _write(target: FileIO, data: memoryview, stopped: threading.Event) -> None:
    """Write all of it, unless the run is over: an unbuffered write may take less, on a disk that is nearly full."""
    while data and not stopped.is_set():
        data = data[target.write(data) :]
