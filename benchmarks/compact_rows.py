"""Keep what a benchmark's tables are made of: rows without answers and log-probs, compressed; summary, page, pictures.

    python benchmarks/compact_rows.py BENCH OUT

BENCH is what `ensembler bench` wrote, OUT the new folder: about a fortieth of the size. Every accuracy of summary.json
can be computed from the rows that are left.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
from pathlib import Path

KEPT = ("summary.json", "run.json", "rows.jsonl", "metrics.png", "report.html")
DROPPED = "log_prob"  # a number of 17 digits that no table shows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    (args.out / "runs").mkdir(parents=True)
    for name in KEPT:
        shutil.copy(args.bench / name, args.out)
    for rows in sorted(args.bench.glob("runs/*/rows.jsonl")):
        compact(rows, args.out / "runs" / f"{rows.parent.name}.rows.jsonl.gz")


def compact(rows: Path, out: Path) -> None:
    """Write the rows without their answers; equal rows give equal bytes."""
    kept = []
    for line in rows.read_text("utf-8").splitlines():
        row = json.loads(line)
        del row["answers"]
        row["values"] = {key: value for key, value in row["values"].items() if key != DROPPED}
        kept.append(json.dumps(row, ensure_ascii=False) + "\n")
    out.write_bytes(gzip.compress("".join(kept).encode(), mtime=0))


if __name__ == "__main__":
    main()
