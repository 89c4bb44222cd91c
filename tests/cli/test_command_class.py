"""Options of all commands: a file of options, the environment, levels of notices, progress, sections, completion."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from helpers.commands import Run

from ensembler.cli import tables
from ensembler.cli.main import cli


def commands(group: click.Group = cli, *names: str) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, *names, name)
        else:
            yield (*names, name)


NAMES = [each for each in commands() if each != ("lm-eval",)]  # which hands all of its options on


@pytest.fixture
def ensemble(run: Run, members: list[str], tmp_path: Path) -> Path:
    assert run("create", tmp_path / "ens", *members, "--alpha", 0.5).code == 0
    return tmp_path / "ens"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"id": f"q{i}", "prompt": text}) + "\n" for i, text in enumerate("abcdefg")))
    return path


@pytest.mark.parametrize("names", NAMES, ids=" ".join)
def test_one_name_for_one_thing(run: Run, names: tuple[str, ...]) -> None:
    said = run(*names, "--help").out
    assert said.splitlines()[-1].split("  ")[1] == "-h, --help"
    for option in ("--config FILE", "-q, --quiet", "-v, --verbose", "--log-level", "--debug"):
        assert option in said
    assert not re.search(r"--(prompts|resume|out|alphas|rules|force-overwrite)\b", said)
    if "--output" in said:
        assert "--overwrite" in said
    if "--skip-bad" in said:
        assert "--strict" in said
    assert max(len(line) for line in said.splitlines() if not re.match(r"  \S+ .* --", line)) <= 110


def test_help_has_sections(run: Run) -> None:
    said = run("generate", "--help").out
    sections = re.findall(r"^(\S.*):$", said, re.MULTILINE)
    assert sections == [
        "Members", "Rule", "Prompts", "Decoding", "Input and output", "Speed", "Devices", "General",
    ]  # fmt: skip
    for name, option in (("Rule", "--alpha"), ("Speed", "--batch-size"), ("General", "--config")):
        section = said.split(f"\n{name}:\n")[1].split("\n\n")[0]
        assert option in section


def test_options_from_a_file_the_environment_and_the_command_line(
    run: Run, ensemble: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command line wins over the environment, which wins over the file."""
    config = tmp_path / "run.yaml"
    content = f"ensemble: {ensemble}\nprompt: [hello, b]\nmax-new-tokens: 3\nalpha: 0.25\njson: true\nrule: eft\n"
    config.write_text(content)

    def found(*arguments: object) -> list[dict[str, object]]:
        result = run("generate", "--config", config, *arguments)
        assert result.code == 0, result.err
        rows = [json.loads(line) for line in result.out.splitlines()]
        return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]

    def asked(*arguments: object) -> list[dict[str, object]]:
        given = ["--prompt", "hello", "--prompt", "b", "--json", *arguments]
        return [
            {k: v for k, v in json.loads(row).items() if k != "seconds"}
            for row in run("generate", ensemble, *given).out.splitlines()
        ]

    assert found() == asked("--max-new-tokens", 3, "--alpha", 0.25, "--rule", "eft")
    monkeypatch.setenv("ENSEMBLER_GENERATE_MAX_NEW_TOKENS", "4")
    monkeypatch.setenv("ENSEMBLER_GENERATE_ALPHA", "0,1")
    assert [row["points"][1]["num_tokens"] for row in found()] == [4, 4]  # type: ignore[index]
    assert found("--alpha", 2) == asked("--max-new-tokens", 4, "--alpha", 2, "--rule", "eft")
    config.write_text(content.replace("alpha: 0.25", "alpha: [0, 0.25]"))
    monkeypatch.delenv("ENSEMBLER_GENERATE_ALPHA")
    assert [[one["alpha"] for one in row["points"]] for row in found()] == [[0, 0.25], [0, 0.25]]  # type: ignore[attr-defined]
    config.write_text(content.replace("alpha: 0.25", "alpha: 0:1:0.5"))  # a number to the base of 60, to YAML
    assert [[one["alpha"] for one in row["points"]] for row in found()] == 2 * [[0, 0.5, 1]]  # type: ignore[attr-defined]
    config.write_text(content)
    monkeypatch.setenv("ENSEMBLER_GENERATE_PROMPT", "two words\nand more")
    assert [row["prompt"] for row in found()] == ["two words", "and more"]


