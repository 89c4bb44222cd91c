"""`ensembler score`: rows, resuming, a full disk, and one line for every mistake."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import Run
from helpers.tiny import make_model, make_tokenizer, member_logits

from ensembler.engine.model_runner import ModelRunner

LINES = [
    {"prompt": "abc", "continuation": " de", "id": 7},
    {"prompt": "the cat", "choices": [" sat", " ran", " sang"], "answer": 0},
    {"prompt": "", "continuation": "xyz"},
    {"prompt": "q", "choices": ["a", "b"]},
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


@pytest.fixture
def command(folders: dict[str, Path], data: Path) -> list[object]:
    options = {"source_ft": "--source-ft", "source_pt": "--source-pt", "target_pt": "--target-pt"}
    members = [part for role, option in options.items() for part in (option, folders[role])]
    return ["score", *members, "--data", data, "--batch-size", 2, "--alpha", "0,0.6"]


def rows(text: str) -> list[dict[str, Any]]:
    return sorted((json.loads(line) for line in text.splitlines()), key=lambda row: row["number"])


def test_rows_hold_the_log_probs_of_the_lines(run: Run, command: list[object], folders: dict[str, Path]) -> None:
    result = run(*command, "--json")
    assert result.code == 0, result.err
    assert result.err.splitlines()[-1].startswith("lines: 4, tokens: 21, seconds: ")
    found = rows(result.out)
    assert [row["number"] for row in found] == [0, 1, 2, 3]
    assert [len(row["choices"]) for row in found if "choices" in row] == [3, 2]
    z = {
        role: member_logits(make_model(family, seed, **more), make_tokenizer()("abc de", return_tensors="pt").input_ids)
        for role, family, seed, more in (
            ("source_ft", "llama", 1, {}),
            ("source_pt", "llama", 2, {}),
            ("target_pt", "qwen2", 3, {"hidden_size": 24}),
        )
    }
    ids = make_tokenizer()("abc de").input_ids
    for k, alpha in enumerate((0.0, 0.6)):
        logprobs = (z["source_ft"] + alpha * (z["target_pt"] - z["source_pt"])).log_softmax(-1)[0]
        expected = sum(float(logprobs[t - 1, ids[t]]) for t in range(3, 6))
        assert found[0]["log_prob"][k] == pytest.approx(expected, abs=2e-5)
        assert found[0]["log_prob_per_token"][k] == pytest.approx(expected / 3, abs=2e-5)
    assert found[0]["num_tokens"] == 3
    assert found[0]["alpha"] == [0.0, 0.6]


def test_a_table_has_a_line_for_each_continuation_and_alpha(run: Run, command: list[object]) -> None:
    lines = run(*command).out.splitlines()
    assert lines[0].split() == [
        "number",
        "choice",
        "alpha",
        "log_prob",
        "per",
        "token",
        "perplexity",
        "num_tokens",
        "greedy",
    ]
    assert len(lines) == 1 + 2 * 7 + 2 * 3  # of means: of continuations, of both first choices, of both second ones
    assert [line.split()[0] for line in lines[1:15]] == sorted(line.split()[0] for line in lines[1:15])


def test_the_last_lines_are_means_over_lines(run: Run, command: list[object]) -> None:
    """Per token and perplexity are over all tokens; choices are taken together by their number."""
    found = rows(run(*command, "--json").out)
    printed = [line.split() for line in run(*command).out.splitlines() if line.split()[0] == "mean"]
    assert [line[1:3] for line in printed] == [[choice, alpha] for choice in "-01" for alpha in ("0", "0.6")]
    for line in printed:
        alpha = [0.0, 0.6].index(float(line[2]))
        bodies = [
            row["choices"][int(line[1])] if line[1] != "-" else row
            for row in found
            if (line[1] == "-") != ("choices" in row)
        ]
        log_probs, num_tokens = [one["log_prob"][alpha] for one in bodies], sum(one["num_tokens"] for one in bodies)
        per_token = sum(log_probs) / num_tokens
        greedy = sum(one["greedy"][alpha] for one in bodies) / 2
        wanted = [sum(log_probs) / 2, per_token, math.exp(-per_token), num_tokens / 2, greedy]
        assert [float(cell.replace(",", "")) for cell in line[3:]] == pytest.approx(wanted, rel=5e-3)


def test_moved_white_space_is_a_warning(run: Run, command: list[object], data: Path) -> None:
    said = (
        f"white space at the end of 1 of 4 prompts was moved to the continuations, as in lm-eval (the first: {data}:2)"
    )
    plain = run(*command, "--json")
    assert "white space" not in plain.err
    text = data.read_text().replace("the cat", "the cat ")
    data.write_text(text.replace('" sat", " ran", " sang"', '"sat", "ran", "sang"'))
    moved = run(*command, "--json")
    assert said in moved.err
    assert [{**row, "prompt": ""} for row in rows(moved.out)] == [{**row, "prompt": ""} for row in rows(plain.out)]


def test_perplexity_and_tokens(run: Run, command: list[object], data: Path, tmp_path: Path) -> None:
    plain, told = rows(run(*command, "--json").out), rows(run(*command, "--json", "--per-token").out)
    assert "token_log_probs" not in plain[0]
    for row, with_tokens in zip(plain, told, strict=True):
        for one, other in zip(row.get("choices", [row]), with_tokens.get("choices", [with_tokens]), strict=True):
            assert one["perplexity"] == pytest.approx([math.exp(-x / one["num_tokens"]) for x in one["log_prob"]])
            assert [len(each) for each in other["token_log_probs"]] == 2 * [one["num_tokens"]]
            assert [sum(each) for each in other["token_log_probs"]] == pytest.approx(one["log_prob"], abs=1e-4)
    assert told[0]["tokens"] == [" ", "d", "e"]
    assert [choice["tokens"] for choice in told[1]["choices"]] == [list(" sat"), list(" ran"), list(" sang")]
    assert "no room for tokens" in run(*command, "--per-token").error
    out = tmp_path / "out.jsonl"
    assert run(*command, "--output", out).code == 0
    assert "--overwrite" in run(*command, "--output", out, "--per-token").error


def test_texts_are_scored_whole_and_beyond_the_context(run: Run, command: list[object], data: Path) -> None:
    pytest.importorskip("lm_eval")
    long = "".join("abcdefg hi"[(7 * i) % 10] for i in range(300))  # the members' context ends at 128
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("xyz", long)))
    short, rolled = rows(run(*command, "--json").out)
    data.write_text('{"prompt": "", "continuation": "xyz"}\n')
    (same,) = rows(run(*command, "--json").out)
    assert short["log_prob"] == pytest.approx(same["log_prob"], abs=1e-4)
    assert rolled["num_tokens"] == 300
    assert all(1 < perplexity < 1e6 for perplexity in rolled["perplexity"])


def test_alpha_is_the_folders_where_none_is_given(run: Run, command: list[object], tmp_path: Path) -> None:
    assert run("create", tmp_path / "ens", *command[1:7], "--alpha", 0.6).code == 0
    by_folder = rows(run("score", tmp_path / "ens", *command[7:11], "--json").out)
    both = rows(run(*command, "--json").out)
    assert [row["alpha"] for row in by_folder] == 4 * [[0.6]]
    assert by_folder[0]["log_prob"][0] == pytest.approx(both[0]["log_prob"][1], abs=1e-5)


def test_one_member_at_a_time_writes_the_same_file(run: Run, command: list[object], tmp_path: Path) -> None:
    together, apart = tmp_path / "together.jsonl", tmp_path / "apart.jsonl"
    assert run(*command, "--output", together).code == 0
    result = run(*command, "--output", apart, "--offline-members")
    assert result.code == 0, result.err
    assert "apart.jsonl.members will take " in result.err.splitlines()[0]
    assert result.out == ""
    assert apart.read_text() == together.read_text()
    assert [row["number"] for row in map(json.loads, apart.read_text().splitlines())] == [0, 1, 2, 3]
    assert sorted(path.name for path in tmp_path.glob("*apart*")) == ["apart.jsonl", "apart.jsonl.run.json"]


def test_a_run_that_was_cut_goes_on(
    run: Run, command: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert run(*command, "--output", whole).code == 0
    for offline in ([], ["--offline-members"]):
        cut.write_text("".join(whole.read_text().splitlines(keepends=True)[1:3]))
        resumed = run(*command, "--output", cut, *offline)
        assert (resumed.code, resumed.err.splitlines()[-1].split(",")[0]) == (0, "lines: 2")
        assert cut.read_text() == whole.read_text()
        with monkeypatch.context() as patch:
            patch.setattr(ModelRunner, "_run", lambda *inputs: pytest.fail("what is finished runs again"))
            assert run(*command, "--output", cut, *offline).err.splitlines()[-1].startswith("lines: 0, ")
    changed = run(*command[:-1], "0,0.6,1.5", "--output", cut)
    assert changed.code == 2
    assert 'points was ["base-change at 0", "base-change at 0.6"], now ["base-change at 0", ' in changed.error


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (RuntimeError("a fault"), 1)])
def test_an_interrupted_member_goes_on(
    run: Run, command: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert run(*command, "--output", whole).code == 0
    with monkeypatch.context() as patch:
        own = ModelRunner._run
        calls: list[str] = []

        def failing(self: ModelRunner, *inputs: Any) -> Any:
            calls.append(self.roles[0])
            if calls.count("source_pt") == 2:
                raise error
            return own(self, *inputs)

        patch.setattr(ModelRunner, "_run", failing)
        result = run(*command, "--output", out, "--offline-members")
    assert result.code == code
    assert result.err.splitlines()[-1].startswith("Error: ")
    assert (
        len(result.err.split("\n\n" if code == 130 else "\n", 1)[1].splitlines()) == 1
    )  # after ^C, click ends the line
    left = tmp_path / "out.jsonl.members"
    assert left.is_dir()
    other = run(*command[:-2], "--alpha", "0,1", "--output", out, "--offline-members")
    assert 'now ["base-change at 0", "base-change at 1"]; ' in other.error
    resumed = run(*command, "--output", out, "--offline-members")
    assert resumed.code == 0, resumed.err
    assert out.read_text() == whole.read_text()
    assert not left.exists()


def test_verified_weights_belong_to_the_first_run(run: Run, command: list[object], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert run(*command, "--output", out).code == 0
    said = "begun with other settings: without --verify-weights (leave it out); choose another"
    assert said in run(*command, "--output", out, "--verify-weights").error
    assert run(*command, "--output", out, "--verify-weights", "--overwrite").code == 0
    assert "with --verify-weights (add it); choose another" in run(*command, "--output", out).error
    assert run(*command, "--output", out, "--verify-weights").code == 0


def test_overwrite_begins_anew(run: Run, command: list[object], tmp_path: Path) -> None:
    out, left = tmp_path / "out.jsonl", tmp_path / "out.jsonl.members"
    left.mkdir()
    (left / "run.json").write_text('{"format": "ensembler-logits", "batch_size": 7}')
    refused = run(*command, "--output", out, "--offline-members")
    assert "out.jsonl.members was begun with other settings: batch_size was 7, now 2" in refused.error
    assert not out.exists()
    assert run(*command, "--output", out, "--offline-members", "--overwrite").code == 0
    assert len(out.read_text().splitlines()) == 4
    assert not left.exists()


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing_half_written(
    run: Run, command: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, left = tmp_path / "out.jsonl", tmp_path / "out.jsonl.members"
    with monkeypatch.context() as patch:
        replace, num_written = os.replace, 0

        def full(partial: Path, path: Path) -> None:
            nonlocal num_written
            num_written += path.parent == left
            if num_written > 4:
                raise OSError(errno.ENOSPC, "No space left on device")
            replace(partial, path)

        patch.setattr("os.replace", full)
        result = run(*command, "--output", out, "--offline-members")
    assert result.code == 1
    _, error = result.err.splitlines()
    assert error.startswith("Error: ")
    assert "cannot be written: No space left on device; choose another place, or make room" in error
    assert not list(left.glob(".*"))
    assert len(list(left.glob("*.safetensors"))) == 3
    assert run(*command, "--output", out, "--offline-members").code == 0
    assert len(out.read_text().splitlines()) == 4


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    run: Run, command: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(1000, 0, 1000))
        result = run(*command, "--output", tmp_path / "out.jsonl", "--offline-members")
    assert result.code == 2
    assert "bytes and its disk has 1,000 free; make room" in result.error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_forbidden_token_is_null(run: Run, tmp_path: Path, command: list[object], folders: dict[str, Path]) -> None:
    make_model("llama", 1, vocab_size=66).save_pretrained(folders["source_ft"])
    make_tokenizer(2).save_pretrained(folders["source_ft"])
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "choices": ["bA", "bc"]}\n')
    (row,) = rows(run(*command, "--json").out)
    assert [choice["log_prob"][1] is None for choice in row["choices"]] == [True, False]
    assert row["choices"][0]["log_prob_per_token"] == [None, None]
    assert math.isfinite(row["choices"][1]["log_prob"][0])


BAD_LINES = {
    "no json": ("{oops", "is no JSON"),
    "no prompt": ('{"continuation": "a"}', "has no text under 'prompt'"),
    "a text": ('"a"', "has no text under 'prompt'"),
    "nothing to score": ('{"prompt": "a"}', "has no continuation and no choices"),
    "both": ('{"prompt": "a", "continuation": "b", "choices": ["c"]}', "has both a continuation and choices"),
    "choices a text": ('{"prompt": "a", "choices": "bc"}', "'choices' is no list of texts"),
    "no choices": ('{"prompt": "a", "choices": []}', "'choices' is no list of texts"),
    "a number": ('{"prompt": "a", "continuation": 3}', "'continuation' is no text"),
    "empty": ('{"prompt": "a", "continuation": ""}', "the continuation is empty"),
    "an empty text": ('{"text": ""}', "the text is empty"),
    "a text that is none": ('{"text": 3}', "'text' is no text"),
    "a text and a continuation": ('{"text": "a", "continuation": "b"}', "has no text under 'prompt'"),
    "empty choice": ('{"prompt": "a", "choices": ["b", ""]}', "choice 1 is empty"),
    "surrogate": ('{"prompt": "a", "continuation": "\\ud83d"}', "not UTF-8 text"),
    "too long": (json.dumps({"prompt": "a" * 128, "continuation": "bc"}), "the context of source_ft ends at 128"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_or_skipped(run: Run, command: list[object], data: Path, name: str) -> None:
    line, message = BAD_LINES[name]
    data.write_text(data.read_text() + line + "\n")
    result = run(*command)
    assert result.code == 2
    assert f"{data}:5" in result.error
    assert message in result.error
    skipping = run(*command, "--skip-bad", "--json")
    assert [row["number"] for row in rows(skipping.out)] == [0, 1, 2, 3]
    assert skipping.err.count("skipped: ") == 1


MISTAKES = {
    "overwrite": (["--overwrite"], "--overwrite was given without --output"),
    "offline": (["--offline-members"], "--offline-members was given without --output"),
    "alpha": (["--cutoff", "x"], "--cutoff"),
    "alpha twice": (["--alpha", "1"], "--alpha was given 2 times; give it once"),
    "batch size": (["--batch-size", "0"], "--batch-size"),
    "data twice": (["--data", "nowhere.jsonl"], "--data was given 2 times"),
    "the data": (["--output", "DATA", "--overwrite"], ", which this command reads; give --output another name"),
    "no folder": (["--output", "nowhere/out.jsonl"], "nowhere is not a folder"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(
    run: Run, command: list[object], data: Path, tmp_path: Path, name: str
) -> None:
    arguments, message = MISTAKES[name]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    result = run(*command, *[data if argument == "DATA" else argument for argument in arguments])
    assert message in result.error
    assert result.code == 2
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_file_without_a_line_that_can_be_scored(run: Run, command: list[object], data: Path) -> None:
    for text in ("", '{"prompt": "a", "continuation": ""}\n'):
        data.write_text(text)
        result = run(*command, "--skip-bad")
        assert result.code == 2
        assert f"Error: {data} holds no line that can be scored; expected " in result.err.splitlines()[-1]


def test_weights_are_read_for_dtypes_that_are_asked_for(run: Run, command: list[object]) -> None:
    in_bf16 = rows(run(*command, "--dtype", "bfloat16", "--json").out)
    in_fp32 = rows(run(*command, "--json").out)
    gaps = [abs(a - b) for x, y in zip(in_bf16, in_fp32, strict=True) for a, b in _pairs(x, y)]
    assert 0 < max(gaps) < 2
    assert torch.isfinite(torch.tensor(gaps)).all()


def _pairs(x: dict[str, Any], y: dict[str, Any]) -> list[tuple[float, float]]:
    bodies = [(a, b) for a, b in zip(x.get("choices", [x]), y.get("choices", [y]), strict=True)]
    return [pair for a, b in bodies for pair in zip(a["log_prob"], b["log_prob"], strict=True)]
