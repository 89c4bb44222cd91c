"""Check and measure kernels and engine on a GPU without a network: python benchmarks/gpu.py [--sections kernels,table].

kernels: the cases of the tests on the device. table: times over the floor, goals. tune: candidates of the launch
table (block, warps, splits). engine: what a token of whole ensembles takes. text: the same with a target of another
tokenizer. patch_apply, patch_extract: patches on the device, on the CPU, and a plain copy. vllm: tokens per second of
ensembles in vLLM, skipped where it is not installed. Build the CUDA kernels first
(kernels/ensembler_kernels/cuda/build.py): else they are skipped. It needs torch, Triton, pytest and hypothesis, for
`engine`, `text` and the patches also what the package requires, and installs nothing. Every section appends its rows
to OUT/SECTION.jsonl as they are made, and prints its table at the end. On a CPU it runs with --device cpu --small.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))

import gpu_engine
import gpu_patch
import gpu_table
import gpu_text
import gpu_tune
import gpu_vllm
from gpu_options import Options, Row, table
from kernel_timing import device_name

ROOT = Path(__file__).resolve().parent.parent
CASES = ROOT / "tests" / "helpers" / "gpu_cases.py"
FEW_CASES = "equal_logits or alpha_zero"


def kernels(options: Options) -> Iterator[Row]:
    """Run the cases of the kernels on the device, each implementation's counted apart.

    They have half of the time that is left, or all of it if nothing follows.
    """
    if not options.has_time("kernels"):
        return
    limit = options.seconds_left / (1 if options.sections[-1] == "kernels" else 2)
    found = _Cases()
    command = [sys.executable, "-u", "-m", "pytest", "-v", "--noconftest", "-p", "no:cacheprovider", "-o", "addopts="]
    command += [str(CASES), *(["-k", FEW_CASES] if options.small else [])]
    paths = os.pathsep.join(filter(None, [str(ROOT / "kernels"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "ENSEMBLER_TEST_DEVICE": str(options.device), "PYTHONPATH": paths}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    timer = threading.Timer(limit, process.kill)
    timer.start()
    assert process.stdout is not None
    for line in process.stdout:
        found.read(line)
    code, is_over = process.wait(), not timer.is_alive()
    timer.cancel()
    if is_over:
        options.left_out.append(
            f"kernels: {found.collected - found.done} of {found.collected} cases after {limit:.0f} s"
        )
    elif code not in (0, 1) or not found.done:
        print(*found.lines, sep="", end="")
        yield Row("kernels", {"error": f"pytest ended with {code}"}, {"note": found.lines[-1].strip()[:100]})
    elif code:
        print(*found.lines, sep="", end="")
    yield from found.rows()


class _Cases:
    """Results of cases, read from pytest's lines."""

    def __init__(self) -> None:
        self.collected, self.lines = 0, [""]
        self.counts: dict[str, Counter[str]] = {}
        self.seconds: Counter[str] = Counter()
        self.failures: dict[str, list[str]] = {}
        self._then = time.monotonic()

    @property
    def done(self) -> int:
        return sum(counts.total() for counts in self.counts.values())

    def read(self, line: str) -> None:
        self.lines.append(line)
        if collected := re.match(r"collect(?:ed|ing).*?(\d+) items?(?:.* (\d+) selected)?", line):
            self.collected = int(collected[2] or collected[1])
        if not (result := re.match(r"\S+?::(.+) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", line)):
            return
        impl = next((impl for impl in ("triton", "cuda") if impl in result[1].lower()), "other")
        outcome = {"ERROR": "failed", "XPASS": "failed", "XFAIL": "skipped"}.get(result[2], result[2].lower())
        self.counts.setdefault(impl, Counter())[outcome] += 1
        if outcome == "failed":
            self.failures.setdefault(impl, []).append(result[1])
        now = time.monotonic()
        self.seconds[impl] += now - self._then
        self._then = now
        if self.done % 20 == 0:
            print(f"kernels: {self.done} of {self.collected} cases", flush=True)

    def rows(self) -> Iterator[Row]:
        for impl, counts in self.counts.items():
            numbers = {outcome: counts[outcome] for outcome in ("passed", "failed", "skipped")}
            seconds = round(self.seconds[impl], 2)
            fields = {"impl": impl, **numbers, "seconds": seconds}
            if impl in self.failures:
                fields |= {"error": f"{counts['failed']} cases failed", "failures": self.failures[impl]}
            cells = {name: str(number) for name, number in numbers.items()} | {"seconds": f"{seconds:.0f}"}
            yield Row(f"kernels, {impl}", fields, cells)


