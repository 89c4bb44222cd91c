"""Cases for the tests of benchmarks: tiny models in every role, recipes for them, and a benchmark that was run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from peft import LoraConfig, get_peft_model
from scoring_cases import save_models
from transformers import AutoModelForCausalLM

from ensembler.evaluation.bench.bench import Bench
from ensembler.evaluation.bench.recipe_file import read_recipe
from ensembler.evaluation.bench.running import BenchRunner
from ensembler.evaluation.bench.summary import BenchTask, MethodSummary

ALL = ("source_ft", "source_pt", "target_pt", "base-change", "eft", "patch", "patch+base-change", "direct")


def save_bench_models(folder: Path, **more: Any) -> dict[str, Any]:
    """Models of one shape in the roles of a recipe; source FT is a LoRA of source PT, and that LoRA the patch."""
    settings = {"family": "llama", "num_layers": 1, **more}
    save_models(folder, source_pt=settings, target_pt=settings, direct=settings)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    base = AutoModelForCausalLM.from_pretrained(folder / "source_pt")
    get_peft_model(base, lora).save_pretrained(folder / "patch")
    return {
        "source_ft": {"model": str(folder / "source_pt"), "adapter": str(folder / "patch")},
        "source_pt": str(folder / "source_pt"),
        "target_pt": str(folder / "target_pt"),
        "patch": str(folder / "patch"),
        "direct": str(folder / "direct"),
    }


def write_recipe(path: Path, content: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(content), sort_keys=False), "utf-8")
    return path


def recipe(models: Mapping[str, Any], task: Path, **changes: Any) -> dict[str, Any]:
    """A recipe of one experiment in which the train split chooses α and nothing is timed."""
    plain = {"models": dict(models), "tasks": [str(task)], "validation": "train", "alphas": "0.2:1:0.4", "speed": False}
    return {**plain, **changes}


@dataclass
class Ran:
    """A benchmark that was run: its figures, and what failed on the way."""

    bench: Bench
    tasks: list[BenchTask]
    reported: dict[str, str]

    def method(self, name: str, task: int = 0) -> MethodSummary:
        return next(method for method in self.tasks[task].methods if method.method == name)


def run_bench(path: Path, out: Path, *, costs: bool = False) -> Ran:
    """Run the recipe at `path` into `out`."""
    bench = Bench(read_recipe(path))
    runner = BenchRunner(bench, out, "ensembler bench")
    reported: dict[str, str] = {}
    runner.answer(lambda num: None, reported.__setitem__)
    if costs:
        runner.costs(lambda num: None)
    tasks = runner.summarise()
    assert tasks is not None
    return Ran(bench, tasks, reported)


def values_of(out: Path, run: str, split: str, rule: str, alpha: float, key: str) -> list[Any]:
    """The values of a metric at one point of a run, read from its file by the test itself."""
    rows = [json.loads(line) for line in (out / "runs" / run / "rows.jsonl").read_text("utf-8").splitlines()]
    return [
        row["values"][key] for row in rows if f"/{split}/" in row["id"] and (row["rule"], row["alpha"]) == (rule, alpha)
    ]
