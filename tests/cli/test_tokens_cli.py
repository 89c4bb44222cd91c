"""Options of tokens and templates: where texts end, renamed tokens, variables of chat templates, spanned seams."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.commands import Run, SaveMember
from helpers.tiny import make_tokenizer
from helpers.tokenizer_cases import make_spaced_tokenizer

CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}{{ tail or ' a' }}{% endif %}"


@pytest.fixture
def pair(save_member: SaveMember) -> list[object]:
    """Two members with a chat template of one variable; the tokenizer of the anchor ends texts with 'b'."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template, tokenizer.eos_token = CHAT, "b"
    one, other = save_member("one", tokenizer=tokenizer), save_member("other", seed=1)
    return ["--rule", "realign", "--member", f"reference={one}", "--member", f"aligned={other}"]


def test_inspect_prints_the_ends(run: Run, pair: list[object]) -> None:
    assert "ends        '</s>' (2), 'b' (5)" in run("inspect", *pair).out.splitlines()
    ends = json.loads(run("inspect", *pair, "--json").out)["ends"]
    assert ends == [{"id": 2, "token": "</s>"}, {"id": 5, "token": "b"}]


@pytest.mark.parametrize("command", ["inspect", "plan", "create", "generate", "score", "chat"])
def test_every_command_of_members_allows_renamed_tokens(
    run: Run, save_member: SaveMember, tmp_path: Path, command: str
) -> None:
    tokenizer = make_tokenizer()
    text = tokenizer.backend_tokenizer.to_str().replace('"<pad>"', '"<fill>"')
    other = type(tokenizer)(tokenizer_object=type(tokenizer.backend_tokenizer).from_str(text))
    tokenizer.chat_template = CHAT
    folders = {"reference": save_member("one", tokenizer=tokenizer), "aligned": save_member("other", tokenizer=other)}
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "continuation": "b"}\n')
    given = [part for role, folder in folders.items() for part in ("--member", f"{role}={folder}")]
    own = {
        "create": [tmp_path / "out"],
        "generate": ["--prompt", "a", "--max-new-tokens", 2],
        "score": ["--data", tmp_path / "data.jsonl"],
        "plan": ["--budget", "1GiB"],
    }
    line = [command, *own.get(command, []), "--rule", "realign", *given]
    refused = run(*line, stdin="a\n")
    assert (refused.code, "(--allow-renamed-special)" in refused.error) == (2, True)
    allowed = run(*line, "--allow-renamed-special", stdin="a\n")
    assert allowed.code == 0, allowed.err
    if command == "inspect":
        assert "            other tokens at ids of reference and aligned: 3 is '<pad>' and '<fill>'" in allowed.out
    if command == "plan":
        assert "--allow-renamed-special --" in allowed.out
    if command == "create":
        assert run("generate", tmp_path / "out", "--prompt", "a", "--max-new-tokens", 2).code == 0


def test_variables_of_the_chat_template(run: Run, pair: list[object], tmp_path: Path) -> None:
    command = ["generate", *pair, "--chat", "--prompt", "x", "--max-new-tokens", 6, "--json"]
    given = ["--chat-template-kwargs", '{"tail": "7"}']
    plain, changed = run(*command), run(*command, *given)
    as_text = run("generate", *pair, "--prompt", "x7", "--max-new-tokens", 6, "--json")
    assert json.loads(changed.out)["text"] == json.loads(as_text.out)["text"] != json.loads(plain.out)["text"]
    chat = run("chat", *pair, "--max-new-tokens", 6, *given, stdin="x\n")
    assert chat.out.splitlines() == [json.loads(changed.out)["text"]]
    out = tmp_path / "out.jsonl"
    assert run(*command[:-1], *given, "--output", out).code == 0
    assert 'chat template kwargs tail was "7", now "8"' in (
        run(*command[:-1], "--chat-template-kwargs", '{"tail": "8"}', "--output", out).error
    )
    for wrong, message in (
        ('{"tial": 1}', "has no variable 'tial'"),
        ("7", "--chat-template-kwargs '7' is no JSON object"),
        ("{", "is no JSON object; expected such as"),
    ):
        for line in (command, ["chat", *pair]):
            found = run(*line, "--chat-template-kwargs", wrong, stdin="x\n")
            assert (found.code, message in found.error) == (2, True)
    assert "--chat-template-kwargs was given without --chat" in run(*command[:5], "--prompt", "x", *given).error


def test_variables_of_the_chat_template_in_a_sweep(run: Run, pair: list[object], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    rows = [{"q": q, "a": "c"} for q in ("xa", "xb7", "yy")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["sweep", *pair, "--data", tmp_path / "rows.jsonl", "--prompt", "{q}", "--answer", "{a}"]
    command += ["--alpha", "0,1", "--output", tmp_path / "out", "--json"]
    assert "without apply_chat_template" in run(*command, "--chat-template-kwargs", '{"tail": "7"}').error
    chat = [*command, "--apply-chat-template=default"]
    assert "has no variable 'x9'" in run(*chat, "--chat-template-kwargs", '{"x9": "7"}').error
    assert run(*chat, "--chat-template-kwargs", '{"tail": "7"}').code == 0
    changed = run(*chat, "--chat-template-kwargs", '{"tail": "8"}')
    assert "--chat-template-kwargs is " in changed.error
    assert run(*chat, "--chat-template-kwargs", '{"tail": "8"}', "--overwrite").code == 0


def test_score_says_that_tokens_span_the_ends_of_prompts(run: Run, save_member: SaveMember, tmp_path: Path) -> None:
    tokenizer = make_spaced_tokenizer()
    settings = {"tokenizer": tokenizer, "vocab_size": len(tokenizer)}
    one, other = save_member("one", **settings), save_member("other", seed=1, **settings)
    data = tmp_path / "data.jsonl"
    lines = [{"prompt": "7", "continuation": " ab"}, {"prompt": "7 a", "continuation": "b7"}]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["score", "--rule", "realign", "--member", f"reference={one}", "--member", f"aligned={other}"]
    result = run(*command, "--data", data, "--json")
    assert "in 1 of 2 lines a token spans the end of the prompt" in result.err
    assert f"(the first: {data}:2; --per-token shows the tokens)" in result.err
    assert [json.loads(line).get("merged") for line in result.out.splitlines()] == [None, True]


def test_prompt_and_text_are_the_whole_text_in_every_form(run: Run, save_member: SaveMember, tmp_path: Path) -> None:
    tokenizer = make_spaced_tokenizer(num_bytes=0)
    settings = {"tokenizer": tokenizer, "vocab_size": len(tokenizer)}
    one, other = save_member("one", **settings), save_member("other", seed=1, **settings)
    command = ["generate", "--rule", "realign", "--member", f"reference={one}", "--member", f"aligned={other}"]
    command += ["--prompt", "x", "--max-new-tokens", 12, "--temperature", 1]
    num_spaces = 0
    for seed in range(12):
        text = json.loads(run(*command, "--seed", seed, "--json").out)["text"]
        assert run(*command, "--seed", seed, "--no-stream").out == f"{text}\n"
        assert run(*command, "--seed", seed, "--stream").out == f"{text}\n"
        num_spaces += text.startswith(" ")
    assert num_spaces