def test_both_names_of_a_pair_are_options_of_the_file(run: Run, ensemble: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('"a"\n{broken\n')
    command = ("generate", ensemble, "--data", tmp_path / "p.jsonl", "--max-new-tokens", 2)
    for content, code in (("skip-bad: true", 0), ("strict: false", 0), ("skip-bad: false", 2), ("strict: true", 2)):
        (tmp_path / "run.yaml").write_text(content)
        assert run(*command, "--config", tmp_path / "run.yaml").code == code, content


def test_the_traceback_is_shown_where_it_is_asked_for(run: Run, tmp_path: Path) -> None:
    plain, shown = run("inspect", tmp_path / "none"), run("inspect", tmp_path / "none", "--debug")
    assert plain.code == shown.code == 2
    assert "Traceback" not in plain.err
    assert shown.err.startswith("Traceback")
    assert shown.err.splitlines()[-1] == plain.err.splitlines()[-1]
    (tmp_path / "run.yaml").write_text("debug: true")
    assert run("inspect", tmp_path / "none", "--config", tmp_path / "run.yaml").err.startswith("Traceback")


MISTAKES = {
    "no option": ("max-new-token: 3", "has no option 'max-new-token'; did you mean max-new-tokens?"),
    "itself": ("config: other.yaml", "has no option 'config'"),
    "no mapping": ("- 3", "holds no options"),
    "no yaml": ("a: [", "cannot be read by --config: while parsing"),
    "a list": ("max-new-tokens: [3, 4]", "max-new-tokens is [3, 4]; expected one value"),
    "no number": ("max-new-tokens: many", "'many' is not a valid integer range"),
    "a key twice": ("alpha: 1\nalpha: 2", "the key 'alpha' is there twice"),
    "no grid": ("alpha: much", "alpha is 'much'; expected a number, or a grid"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_file_of_options(run: Run, tmp_path: Path, name: str) -> None:
    content, message = MISTAKES[name]
    (tmp_path / "run.yaml").write_text(content)
    result = run("generate", "demo", "--prompt", "a", "--config", tmp_path / "run.yaml")
    assert message in result.error
    assert result.code == 2
    assert "cannot be read" in run("generate", "--config", tmp_path / "none.yaml").error


def test_levels_of_notices(run: Run, ensemble: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")  # which --log-level changes
    path = tmp_path / "p.jsonl"
    path.write_text('"a"\n{broken\n')
    command = ("generate", ensemble, "--data", path, "--skip-bad", "--max-new-tokens", 2)
    plain, quiet, verbose = run(*command), run(*command, "-q"), run(*command, "-v", "--num-beams", 2)
    assert [line.split(":")[0] for line in plain.err.splitlines()] == ["skipped", "texts"]
    assert [line.split(":")[0] for line in quiet.err.splitlines()] == ["skipped"]
    assert "decoded by transformers' own loop: beam search" in verbose.err
    assert plain.out == quiet.out
    logged = run(*command, "--log-level", "info").err.splitlines()
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ WARNING ensembler.cli: skipped: ", logged[0])
    assert "INFO ensembler.cli: texts: 1," in logged[-1]
    assert run(*command).err.splitlines()[0].startswith("skipped")
    logging.getLogger().setLevel(logging.WARNING)


def test_json_comes_in_input_order_with_the_users_fields(run: Run, ensemble: Path, data: Path) -> None:
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[2] |= {"text": "mine", "label": {"gold": [1]}}
    rows[5]["prompt"] = "a longer prompt, which is begun first"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = (
        "generate",
        ensemble,
        "--data",
        data,
        "--batch-size",
        3,
        "--max-new-tokens",
        4,
        "--temperature",
        3,
        "--seed",
        1,
    )
    found = [json.loads(line) for line in run(*given, "--json").out.splitlines()]
    assert [row["id"] for row in found] == [f"q{i}" for i in range(7)]
    assert [row["prompt"] for row in found] == [row["prompt"] for row in rows]
    assert found[2]["label"] == {"gold": [1]}
    assert found[2]["text"] != "mine"
    assert [next(iter(row)) for row in found] == 7 * ["number"]
    scored = run(
        "score", ensemble, "--data", data, "--batch-size", 2, "--json", "--skip-bad", "--rule", "eft,base-change"
    )
    assert scored.out == ""
    data.write_text("".join(json.dumps({"id": i, "text": "abc de" * (1 + i % 3)}) + "\n" for i in range(6)))
    scored = run(
        "score", ensemble, "--data", data, "--batch-size", 2, "--json", "--rule", "eft,base-change", "--alpha", "0,1"
    )
    lines = [json.loads(line) for line in scored.out.splitlines()]
    assert [(row["number"], row["id"]) for row in lines] == [(i, i) for i in range(6)]
    assert lines[0]["rule"] == ["eft", "eft", "base-change", "base-change"]
    assert lines[0]["alpha"] == [0, 1, 0, 1]
    assert lines[0]["log_prob"][1] == pytest.approx(lines[0]["log_prob"][3], abs=1e-3)  # p2 p_ft/p1 by either rule


def test_points_share_a_row_and_are_what_each_is_alone(run: Run, ensemble: Path, data: Path, tmp_path: Path) -> None:
    given = ("generate", ensemble, "--data", data, "--max-new-tokens", 5)
    out = tmp_path / "out.jsonl"
    assert run(*given, "--rule", "base-change,eft", "--alpha", "0,0.5", "--output", out).code == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for index, (rule, alpha) in enumerate([("base-change", 0), ("base-change", 0.5), ("eft", 0), ("eft", 0.5)]):
        alone = run(*given, "--rule", rule, "--alpha", alpha, "--json").out.splitlines()
        points = [row["points"][index] for row in rows]
        assert [(one["rule"], one["alpha"]) for one in points] == 7 * [(rule, alpha)]
        assert [one["text"] for one in points] == [json.loads(line)["text"] for line in alone]
    again = run(*given, "--rule", "base-change,eft", "--alpha", "0,0.5", "--output", out)
    assert "nothing to do" in again.err
    other = run(*given, "--rule", "base-change,eft", "--alpha", "0,0.7", "--output", out)
    assert "points was " in other.error
    plain = run("generate", ensemble, "--prompt", "a", "--alpha", "0,0.5", "--max-new-tokens", 2).out
    assert re.findall(r"^--- prompt 0, (.*), text 0$", plain, re.MULTILINE) == [
        "base-change at alpha 0",
        "base-change at alpha 0.5",
    ]


def test_progress_off_a_terminal_is_a_line_every_30_seconds(
    run: Run, ensemble: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return now

    monkeypatch.setattr(tables, "time", Clock)
    said: list[str] = []
    monkeypatch.setattr(tables.log, "info", lambda text, *values: said.append(text % values))
    assert run("inspect", ensemble).code == 0  # sets the levels
    with tables.progress(1000, label="prompts", num_done=100) as advance:
        for _ in range(9):
            now += 10
            advance(20)
    assert said == [
        "prompts: 160/1,000, 2 per second, 7 minutes left",
        "prompts: 220/1,000, 2 per second, 6.5 minutes left",
        "prompts: 280/1,000, 2 per second, 6 minutes left",
    ]
    said.clear()
    with tables.byte_progress("writing", 90 * 2**20) as advance:
        now += 30
        advance(30 * 2**20)
    assert said == ["writing: 30.00 MiB/90.00 MiB, 1.00 MiB per second, 1 minutes left"]


def test_completion_is_clicks() -> None:
    environment = {
        **os.environ,
        "_ENSEMBLER_COMPLETE": "bash_complete",
        "COMP_WORDS": "ensembler gen",
        "COMP_CWORD": "1",
    }
    script = "from ensembler.cli.main import main; main([])"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "plain,generate\n"


def test_the_help_loads_neither_rich_nor_yaml() -> None:
    code = (
        "import sys, runpy; sys.argv = ['ensembler', 'sweep', '--help']\n"
        "try: runpy.run_module('ensembler', run_name='__main__')\n"
        "except SystemExit: print('LOADED', sorted({'rich', 'yaml', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "LOADED []"
