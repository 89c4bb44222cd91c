"""Programs that a model wrote: each runs in a process of its own, with limits. Against accidents, not against attack.

What holds a program: wall time and CPU time; memory (address space); the size of each file and their number; no
further processes and no threads; an empty folder of its own that is deleted; no standard input, output to nowhere; no
variables of the environment. Python calls that start processes, send signals, open sockets, load libraries, or change
files elsewhere are refused. Under root, to whom limits on processes do not apply, a program runs as no user (uid 65534)
and keeps of root the right to read. The process's group is killed when it ends or its time is over. There are no
namespaces: a program can read what its user can, and one that is written to get past Python's refusals may do what its
user may. For models that you do not trust, run the whole in a container.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO

from ensembler.errors import RunError

NOBODY = 65534
_CHILD = Path(__file__).with_name("sandbox_child.py")
_PROBE = "import collections, functools, heapq, itertools, math, re, string, typing\nassert math.sqrt(4) == 2"


@dataclass(frozen=True)
class Limits:
    """What one program may use: seconds, bytes of memory and per file, and how many files it may open to write."""

    seconds: float = 10.0
    memory: int = 2**30
    file_size: int = 2**20
    num_files: int = 16


@dataclass(frozen=True)
class Outcome:
    """Whether a program ran to its end without an error; otherwise what happened, in a few words."""

    passed: bool
    message: str


def run_program(program: str, limits: Limits | None = None) -> Outcome:
    """Run a Python program within limits and return what came of it; its output is thrown away."""
    limits = limits or Limits()
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="ensembler-code-", ignore_cleanup_errors=True) as folder:
        if os.geteuid() == 0:
            os.chown(folder, NOBODY, NOBODY)
        order = json.dumps({"program": program, "token": token, "nobody": NOBODY, **asdict(limits)})
        said, code = _run(order.encode(), folder, limits.seconds)
    if said is None:
        return Outcome(False, f"not finished after {limits.seconds:g} s")
    if said == token:
        return Outcome(True, "passed")
    if said:
        return Outcome(False, said)
    return Outcome(False, f"killed by {signal.Signals(-code).name}" if code < 0 else "ended before its end")


def _run(order: bytes, folder: str, seconds: float) -> tuple[str | None, int]:
    """Return what the program's process reported (None: nothing in time) and how it ended, its group being dead."""
    reading, writing = os.pipe()
    with (
        open(reading, "rb", buffering=0) as report,
        tempfile.TemporaryFile() as orders,
        subprocess.Popen(
            [sys.executable, "-I", "-B", str(_CHILD), str(writing)],
            stdin=_filled(orders, order),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            pass_fds=(writing,),
            start_new_session=True,
        ) as process,
    ):
        os.close(writing)
        try:
            said = _read(report, time.monotonic() + seconds)
            if said == "":
                _wait(process.pid)  # so that its own end is told, not our signal; it is not reaped
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # not reaped yet: the number is still this group's
        return said, process.wait()


def _filled(file: IO[bytes], content: bytes) -> IO[bytes]:
    file.write(content)
    file.seek(0)
    return file


def _read(report: io.FileIO, deadline: float) -> str | None:
    """What the process reports, at once; "" if it ends without a word; None if it says nothing in time."""
    ready, _, _ = select.select([report], [], [], max(0.0, deadline - time.monotonic()))
    return os.read(report.fileno(), 4096).decode("utf-8", "replace") if ready else None


def _wait(pid: int, seconds: float = 1.0) -> None:
    """Wait until a process has ended, without reaping it: it may have closed its pipe and gone on."""
    deadline = time.monotonic() + seconds
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None and time.monotonic() < deadline:
        time.sleep(0.005)


@lru_cache(maxsize=1)
def check_sandbox() -> None:
    """Raise RunError unless a harmless program passes and a failing one fails here."""
    if os.name != "posix":
        raise RunError("code tasks limit their programs by means of Linux and macOS; run them there")
    for program, should_pass in ((_PROBE, True), ("assert False", False)):
        outcome = run_program(program)
        if outcome.passed != should_pass:
            raise RunError(
                f"programs cannot be run within limits here (a harmless one: {outcome.message}); run as an ordinary "
                f"user, with a Python ({sys.executable}) that every user may read"
            )
