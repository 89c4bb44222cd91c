"""The other side of the sandbox: limits itself, runs one program, reports in one line. The standard library alone.

Started as ``python -I -B sandbox_child.py FD``, the order being JSON on standard input; see `sandbox.py`.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys
import types
from typing import Any

_REFUSED = (
    "ctypes.dlsym",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.kill",
    "os.killpg",
    "os.posix_spawn",
    "os.setxattr",
    "os.spawn",
    "os.startfile",
    "os.system",
    "pty.spawn",
    "socket.",
    "subprocess.Popen",
)
_CHANGES = (
    "os.chmod",
    "os.chown",
    "os.link",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.symlink",
    "os.truncate",
    "os.utime",
)
_PR_SET_KEEPCAPS, _CAP_DAC_READ_SEARCH, _CAPABILITY_VERSION_3 = 8, 2, 0x20080522  # linux/prctl.h, linux/capability.h
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main() -> None:
    """Run the program of the order; report its token, or what went wrong."""
    report = int(sys.argv.pop())
    order = json.loads(sys.stdin.buffer.read())
    program, token = order["program"], order["token"]
    restrict(order)
    try:
        module = types.ModuleType("program")
        sys.modules["program"] = module
        exec(compile(program, "program", "exec"), module.__dict__)
        said = token
    except BaseException as error:
        said = describe(error)
    os.write(report, said.encode("utf-8", "replace"))
    os._exit(0)  # nothing that the program left to be done at the end


def describe(error: BaseException) -> str:
    """The error in a few words; even to write it is the program's own doing and may fail."""
    try:
        return f"{type(error).__name__}: {error}"[:200]
    except BaseException:
        return "an error without words"


def restrict(order: dict[str, Any]) -> None:
    """Take from this process what the program shall not have."""
    seconds = math.ceil(order["seconds"]) + 1
    signal.setitimer(signal.ITIMER_REAL, seconds)  # should the parent be gone
    if os.geteuid() == 0:  # to whom the limit on processes does not apply
        become(order["nobody"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_CPU, seconds)
    limit(resource.RLIMIT_FSIZE, order["file_size"])
    limit(resource.RLIMIT_NPROC, 0)
    limit(resource.RLIMIT_AS, order["memory"])
    sys.addaudithook(make_guard(os.path.realpath(os.getcwd()), order["num_files"]))


def become(nobody: int) -> None:
    """Give up root. On Linux the right to read all files is kept: Python itself may lie where only root can look."""
    os.setgroups([])
    os.setresgid(nobody, nobody, nobody)
    if sys.platform != "linux":
        os.setresuid(nobody, nobody, nobody)
        return
    import ctypes

    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setresuid(nobody, nobody, nobody)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    rights = (ctypes.c_uint32 * 6)(1 << _CAP_DAC_READ_SEARCH, 1 << _CAP_DAC_READ_SEARCH)  # effective, permitted, ...
    if libc.capset(header, rights):
        raise PermissionError("root could not be given up")


def limit(which: int, value: int) -> None:
    """Set a limit for good, or keep a lower one that is there."""
    hard = resource.getrlimit(which)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))


def make_guard(folder: str, num_files: int) -> Any:
    """Return an audit hook (PEP 578) that refuses what the program shall not do; it cannot be taken off again."""
    inside, left = folder + os.sep, [num_files]

    def guard(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(_REFUSED) or (event == "ctypes.dlopen" and arguments[0]):
            raise PermissionError(f"{event} is refused")
        if event == "open":
            if isinstance(arguments[2], int) and arguments[2] & _WRITES:
                check(arguments[:1])
        elif event in _CHANGES or event.startswith("shutil."):
            check(arguments)

    def check(paths: tuple[Any, ...]) -> None:
        for path in paths:
            if isinstance(path, str | bytes) and not os.path.realpath(os.fsdecode(path)).startswith(inside):
                raise PermissionError("files elsewhere are not to be changed")
        left[0] -= 1
        if left[0] < 0:
            raise PermissionError("too many files")

    return guard


if __name__ == "__main__":
    main()
