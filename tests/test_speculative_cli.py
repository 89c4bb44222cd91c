"""`generate --draft`, `--draft-tokens` and `--stats`: what is printed where, and one line for what cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Run

from ensembler.decoding.stats import PHASES

PROMPT = "Ben has 9 pens. Ida gives Ben 7 pens. Question: How many pens does Ben have now? Answer:"


def generate(run: Run, *options: object) -> Any:
    return run("generate", "demo", "--prompt", PROMPT, "--max-new-tokens", 12, *options)


def stats_of(result: Any) -> dict[str, Any]:
    (line,) = [line for line in result.err.splitlines() if line.startswith("{")]
    found: dict[str, Any] = json.loads(line)["stats"]
    return found


@pytest.mark.parametrize("draft", ["auto", "source_ft", "source_pt", "target_pt", "ngram"])
def test_a_draft_changes_no_greedy_text(run: Run, draft: str) -> None:
    plain = generate(run, "--draft", "none")
    found = generate(run, "--draft", draft, "--draft-tokens", 3)
    assert (found.code, found.out) == (0, plain.out)
    assert found.out.strip()


def test_a_sampled_text_does_not_depend_on_the_number_of_drafted_tokens(run: Run) -> None:
    options = ("--draft", "source_ft", "--temperature", 1.0, "--seed", 3)
    texts = {generate(run, *options, "--draft-tokens", num).out for num in (1, 2, 8)}
    assert len(texts) == 1
    assert texts != {generate(run, *options[:-1], 4).out}


def test_stats_are_a_table_on_standard_error(run: Run) -> None:
    result = generate(run, "--stats", "--draft", "source_ft")
    assert result.out == generate(run).out
    words = result.err.split()
    assert {"prefill", "step", "combine", "sample", "other", "source_ft", "source_pt", "target_pt"} <= set(words)
    assert "draft: source_ft, rounds: " in result.err
    assert "acceptance: " in result.err
    assert "--draft" not in result.err
    assert "prefill" not in generate(run).err


def test_stats_are_a_line_of_json_on_standard_error(run: Run) -> None:
    result = generate(run, "--stats", "--json", "--draft", "source_ft")
    row, found = json.loads(result.out), stats_of(result)
    assert found["draft"] == "source_ft"
    assert found["num_tokens"] == row["num_tokens"] > 5
    assert set(found["members"]) == {"source_ft", "source_pt", "target_pt"}
    assert set(found["phases"]) <= {*PHASES, "other"}
    assert sum(found["phases"].values()) == pytest.approx(found["seconds"], abs=1e-4)
    assert sum(found["members"].values()) < found["seconds"]
    assert found["num_round_tokens"] + found["num_plain_steps"] + 1 == found["num_tokens"]


@pytest.mark.parametrize("options", [("--draft", "none"), ("--num-beams", 2)])
def test_stats_of_plain_decoding(run: Run, options: tuple[object, ...]) -> None:
    found = stats_of(generate(run, "--stats", "--json", *options))
    assert set(found["phases"]) == {"prefill", "step", "other"}
    assert (found["draft"], found["num_rounds"], found["acceptance"]) == (None, 0, None)
    assert found["tokens_per_second"] > 0


def test_a_draft_that_does_not_come_about_is_said_in_one_line(run: Run, save_member: Any) -> None:
    folders = [save_member("ft", "llama", 1), save_member("pt", "mistral", 2), save_member("target", "llama", 3)]
    names = ("--source-ft", "--source-pt", "--target-pt")
    members = [part for pair in zip(names, folders, strict=True) for part in pair]
    result = run("generate", *members, "--prompt", "abc", "--draft", "source_ft", "--max-new-tokens", 9)
    line = "decoded plainly: source_pt keeps a window of 6 tokens and a text may have 12"
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
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": PROMPT[:-end]}) for end in (1, 8, 30, 47)))
    texts = {}
    for draft in ("none", "source_ft", "ngram"):
        out = tmp_path / f"{draft}.jsonl"
        assert run("generate", "demo", "--prompts", tmp_path / "p.jsonl", "--output", out, "--draft", draft).code == 0
        texts[draft] = [json.loads(line)["text"] for line in out.read_text("utf-8").splitlines()]
    assert texts["none"] == texts["source_ft"] == texts["ngram"]
