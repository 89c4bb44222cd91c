"""Kill `patch apply` at random moments: what is left under the output's name is whole, or nothing.

    python benchmarks/patch_kill.py MODEL PATCH [--kills 50]

A fresh process adds PATCH to MODEL and gets SIGKILL after a random time, from the start of its work to a fifth beyond
the time that the work takes. A result that is there must have the SHA-256 of every file of an undisturbed run; where
there is none, a second run must succeed and have them. One JSON row is appended to
benchmarks/results/patch_kill.jsonl; the exit code is 1 if any result was damaged.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ensembler.patch.apply import apply_patches
from ensembler.patch.formats import read_patch

RESULTS = Path(__file__).parent / "results" / "patch_kill.jsonl"
CHILD = (
    "import sys; from pathlib import Path; from ensembler.patch.apply import apply_patches; "
    "from ensembler.patch.formats import read_patch; print('ready', flush=True); "
    "apply_patches([read_patch(Path(sys.argv[1]))], Path(sys.argv[2]), Path(sys.argv[3]))"
)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the card, which holds the folder's own name."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "README.md")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("patch", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    rng = random.Random(0)
    whole = absent = damaged = leftovers = 0
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "out"
        start = time.perf_counter()
        apply_patches([read_patch(args.patch)], args.model, out)
        seconds = time.perf_counter() - start
        expected = hashes(out)
        for _ in range(args.kills):
            shutil.rmtree(out, ignore_errors=True)
            command = [sys.executable, "-c", CHILD, str(args.patch), str(args.model), str(out)]
            with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
                assert process.stdout is not None
                process.stdout.readline()
                time.sleep(rng.uniform(0, 1.2 * seconds))
                process.send_signal(signal.SIGKILL)
            if out.exists():
                whole += 1
            else:
                absent += 1
                apply_patches([read_patch(args.patch)], args.model, out)
            damaged += hashes(out) != expected
            for partial in Path(place).glob(".out.*"):
                leftovers += 1
                damaged += (partial / "made" / "config.json").exists() and hashes(partial / "made") != expected
                shutil.rmtree(partial)
    row = {
        "model": args.model.name,
        "kills": args.kills,
        "whole": whole,
        "absent": absent,
        "damaged": damaged,
        "hidden_leftovers": leftovers,
        "seconds_undisturbed": round(seconds, 3),
        "date": time.strftime("%Y-%m-%d"),
    }
    with args.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=2))
    sys.exit(1 if damaged else 0)


if __name__ == "__main__":
    main()
