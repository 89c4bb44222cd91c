"""Kill a sweep at random moments, go on with it, and compare its rows with those of a sweep that was left alone.

    python benchmarks/sweep_kill.py [--kills 20] [--limit 100]

The sweep is of the embedded family on its own task, both rules. Each kill (SIGKILL) comes when the file of rows has
reached a random size, and the next process goes on from what is there. One JSON row is appended to
benchmarks/results/sweep_kill.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from ensembler.evaluation.provenance import versions

RESULTS = Path(__file__).parent / "results" / "sweep_kill.jsonl"


@dataclass(frozen=True)
class Row:
    """One run. `num_torn`: kills that left a line or an example half-written; `same_rows`: byte for byte."""

    kills: int
    num_torn: int
    num_rows: int
    num_twice: int
    same_rows: bool
    versions: dict[str, str]
    date: str


def command(out: Path, limit: int) -> list[str]:
    flags = ["--rules", "base-change,eft", "--validation", "validation", "--limit", str(limit), "--batch-size", "2"]
    return [sys.executable, "-m", "ensembler", "sweep", "demo", *flags, "--output", str(out)]


def kill_once(out: Path, limit: int, target: int) -> bool:
    """Start the sweep, kill it when its rows reach `target` bytes; return whether a row or an example was torn."""
    process = subprocess.Popen(command(out, limit), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rows = out / "rows.jsonl"
    while process.poll() is None and (rows.stat().st_size if rows.exists() else 0) < target:
        time.sleep(0.001)
    process.kill()
    process.wait()
    content = rows.read_bytes() if rows.exists() else b""
    num_points = 32
    return not content.endswith(b"\n") or content.count(b"\n") % num_points != 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        alone, killed = Path(name) / "alone", Path(name) / "killed"
        subprocess.run(command(alone, args.limit), check=True, capture_output=True)
        expected = (alone / "rows.jsonl").read_bytes()
        num_torn = 0
        for target in sorted(draw.randrange(len(expected)) for _ in range(args.kills)):
            num_torn += kill_once(killed, args.limit, target)
            print(f"killed at {target:,} of {len(expected):,} bytes", file=sys.stderr)
        subprocess.run(command(killed, args.limit), check=True, capture_output=True)
        found = (killed / "rows.jsonl").read_bytes()
    rows = [json.loads(line) for line in found.splitlines()]
    row = Row(
        kills=args.kills,
        num_torn=num_torn,
        num_rows=len(rows),
        num_twice=len(rows) - len({(row["id"], row["rule"], row["alpha"]) for row in rows}),
        same_rows=found == expected,
        versions=versions(),
        date=time.strftime("%Y-%m-%d"),
    )
    with args.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(row)) + "\n")
    print(f"{row.kills} kills ({row.num_torn} tore a row or an example), {row.num_rows:,} rows, {row.num_twice} twice,")
    print(f"  {'the same' if row.same_rows else 'OTHERS than those'} as left alone")


if __name__ == "__main__":
    main()
