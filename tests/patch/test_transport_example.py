"""The example that compares transports over three updates, here on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

from helpers.commands import SaveMember
from helpers.scripts import run_script


def test_rows_of_all_transports_over_three_updates(save_member: SaveMember, tmp_path: Path) -> None:
    base = save_member("base", "llama", 1, num_layers=1)
    for folder in ("sst2", "text"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    lines = [json.dumps({"sentence": f"a film {i} ", "label": str(i % 2)}) + "\n" for i in range(40)]
    (tmp_path / "data" / "sst2" / "train_3000.jsonl").write_text("".join(lines))
    (tmp_path / "data" / "sst2" / "dev.jsonl").write_text("".join(lines[:6]))
    for name in ("wikitext2_raw_valid.txt", "tinyshakespeare.txt"):
        (tmp_path / "data" / "text" / name).write_text("to be or not to be, that is the question. " * 60)
    out = tmp_path / "out"
    run_script("examples/transport_smollm2.py", base, tmp_path / "data", out, "--reviews", 12, "--text-pieces", 8)
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text("utf-8").splitlines()]
    carried = ["none", "add", "orthogonal", "sign-mask", "procrustes"]
    assert [(row["update"], row["method"]) for row in rows] == [
        *((0, method) for method in carried[:2]),
        *((update, method) for update in (1, 2, 3) for method in carried),
    ]
    for row in rows:
        assert row["correct"] == row["right"].count("1")
        assert row["low"] <= row["accuracy"] <= row["high"]
        assert ("p_mcnemar" in row) == (row["method"] not in ("none", "add"))
    run_script("examples/transport_smollm2.py", base, tmp_path / "data", out, "--reviews", 12, "--text-pieces", 8)
    assert len((out / "rows.jsonl").read_text("utf-8").splitlines()) == len(rows)  # goes on where all is done
    table = run_script("examples/transport_smollm2.py", "--table", "--results", out / "rows.jsonl")
    assert len(table.splitlines()) == 2 + len(rows)
