"""Kill a sweep at random moments, go on with it, and compare its rows with those of a sweep that was left alone.

    python benchmarks/sweep_kill.py [--kills 20] [--limit 100]

The sweep is of the embedded family on its own task, both rules. Each kill (SIGKILL) comes when results.sqlite has
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
from ensembler.evaluation.results_export import lines
from ensembler.evaluation.results_file import FILE, open_results

RESULTS = Path(__file__).parent / "results" / "sweep_kill.jsonl"


@dataclass(frozen=True)
class Row:
    """One run. `num_torn`: kills in the middle of a transaction; `same_rows`: all documents, points and answers."""

    kills: int
    num_torn: int
    num_rows: int
    num_twice: int
    same_rows: bool
    versions: dict[str, str]
    date: str


def command(out: Path, limit: int) -> list[str]:
    flags = ["--rule", "base-change,eft", "--validation", "validation", "--limit", str(limit), "--batch-size", "2"]
    return [sys.executable, "-m", "ensembler", "sweep", "demo", *flags, "--output", str(out)]


def kill_once(out: Path, limit: int, target: int) -> bool:
    """Start the sweep, kill it when its file reaches `target` bytes; return whether a transaction was under way."""
    process = subprocess.Popen(command(out, limit), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    file = out / FILE
    while process.poll() is None and (file.stat().st_size if file.exists() else 0) < target:
        time.sleep(0.001)
    process.kill()
    process.wait()
    return Path(f"{file}-journal").exists()


def rows_of(out: Path) -> list[str]:
    """Each document and point as a line of JSON, in the order of their names."""
    with open_results(out) as results:
        return sorted(lines(results, "rows"))


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
        expected, size = rows_of(alone), (alone / FILE).stat().st_size
        num_torn = 0
        for target in sorted(draw.randrange(size) for _ in range(args.kills)):
            num_torn += kill_once(killed, args.limit, target)
            print(f"killed at {target:,} of {size:,} bytes", file=sys.stderr)
        subprocess.run(command(killed, args.limit), check=True, capture_output=True)
        found = rows_of(killed)
    names = [(row["document"], row["rule"], row["alpha"]) for row in map(json.loads, found)]
    row = Row(
        kills=args.kills,
        num_torn=num_torn,
        num_rows=len(found),
        num_twice=len(names) - len(set(names)),
        same_rows=found == expected,
        versions=versions(),
        date=time.strftime("%Y-%m-%d"),
    )
    with args.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(row)) + "\n")
    print(f"{row.kills} kills ({row.num_torn} of them in a transaction), {row.num_rows:,} rows, {row.num_twice} twice,")
    print(f"  {'the same' if row.same_rows else 'OTHERS than those'} as left alone")


if __name__ == "__main__":
    main()
