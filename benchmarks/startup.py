"""Time `ensembler --help` beside an empty Python: one JSON row in benchmarks/results/startup.jsonl.

python benchmarks/startup.py [--repeats 15]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "startup.jsonl"
COMMANDS = {"help": ["-m", "ensembler", "--help"], "empty": ["-c", "pass"]}


def seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    found: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(args.repeats + 1):  # by turns; the first of each is a warm-up
        for name, arguments in COMMANDS.items():
            found[name].append(seconds(arguments))
    row: dict[str, object] = {"repeats": args.repeats, "date": time.strftime("%Y-%m-%d")}
    for name, times in found.items():
        times = times[1:]
        row[f"{name}_seconds"] = round(statistics.median(times), 3)
        row[f"{name}_spread"] = [round(min(times), 3), round(max(times), 3)]
        print(f"{name:6} {statistics.median(times):.3f} s ({min(times):.3f} to {max(times):.3f})")
    with args.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
