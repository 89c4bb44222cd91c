"""Several processes that torchrun has started: one output, one error, and no process that stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.process_cases import torchrun as launch_ranks
from helpers.text_cases import save_text_members


def torchrun(size: int, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), "-m", "ensembler"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *map(str, arguments)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def write_prompts(path: Path, number: int) -> Path:
    question = "Tom has {} pens. Gwen takes 3 pens. Question: How many pens does Tom have now? Answer:"
    path.write_text("".join(json.dumps({"prompt": question.format(i)}) + "\n" for i in range(20, 20 + number)))
    return path


def without_seconds(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_the_command_under_torchrun(tmp_path: Path) -> None:
    """One set of rows and one line of statistics, whatever the number of processes, and whether one of them drafts."""
    from ensembler.cli.main import main

    prompts = write_prompts(tmp_path / "prompts.jsonl", 6)
    options = ["generate", "demo", "--data", prompts, "--batch-size", 4, "--temperature", 0.8, "--seed", 5]
    run = torchrun(3, *options, "--output", tmp_path / "three.jsonl")
    errors = run.communicate(timeout=120)[1]
    assert run.returncode == 0, errors
    assert errors.count("texts: 6") == 1
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in [*options, "--output", tmp_path / "one.jsonl", "--draft", "ngram"]])
    assert ended.value.code == 0
    assert without_seconds(tmp_path / "three.jsonl") == without_seconds(tmp_path / "one.jsonl")


def test_members_with_different_tokenizers_under_torchrun(tmp_path: Path) -> None:
    from ensembler.cli.main import main

    prompts = write_prompts(tmp_path / "prompts.jsonl", 3)
    options = ["generate", save_text_members(tmp_path), "--data", prompts, "--max-new-tokens", 4]
    run = torchrun(3, *options, "--output", tmp_path / "three.jsonl")
    errors = run.communicate(timeout=120)[1]
    assert run.returncode == 0, errors
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in [*options, "--output", tmp_path / "one.jsonl"]])
    assert ended.value.code == 0
    assert without_seconds(tmp_path / "three.jsonl") == without_seconds(tmp_path / "one.jsonl")


def ranks_of(launcher: int) -> list[int]:
    """The ids of the processes by rank: the launcher starts them in this order."""
    children = subprocess.run(["ps", "--ppid", str(launcher), "-o", "pid="], capture_output=True, text=True).stdout
    return sorted(map(int, children.split()))


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_ends_the_run_with_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: int
) -> None:
    monkeypatch.chdir(tmp_path)
    prompts, output = write_prompts(tmp_path / "prompts.jsonl", 4000), tmp_path / "out.jsonl"
    run = launch_ranks(["generate", "demo", "--data", str(prompts), "--batch-size", "2", "--output", str(output)], 3)
    end = time.monotonic() + 100
    while not (output.exists() and output.stat().st_size > 1000) and run.is_alive() and time.monotonic() < end:
        time.sleep(0.05)
    ranks = ranks_of(run.pid or 0)
    assert len(ranks) == 3
    os.kill(ranks[victim], signal.SIGKILL)
    run.join(100)
    errors = Path("errors").read_text()
    assert run.exitcode == 1, errors
    said = [line for line in errors.splitlines() if line.startswith("Error: ")]
    assert len(said) == 1, errors
    role = {0: "target_pt", 2: "source_pt"}[victim]  # the largest member is the first's
    assert said[0].startswith(f"Error: lost rank {victim} ({role}) at step ")
    assert not any(Path(f"/proc/{process}").exists() for process in ranks)
    assert len(without_seconds(output)) > 0
