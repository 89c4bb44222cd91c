"""Programs that a model might write: none of them takes the machine, the time or the tests' verdict with it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ensembler.errors import RunError
from ensembler.evaluation import sandbox
from ensembler.evaluation.sandbox import Limits, Outcome, check_sandbox, run_program

pytestmark = pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")

SHORT = Limits(seconds=3.0)
LONG = Limits(seconds=100.0)  # for programs that end by themselves, however busy the machine is


def run(program: str, limits: Limits = LONG) -> Outcome:
    return run_program(program, limits)


def test_right_and_wrong_programs() -> None:
    assert run("def double(x): return 2 * x\nassert double(4) == 8") == Outcome(True, "passed")
    assert run("def double(x): return x\nassert double(4) == 8, 'four'") == Outcome(False, "AssertionError: four")
    assert run("def (") == Outcome(False, "SyntaxError: invalid syntax (program, line 1)")
    assert run("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nassert A(1).x == 1").passed
    assert run("if __name__ == '__main__': raise ValueError").passed  # a solution's own demonstration is not run
    assert run("x = '\\ud800'\nraise ValueError(x)").message.startswith("ValueError")


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("while True: pass", "not finished after 3 s"),
        ("import time; time.sleep(100)", "not finished after 3 s"),
        ("while True:\n    try:\n        while True: pass\n    except BaseException: pass", "not finished after 3 s"),
        ("x = []\nwhile True: x.append(bytearray(10**7))", "MemoryError"),
        ("x = 'a' * 10**11", "MemoryError"),
        ("import os\nwhile True: os.fork()", "PermissionError: os.fork is refused"),
        ("import threading\nwhile True: threading.Thread(target=lambda: None).start()", "RuntimeError: can't start"),
        ("import subprocess; subprocess.run(['true'])", "PermissionError: subprocess.Popen is refused"),
        ("import os; os.system('true')", "PermissionError: os.system is refused"),
        ("import os; os.kill(-1, 9)", "PermissionError: os.kill is refused"),
        ("import socket; socket.socket()", "PermissionError: socket.__new__ is refused"),
        ("import ctypes; ctypes.CDLL('libc.so.6')", "PermissionError: ctypes.dlopen is refused"),
        ("f = open('big', 'wb')\nwhile True: f.write(b'x' * 10**6)", "OSError: [Errno 27]"),
        ("for i in range(10**6): open(str(i), 'w')", "PermissionError: too many files"),
        ("import sys; sys.exit()", "SystemExit"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import os; os._exit(0)", "ended before its end"),
        ("quit()", "SystemExit"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("input()", "EOFError"),
        ("import sys\nassert sys.stdin.read() == ''\nassert 0", "AssertionError"),
        ("while True: print('x' * 10**6)", "not finished after 3 s"),
        ("import faulthandler; faulthandler._sigsegv()", "killed by SIGSEGV"),
        ("import os; os.abort()", "killed by SIGABRT"),
        ("import os; os.closerange(3, 100)\nwhile True: pass", "killed by SIGKILL"),
        ("import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()", ""),
        ("def f(): f()\nf()", "RecursionError"),
        ("class E(Exception):\n    def __str__(self): raise self\nraise E", "an error without words"),
    ],
)
def test_bad_programs(program: str, message: str) -> None:
    outcome = run(program, SHORT if message.startswith("not finished") else LONG)
    assert not outcome.passed
    assert outcome.message.startswith(message), outcome


def test_the_limit_on_processes_holds_below_python() -> None:
    """A call that Python does not report to the audit hook: only the system's limit stops it."""
    program = """
import _posixsubprocess, os
r, w = os.pipe()
try:
    _posixsubprocess.fork_exec([b'/bin/true'], [b'/bin/true'], True, (w,), None, None, -1, -1, -1, -1, -1, -1, r, w,
                               True, False, -1, None, None, None, -1, None, False)
except BlockingIOError as error:
    raise SystemExit('no process')
"""
    message = run(program).message
    assert message == "SystemExit: no process" or message.startswith("TypeError"), message  # its signature may change


def test_files_elsewhere_are_left_alone(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("kept")
    os.chmod(tmp_path, 0o777)
    for call in ("open({0!r}, 'w')", "os.remove({0!r})", "os.open({0!r}, os.O_WRONLY)", "shutil.rmtree({1!r})"):
        outcome = run("import os, shutil\n" + call.format(str(kept), str(tmp_path)))
        assert "not to be changed" in outcome.message, (call, outcome)
    assert kept.read_text() == "kept"
    assert run(f"import os; os.symlink({str(kept)!r}, 'link')\nopen('link', 'w')").passed is False
    assert kept.read_text() == "kept"


def test_the_folder_is_its_own_and_empty() -> None:
    program = "import os\nassert os.listdir() == [], os.listdir()\nopen('mine', 'w').write('x')\n"
    program += "assert open('mine').read() == 'x'\nos.mkdir('d')\nos.rename('mine', 'd/mine')"
    for _ in range(2):
        assert run(program) == Outcome(True, "passed")


def test_nothing_of_the_environment_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert run("import os\nassert 'HF_TOKEN' not in os.environ and 'HOME' not in os.environ").passed


def test_a_long_program() -> None:
    assert run(f"x = {'1 + ' * 20_000}1" if False else "x = '" + "y" * 10**6 + "'\nassert len(x) == 10**6").passed


def test_no_process_is_left(tmp_path: Path) -> None:
    """The process number that a program prints into its message belongs to nobody afterwards."""
    outcome = run("import os\nraise ValueError(os.getpid())")
    assert not Path(f"/proc/{outcome.message.removeprefix('ValueError: ')}").exists()


def test_a_machine_that_cannot_hold_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    check_sandbox()
    check_sandbox.cache_clear()
    monkeypatch.setattr(sandbox, "run_program", lambda program: Outcome(False, "ModuleNotFoundError: math"))
    with pytest.raises(RunError, match="a harmless one: ModuleNotFoundError: math"):
        check_sandbox()
    check_sandbox.cache_clear()
