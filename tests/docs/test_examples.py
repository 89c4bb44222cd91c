"""The scripts in examples/ and benchmarks/ run, here on tiny models and data."""

from __future__ import annotations

import json
import re
from pathlib import Path

from click.testing import CliRunner
from helpers.commands import SaveMember
from helpers.scripts import run_script
from helpers.tiny import member_logits, random_ids

from ensembler import EnsembleForCausalLM
from ensembler.cli.main import cli
from ensembler.demo import demo_folder


def test_a_trio_from_one_model(save_member: SaveMember, tmp_path: Path) -> None:
    base = save_member("base", "llama", 1, num_layers=1)
    for folder in ("sst2", "text"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    reviews = [{"sentence": f"a film {i} ", "label": str(i % 2)} for i in range(24)]
    (tmp_path / "data" / "sst2" / "train_3000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reviews))
    for name in ("wikitext2_raw_valid.txt", "tinyshakespeare.txt"):
        (tmp_path / "data" / "text" / name).write_text("to be or not to be, that is the question. " * 20)
    arguments = (base, tmp_path / "data", tmp_path / "trio", "--reviews", 24, "--text-steps", 2)
    run_script("examples/make_smollm2_trio.py", *arguments)
    members = {
        "source_ft": tmp_path / "trio" / "source_ft",
        "source_pt": base,
        "target_pt": tmp_path / "trio" / "target_pt",
    }
    model = EnsembleForCausalLM.from_members(members=members)
    names = ("source_ft", "target_pt", "source_pt")
    logits = [member_logits(model.members[name], random_ids(1, 5)) for name in names]
    assert (logits[0] - logits[2]).abs().max() > 0  # the adapter was trained
    assert (logits[1] - logits[2]).abs().max() > 0
    before = (tmp_path / "trio" / "target_pt" / "model.safetensors").stat().st_mtime_ns
    run_script("examples/make_smollm2_trio.py", *arguments)
    assert (tmp_path / "trio" / "target_pt" / "model.safetensors").stat().st_mtime_ns == before


def test_a_logits_processor_makes_an_ensemble_of_another_models_generate() -> None:
    lines = run_script("examples/logits_processor.py").splitlines()
    texts = dict(line.split(": ", 1) for line in lines)
    assert texts["anchor with the processor"] == texts["ensemble"] != texts["anchor"]


def test_a_student_learns_from_the_probabilities_of_the_demo(tmp_path: Path) -> None:
    rows = [json.loads(row) for row in (demo_folder() / "data" / "validation.jsonl").open(encoding="utf-8")][:100]
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"prompt": r["prompt"], "continuation": r["completion"]}) + "\n" for r in rows))
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    command = ["score", "demo", "--data", texts, "--alpha", "0.8", "--top-k-logits", "8", "--output", teacher]
    assert CliRunner().invoke(cli, [*map(str, command), "--batch-size", "50"]).exit_code == 0
    printed = run_script("examples/distill.py", teacher, demo_folder() / "target_pt", student, "--epochs", 2)
    losses = [float(number) for number in re.findall(r"\d\.\d\d", printed)]
    assert len(losses) == 4  # the first and the last of each epoch
    assert losses[0] > 3  # the format of the answers is new to the student
    assert losses[-1] < losses[0] / 4, losses
    assert (student / "model.safetensors").is_file()


def test_the_benchmarks_write_their_rows(save_member: SaveMember, tmp_path: Path) -> None:
    model = save_member("base", vocab_size=160)
    cost, start = tmp_path / "cost.jsonl", tmp_path / "start.jsonl"
    run_script("benchmarks/decode_cost.py", model, "--tokens", 5, "--repeats", 1, "--results", cost)
    row = json.loads(cost.read_text())
    assert (row["model"], row["num_tokens"], row["repeats"]) == ("base", 5, 1)
    assert row["greedy_ratio"] > 0
    run_script("benchmarks/startup.py", "--repeats", 1, "--results", start)
    assert json.loads(start.read_text())["help_seconds"] > 0