SECTIONS: dict[str, Callable[[Options], Iterator[Row]]] = {
    "kernels": kernels,
    "table": gpu_table.table,
    "tune": gpu_tune.tune,
    "engine": gpu_engine.engine,
    "text": gpu_text.text,
    "patch_apply": gpu_patch.patch_apply,
    "patch_extract": gpu_patch.patch_extract,
    "vllm": gpu_vllm.vllm,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS), help="some of %(default)s")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="cuda:1, or cpu with --small")
    parser.add_argument("--small", action="store_true", help="tiny shapes: whether it runs, not how fast")
    parser.add_argument("--minutes", type=float, default=8, help="start nothing after these (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu", help="folder for the rows")
    given = parser.parse_args()
    sections = given.sections.split(",")
    if unknown := [name for name in sections if name not in SECTIONS]:
        parser.error(f"--sections: expected some of {', '.join(SECTIONS)}, got {', '.join(unknown)}")
    if given.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here; --device cpu --small runs without one")
    if given.device.type == "cpu":
        if not given.small:
            parser.error("--device cpu: expected --small with it, as Triton's kernels are interpreted there")
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
        torch.set_num_threads(1)  # tiny shapes: more threads only wait for each other
    options = Options(given.device, given.small, time.monotonic() + 60 * given.minutes, sections)
    sys.exit(run(options, given.out, f"{given.minutes:g} minutes"))


def run(options: Options, out: Path, limit: str) -> int:
    """Run the sections, write their rows and print the tables; return the exit code."""
    out.mkdir(parents=True, exist_ok=True)
    where, made, failed = provenance(options.device), [], []
    print(*(f"{name} {value}" for name, value in where.items()), sep=", ", flush=True)
    for section in options.sections:
        rows: list[Row] = []
        with torch.inference_mode(), (out / f"{section}.jsonl").open("a", encoding="utf-8") as file:
            for row in _rows(section, options):
                when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
                file.write(
                    json.dumps({"case": row.case, "small": options.small, **row.fields, **where, "time": when}) + "\n"
                )
                file.flush()
                print(f"{section}: {row.case}: {', '.join(f'{k} {v}' for k, v in row.cells.items())}", flush=True)
                rows.append(row)
                failed += [f"{section}: {row.case}: {row.fields['error']}"] if "error" in row.fields else []
        made.append(rows)
    for rows in made:
        print("", *table(rows), sep="\n")
    if any("*" in cell for rows in made for row in rows for cell in row.cells.values()):
        print("\n* the device waited for the host: its time is that of the host, too")
    if options.left_out:
        print(f"\nLeft out, as the {limit} were used:", *options.left_out, sep="\n  ")
    if failed:
        print("\nFailed:", *failed, sep="\n  ")
    return 1 if failed else 0


def _rows(section: str, options: Options) -> Iterator[Row]:
    """Yield the rows of a section, and its error if it ends with one: the next may still be measured."""
    try:
        yield from SECTIONS[section](options)
    except Exception as error:  # whatever it is, the other sections are still wanted
        traceback.print_exc()
        yield Row(section, {"error": repr(error)}, {"note": repr(error)[:100]})


def provenance(device: torch.device) -> dict[str, object]:
    """Return where rows are made: the device, versions, and the commit if there is one."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "device": device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda,
        "commit": commit.stdout.strip() or None,
    }


if __name__ == "__main__":
    main()
