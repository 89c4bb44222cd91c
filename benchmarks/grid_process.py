"""Measure a grid of α over one as a whole process: imports, tasks, members, answers, metrics and report.

    python benchmarks/grid_process.py score MODEL TRIO DATA [--rows 400] [--repeats 3]
    python benchmarks/grid_process.py generate [--rows 1319] [--repeats 3]

score: 16 α of base-change on lm-eval's sst2 prompt, the members being SmolLM2-135M-Instruct (MODEL) and what
examples/make_smollm2_trio.py made of it (TRIO); DATA has sst2/dev.jsonl. generate: 16 α of base-change and of EFT on
the sums of the embedded family. Three commands are timed by turns: the sweep over the grid, the sweep of one α (which
has the members beside it, as every sweep does), and lm-eval's own command line at that α with the model `ensembler`.
Ratios are of one turn. One JSON row is appended to benchmarks/results/grid_process.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from measuring import RESULTS, Measured, spread

from ensembler.demo import demo_folder

OUT = RESULTS / "grid_process.jsonl"
GRID, ONE = "0:1.5:0.1", "1"
ENSEMBLER = [sys.executable, "-m", "ensembler"]
FAMILY = demo_folder() / "data"
SUMS = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [], max_gen_toks: 16, do_sample: false}
filter_list:
  - name: answer
    filter: [{function: regex, regex_pattern: "so (\\\\d+)\\\\.", group_select: 0}, {function: take_first}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
REVIEWS = """
task: reviews
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{sentence}}\\nQuestion: Is this sentence positive or negative?\\nAnswer:"
doc_to_target: "{{label}}"
doc_to_choice: ["negative", "positive"]
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@dataclass(frozen=True, kw_only=True)
class Row(Measured):
    """One run. Ratios are of the grid over one α: median, smallest and largest of the turns."""

    case: str
    num_rows: int
    num_points: int
    batch_size: int
    repeats: int
    grid_seconds: float
    one_seconds: float
    lm_eval_seconds: float
    over_one: float
    over_one_spread: tuple[float, float]
    over_lm_eval: float
    over_lm_eval_spread: tuple[float, float]


def write_task(folder: Path, text: str, rows: Sequence[str]) -> Path:
    (folder / "rows.jsonl").write_text("".join(f"{row}\n" for row in rows), "utf-8")
    task = folder / "task.yaml"
    task.write_text(text, "utf-8")
    return task


def seconds(command: Sequence[str], folder: Path) -> float:
    begun = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, cwd=folder)
    return time.perf_counter() - begun


def prepare(args: argparse.Namespace, folder: Path) -> tuple[str, str, Path, int]:
    """Return the ensemble, the rules, the task and its number of rows."""
    if args.case == "generate":
        files = [(FAMILY / f"{name}.jsonl").read_text("utf-8") for name in ("test", "validation")]
        lines = "".join(files).splitlines()[: args.rows]
        return "demo", "base-change,eft", write_task(folder, SUMS, lines), len(lines)
    lines = (args.data / "sst2" / "dev.jsonl").read_text("utf-8").splitlines()[: args.rows]
    ensemble = folder / "trio"
    members = ["--source-pt", args.model.absolute(), "--source-ft-adapter", args.trio.absolute() / "source_ft"]
    members += ["--target-pt", args.trio.absolute() / "target_pt"]
    subprocess.run([*ENSEMBLER, "create", str(ensemble), *map(str, members)], check=True, capture_output=True)
    return str(ensemble), "base-change", write_task(folder, REVIEWS, lines), len(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=["score", "generate"])
    for name in ("model", "trio", "data"):
        parser.add_argument(name, type=Path, nargs="?")
    parser.add_argument("--rows", type=int, default=None)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=OUT)
    args = parser.parse_args()
    args.rows = args.rows or {"score": 400, "generate": 1319}[args.case]
    if args.case == "score" and args.data is None:
        sys.exit("score needs MODEL, TRIO and DATA; see --help")
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ensemble, rules, task, num_rows = prepare(args, folder)
        size = ["--batch-size", str(args.batch_size)]
        number = itertools.count()

        def sweep(alphas: str) -> list[str]:
            which = rules if alphas == GRID else "base-change"
            grid = ["--rule", which, "--alpha", alphas, "--output", str(folder / f"sweep{next(number)}")]
            return [*ENSEMBLER, "sweep", ensemble, "--task", str(task), *grid, *size]

        lm_eval = [*ENSEMBLER, "lm-eval", "run", "--model", "ensembler", "--tasks", str(task), "--device", "cpu"]
        lm_eval += ["--model_args", f"pretrained={ensemble},alpha={ONE}", "--batch_size", str(args.batch_size)]
        for repeat in range(args.repeats):
            commands = {"grid": sweep(GRID), "one": sweep(ONE), "lm-eval": lm_eval}
            order = sorted(commands, reverse=bool(repeat % 2))
            took = {kind: seconds(commands[kind], folder) for kind in order}
            found.append(took)
            print(", ".join(f"{kind} {value:.1f} s" for kind, value in took.items()), file=sys.stderr, flush=True)
    over = {kind: [took["grid"] / took[kind] for took in found] for kind in ("one", "lm-eval")}
    row = Row(
        case=args.case,
        num_rows=num_rows,
        num_points=16 * (rules.count(",") + 1),
        batch_size=args.batch_size,
        repeats=args.repeats,
        grid_seconds=round(statistics.median(took["grid"] for took in found), 2),
        one_seconds=round(statistics.median(took["one"] for took in found), 2),
        lm_eval_seconds=round(statistics.median(took["lm-eval"] for took in found), 2),
        over_one=round(statistics.median(over["one"]), 3),
        over_one_spread=spread(over["one"]),
        over_lm_eval=round(statistics.median(over["lm-eval"]), 3),
        over_lm_eval_spread=spread(over["lm-eval"]),
    )
    row.append(args.results)
    print(json.dumps(vars(row)))


if __name__ == "__main__":
    main()
