"""`ensembler chat`: lines of a pipe, its commands, and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.commands import Run, SaveMember
from helpers.tiny import make_tokenizer
from torch import Tensor

from ensembler.decoding.samples import TextPrinter

TEMPLATE = "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"
STOPPED = "answer stopped; Ctrl-C again ends the chat"


@pytest.fixture
def ensemble(run: Run, folders: dict[str, Path], members: list[str], tmp_path: Path) -> Path:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folders["source_ft"])
    assert run("create", tmp_path / "ens", *members, "--alpha", 0.5).code == 0
    return tmp_path / "ens"


def test_an_anchor_without_a_chat_template_is_refused(run: Run, members: list[str]) -> None:
    assert "no chat template" in run("chat", *members, stdin="hi\n").error


def test_each_line_of_a_pipe_is_a_message(run: Run, ensemble: Path) -> None:
    result = run("chat", ensemble, "--max-new-tokens", 4, stdin="hi\n\nhi\n/reset\nhi")
    assert result.code == 0, result.err
    answers = result.out.splitlines()
    assert len(answers) == 3
    assert answers[0] == answers[2] != answers[1]
    assert result.err.splitlines() == [
        "base-change at alpha 0.5; /help lists the commands",
        "conversation forgotten",
    ]


def test_exit_ends_and_two_slashes_begin_a_text(run: Run, ensemble: Path, tmp_path: Path) -> None:
    out = tmp_path / "talk.jsonl"
    said = f"//exit is a word\n/save {out}\n/exit\nhi\n"
    result = run("chat", ensemble, "--max-new-tokens", 4, "--system", "be kind", stdin=said)
    messages = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert messages == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "/exit is a word"},
        {"role": "assistant", "content": result.out.removesuffix("\n")},
    ]
    assert result.err.splitlines()[-1] == f"messages: 3, written to {out}"


def test_alpha_and_rule_hold_from_the_next_answer_on(run: Run, ensemble: Path) -> None:
    """Each answer, and what /explain prints of it, is that of `generate` at its rule and alpha."""
    said = "hello\n/alpha 0\n/reset\nhello\n/alpha 2\n/rule eft\n/reset\nhello\n/explain\n"
    result = run("chat", ensemble, "--max-new-tokens", 9, stdin=said)
    assert [line for line in result.err.splitlines() if "next answer" in line] == [
        "the next answer: base-change at alpha 0",
        "the next answer: base-change at alpha 2",
        "the next answer: eft at alpha 2",
    ]
    points = [("base-change", 0.5), ("base-change", 0), ("eft", 2)]
    # As a plain prompt, written as the template does: the tokenizer of EFT's anchor has no template.
    asked = ("generate", ensemble, "--prompt", "hello ", "--max-new-tokens", 9)
    expected = [run(*asked, "--rule", rule, "--alpha", alpha).out for rule, alpha in points]
    explained = run(*asked, "--rule", "eft", "--alpha", 2, "--explain").out
    assert result.out == "".join(expected) + explained
    assert len(set(expected)) == 3
    assert "tokens are not the anchor's choice" in explained


def test_help_names_every_command_and_the_point(run: Run, ensemble: Path) -> None:
    lines = run("chat", ensemble, stdin="/help\n").err.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == [
        *("/help", "/alpha", "/rule", "/reset", "/save", "/explain", "/exit"),
        "//text",
    ]
    assert lines[-1] == "the next answer: base-change at alpha 0.5"


MISTAKES = {
    "/alhpa 1": "there is no command /alhpa; the nearest is /alpha, /help lists all, and // begins a text with /",
    "/quit": "there is no command /quit; the nearest is /exit",
    "/": "there is no command /; the nearest is /",
    "/alpha": "/alpha was given nothing; expected /alpha A",
    "/alpha 0,5": "alpha is '0,5'; expected a number, as in /alpha 0.5",
    "/alpha -1": "alpha is -1; the rule 'base-change' takes a number that is not negative",
    "/rule realign": "the rule 'realign' combines aligned, reference; the members are",
    "/reset now": "/reset was given 'now'; expected /reset",
    "/save": "/save was given nothing; expected /save FILE",
    "/save x.jsonl": "there is nothing to save yet",
    "/explain": "there is no answer to explain yet",
    "a" * 200: "the context of source_ft ends at 128: shorten the prompt (or /reset)",
}


def test_a_mistake_is_one_line_and_the_chat_goes_on(run: Run, ensemble: Path) -> None:
    result = run("chat", ensemble, "--max-new-tokens", 4, stdin="".join(f"{line}\n" for line in (*MISTAKES, "hi")))
    assert result.code == 0, result.err
    assert len(result.out.splitlines()) == 1
    lines = result.err.splitlines()[1:]
    assert len(lines) == len(MISTAKES)
    for line, message in zip(lines, MISTAKES.values(), strict=True):
        assert line.startswith("Error: ")
        assert message in line


def interrupt(monkeypatch: pytest.MonkeyPatch, *at: int) -> None:
    """Let Ctrl-C be pressed when the streamer gets these of its tokens."""
    taken = 0
    put = TextPrinter.put

    def press(self: TextPrinter, value: Tensor) -> None:
        nonlocal taken
        put(self, value)
        if self.ids:  # it was not the prompt
            taken += 1
            for _ in range(at.count(taken)):
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(TextPrinter, "put", press)


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_ends_the_answer_alone(run: Run, ensemble: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run("chat", ensemble, "--max-new-tokens", 9, stdin="hello\n").out
    before = signal.getsignal(signal.SIGINT)
    interrupt(monkeypatch, 3)
    result = run("chat", ensemble, "--max-new-tokens", 9, stdin="hello\nhello\n")
    assert (result.code, result.err.splitlines()[1:]) == (0, [STOPPED])
    stopped, other = result.out.splitlines()
    assert stopped == whole[:3]  # a character a token
    assert len(other) > 3
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_twice_ends_the_chat(run: Run, ensemble: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    interrupt(monkeypatch, 3, 3)
    result = run("chat", ensemble, "--max-new-tokens", 9, stdin="hello\nhello\n")
    assert (result.code, result.err.splitlines()[-1]) == (130, "chat ended")
    assert STOPPED not in result.err
    assert signal.getsignal(signal.SIGINT) is before


def wait_for(process: subprocess.Popen[str], is_there: Callable[[], bool]) -> bool:
    """Wait for something that a process does, at most a minute or two, and not behind its end."""
    deadline = time.monotonic() + 100
    while not is_there() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return is_there()


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_a_real_ctrl_c_in_an_answer_and_at_the_prompt(save_member: SaveMember, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    endless = {"max_position_embeddings": 2**17, "eos_token_id": None}
    command = [sys.executable, "-m", "ensembler", "chat", "--max-new-tokens", "100000", "--temperature", "1"]
    for seed, role in enumerate(("source-ft", "source-pt", "target-pt")):
        command += [f"--{role}", str(save_member(role, seed=seed, tokenizer=tokenizer, **endless))]
    out, err, saved = tmp_path / "out", tmp_path / "err", tmp_path / "saved.jsonl"
    with out.open("w") as out_file, err.open("w") as err_file:
        process = subprocess.Popen(
            [*command, "--seed", "0"], stdin=subprocess.PIPE, stdout=out_file, stderr=err_file, text=True
        )
    try:
        assert process.stdin is not None
        process.stdin.write("hello\n")
        process.stdin.flush()
        assert wait_for(process, lambda: out.stat().st_size > 0), err.read_text()
        process.send_signal(signal.SIGINT)
        assert wait_for(process, lambda: STOPPED in err.read_text()), err.read_text()
        process.stdin.write(f"/save {saved}\n")
        process.stdin.flush()
        assert wait_for(process, saved.is_file), err.read_text()
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:  # Python drops an interrupt that comes in a finaliser: press again
            process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
        process.communicate()
    assert err.read_text().splitlines()[1:] == [STOPPED, f"messages: 2, written to {saved}", "", "chat ended"]
    answer = json.loads(saved.read_text("utf-8").splitlines()[1])["content"]
    assert answer
    assert out.read_text() == answer + "\n"
