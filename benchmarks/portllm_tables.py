"""Print the tables of docs/results.md from the committed rows.

    python benchmarks/portllm_tables.py [FOLDER]

FOLDER: in place of the committed results those that `ensembler bench examples/recipes/smollm2.yaml` wrote there. Beside
them are inspect_TASK.json, for each task the overall part of what this prints in the folder of the models, and
../demo, the results of `ensembler bench demo`:

    ensembler patch inspect patch_TASK --to theta_1 --base theta --other direct_TASK --json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from markdown_tables import table
from rows_to_figures import RESULTS, read_figures

from ensembler.evaluation.figures import NAMES

TASKS = {"sst2": "SST-2", "mrpc": "MRPC", "wnli": "WNLI", "boolq": "BoolQ"}
RANKS = (2, 4, 8, 16, 32)
Methods = Mapping[str, Mapping[str, Any]]


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "bench" / "smollm2"
    found = read_figures("bench/smollm2", folder)
    methods = {name: {one["method"]: one for one in task["methods"]} for name, task in found.items()}
    inspected = {task: json.loads((folder / f"inspect_{task}.json").read_text("utf-8")) for task in TASKS}
    family = read_figures("bench/demo", folder.parent / "demo")
    for title, lines in (
        *((f"The embedded family, {name}", embedded(task)) for name, task in family.items()),
        ("Base-change, table 1", base_change(methods)),
        ("PortLLM, table 2", portllm_2(methods)),
        ("Compared on the same examples", compared(found)),
        ("PortLLM, table 1", portllm_1(inspected)),
        ("PortLLM, table A", portllm_a(methods)),
        ("PortLLM, table 5", portllm_5(methods)),
        ("PortLLM, table B", portllm_b(methods)),
        ("Costs", costs(methods["sst2"])),
    ):
        print(f"\n{title}\n")
        print("\n".join(lines))


def embedded(task: Mapping[str, Any]) -> Iterator[str]:
    """A task of `ensembler bench demo`."""

    def cells(method: Mapping[str, Any]) -> Iterator[str]:
        test, speed = method["test"], method["cost"]["tokens_per_second"]
        yield NAMES[method["method"]]
        yield "" if method["alpha"] is None else f"{method['alpha']:g}"
        yield f"{100 * test['estimate']:.1f} ({100 * test['low']:.1f} to {100 * test['high']:.1f})"
        yield difference(task, method["method"], "source_ft")
        yield f"{speed['median']:.3g} ({speed['low']:.3g} to {speed['high']:.3g})"
        yield f"{method['cost']['weight_bytes']['median'] / 1e6:.1f}"

    names = ["method", "α", "exact match, % (95 %)", "− source FT, points; p (Holm)", "tokens/s", "weights, MB"]
    return table(names, ([*cells(method)] for method in task["methods"]))


def base_change(methods: Mapping[str, Methods]) -> Iterator[str]:
    names = {"source_ft": "source FT", "target_pt": "target PT", "eft": "EFT", "base-change": "base-change"}
    names |= {"direct": "direct fine-tuning of the target"}
    return table(["method", *TASKS.values()], ([n, *row(methods, key)] for key, n in names.items()))


def portllm_2(methods: Mapping[str, Methods]) -> Iterator[str]:
    names = {"source_pt": "θ", "target_pt": "θ′", "source_ft": "θ_i", "direct": "θ′_i", "patch": "θ′ + Δθ_i"}
    names |= {"patch+base-change": "base-change with θ′ + Δθ_i as target"}
    return table(["model", *TASKS.values()], ([n, *row(methods, key)] for key, n in names.items()))


def compared(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    pairs = [("base-change", "source_ft"), ("eft", "source_ft"), ("patch", "source_ft"), ("patch", "target_pt")]
    pairs += [("base-change", "patch"), ("patch", "direct"), ("base-change", "direct")]
    return table(
        ["difference, points; p (Holm)", *TASKS.values()],
        ([f"{a} − {b}", *(difference(found[task], a, b) for task in TASKS)] for a, b in pairs),
    )


def portllm_1(inspected: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    terms = {
        "patched": "θ′ + Δθ_i",
        "residual": "Δθ′_i − Δθ_i",
        "patch": "Δθ_i",
        "ratio": "θ′ + Δθ_i over the residual",
    }
    for key, name in (("frobenius", "‖·‖_F"), ("sigma_max", "σ_max")):
        yield from table(
            [f"{name}, mean over matrices", *TASKS.values()],
            (
                [term, *(f"{found['overall'][f'{part}_{key}_mean']:.4g}" for found in inspected.values())]
                for part, term in terms.items()
            ),
        )
        yield ""


def portllm_a(methods: Mapping[str, Methods]) -> Iterator[str]:
    def cells(step: int) -> Iterator[str]:
        for task in ("sst2", "mrpc"):
            of = methods[task if step < 2 else f"{task}.T{step}"]
            pair = ("source_pt", "source_ft") if step == 0 else ("target_pt", "patch")
            yield from (figure(of[name]) for name in pair)

    names = ["updates T", "SST-2, θ′", "SST-2, θ′ + Δθ_i", "MRPC, θ′", "MRPC, θ′ + Δθ_i"]
    return table(names, ([str(step), *cells(step)] for step in range(4)))


def portllm_5(methods: Mapping[str, Methods]) -> Iterator[str]:
    names = {"target_pt": "φ", "patch": "φ + Δθ_i"}
    rows = ([n, *(figure(methods[f"{task}.phi"][key]) for task in TASKS)] for key, n in names.items())
    return table(["model", *TASKS.values()], rows)


def portllm_b(methods: Mapping[str, Methods]) -> Iterator[str]:
    def cells(rank: int) -> list[str]:
        of = methods["sst2" if rank == 8 else f"sst2.r{rank}"]
        return [figure(of["source_ft"]), figure(of["patch"])]

    return table(["rank", "SST-2, θ_i", "SST-2, θ′ + Δθ_i"], ([str(rank), *cells(rank)] for rank in RANKS))


def costs(methods: Methods) -> Iterator[str]:
    names = ["method", "tokens/s", "examples/s", "first token, ms", "peak memory, MB", "weights, MB", "set-up, s"]
    keys = ("tokens_per_second", "examples_per_second", "first_token_seconds", "peak_host_bytes", "weight_bytes")
    scales = (1.0, 1.0, 1e3, 1e-6, 1e-6, 1.0)

    def cells(method: Mapping[str, Any]) -> Iterator[str]:
        for key, scale in zip((*keys, "setup_seconds"), scales, strict=True):
            one = {name: scale * value for name, value in method["cost"][key].items()}
            yield f"{one['median']:.3g} ({one['low']:.3g} to {one['high']:.3g})"

    return table(names, ([name, *cells(method)] for name, method in methods.items()))


def row(methods: Mapping[str, Methods], key: str) -> list[str]:
    return [figure(methods[task][key]) for task in TASKS]


def figure(method: Mapping[str, Any]) -> str:
    test = method["test"]
    alpha = "" if method["alpha"] is None else f" [α {method['alpha']:g}]"
    f1 = method["others"].get("f1")
    more = "" if f1 is None else f", F1 {f1:.3f}"
    return f"{100 * test['estimate']:.1f} ({100 * test['low']:.1f} to {100 * test['high']:.1f}){more}{alpha}"


def difference(task: Mapping[str, Any], a: str, b: str) -> str:
    for each in task["differences"]:
        if (each["method"], each["against"]) == (a, b):
            return f"{100 * each['comparison']['difference']['estimate']:+.1f}; {each['p_holm']:.2g}"
    return ""


if __name__ == "__main__":
    main()
