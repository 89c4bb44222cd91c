"""`generate --draft`, `--draft-tokens` and `--stats`: what is printed where, and one line for what cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import Run

from ensembler.decoding.decode_stats import PHASES

PROMPT = "Ben has 9 pens. Ida gives Ben 7 pens. Question: How many pens does Ben have now? Answer:"


def generate(run: Run, *options: object) -> Any:
    return run("generate", "demo", "--prompt", PROMPT, "--max-new-tokens", 12, *options)


def stats_of(result: Any) -> dict[str, Any]:
    (line,) = [line for line in result.err.splitlines() if line.startswith("{")]
    found: dict[str, Any] = json.loads(line)["stats"]
    return found


@pytest.mark.parametrize("options", [(), ("--temperature", 1.0, "--top-p", 0.95, "--seed", 3)])
def test_a_draft_changes_no_text(run: Run, options: tuple[object, ...]) -> None:
    plain = generate(run, "--draft", "none", *options)
    assert plain.out.strip()
    for draft, num in (("auto", 8), ("source_ft", 1), ("source_ft", 3), ("source_pt", 3), ("target_pt", 8)):
        found = generate(run, "--draft", draft, "--draft-tokens", num, *options)
        assert (found.code, found.out) == (0, plain.out)
    assert generate(run, "--draft", "ngram", *options).out == plain.out
    assert not options or generate(run, "--draft", "source_ft", *options[:-1], 4).out != plain.out


def test_stats_are_a_table_on_standard_error(run: Run) -> None:
    result = generate(run, "--stats", "--draft", "source_ft")
    assert result.out == generate(run).out
    words = result.err.split()
    assert {"prefill", "step", "choose", "other", "source_ft", "source_pt", "target_pt"} <= set(words)
    assert "draft: source_ft, rounds: " in result.err
    assert "acceptance: " in result.err
    assert "--draft" not in result.err
    assert "prefill" not in generate(run).err


def test_stats_are_a_line_of_json_on_standard_error(run: Run) -> None:
    result = generate(run, "--stats", "--json", "--draft", "source_ft")
    row, found = json.loads(result.out), stats_of(result)
    assert (found["draft"], found["by_transformers"]) == ("source_ft", {})
    assert found["num_tokens"] == row["num_tokens"] > 5
    assert set(found["members"]) == {"source_ft", "source_pt", "target_pt"}
    assert set(found["phases"]) <= {*PHASES, "other"}
    assert sum(found["phases"].values()) == pytest.approx(found["seconds"], abs=1e-4)
    assert sum(found["members"].values()) < found["seconds"]
    assert found["num_round_tokens"] + found["num_plain_steps"] + 1 == found["num_tokens"]
    assert found["rows_per_step"] == 1


def test_stats_of_plain_decoding(run: Run) -> None:
    found = stats_of(generate(run, "--stats", "--json", "--draft", "none"))
    assert set(found["phases"]) == {"prefill", "step", "choose", "other"}
    assert (found["draft"], found["num_rounds"], found["acceptance"]) == (None, 0, None)
    assert found["plain_reason"] == "no draft was wanted"
    assert found["tokens_per_second"] > 0


def test_stats_of_beams_which_are_transformers_own(run: Run) -> None:
    found = stats_of(generate(run, "--stats", "--json", "--num-beams", 2))
    assert set(found["phases"]) == {"step", "other"}
    assert (found["draft"], found["num_rounds"], found["acceptance"]) == (None, 0, None)


def test_a_draft_that_does_not_come_about_is_said_in_one_line(run: Run, save_member: Any) -> None:
    folders = [save_member("ft", "llama", 1), save_member("pt", "bloom", 2), save_member("target", "llama", 3)]
    names = ("--source-ft", "--source-pt", "--target-pt")
    members = [part for pair in zip(names, folders, strict=True) for part in pair]
    result = run("generate", *members, "--prompt", "abc", "--draft", "source_ft", "--max-new-tokens", 9)
    line = "decoded plainly: source_pt cannot keep a cache of rows: BloomForCausalLM has not been tried on it"
    assert (result.code, result.err.splitlines().count(line)) == (0, 1)
    assert line not in run("generate", *members, "--prompt", "abc", "--max-new-tokens", 9).err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--draft", "target_ft"), "Error: draft is 'target_ft', which is no role of this ensemble; expected one of: "),
        (("--draft-tokens", 0), "Error: Invalid value for '--draft-tokens': 0 is not in the range x>=1"),
        (("--draft-tokens", "x"), "Error: Invalid value for '--draft-tokens': 'x' is not a valid integer range"),
        (
            ("--draft", "ngram", "--num-beams", 4),
            "Error: draft is 'ngram' and num_beams 4; a draft works with greedy decoding and with sampling: leave one",
        ),
    ],
)
def test_bad_input_is_one_line(run: Run, options: tuple[object, ...], message: str) -> None:
    result = generate(run, *options)
    assert result.code == 2
    assert result.error.startswith(message)


def test_a_draft_and_beams_agree_on_auto(run: Run) -> None:
    assert generate(run, "--num-beams", 3, "--draft", "auto").out == generate(run, "--num-beams", 3).out


def test_rows_of_a_file(run: Run, tmp_path: Path) -> None:
    """A run that was stopped may be gone on with under another draft: texts do not depend on it."""
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": PROMPT[:-end]}) for end in (1, 8, 30, 47)))
    texts = {}
    sampling = ("--temperature", 0.9, "--seed", 5)
    for draft, size in (("none", 1), ("source_ft", 4), ("ngram", 3)):
        out = tmp_path / f"{draft}.jsonl"
        options = ("--data", tmp_path / "p.jsonl", "--output", out, "--draft", draft, "--batch-size", size)
        assert run("generate", "demo", *options, *sampling).code == 0
        rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
        texts[draft] = {row["number"]: row["text"] for row in rows}
    assert texts["none"] == texts["source_ft"] == texts["ngram"]
    assert len(texts["none"]) == 4
