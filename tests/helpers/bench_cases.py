"""Cases for the tests of benchmarks: tiny models in every role, recipes for them, and a benchmark that was run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from helpers.scoring_cases import save_models
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from ensembler.evaluation.benchmark import Bench
from ensembler.evaluation.costs import measure_costs, plan_measurements
from ensembler.evaluation.figures import MethodFigure, TaskFigures
from ensembler.evaluation.recipe_file import read_recipe
from ensembler.evaluation.runner import Runner
from ensembler.evaluation.store import Store
from ensembler.evaluation.summary import summarise

ALL = ("source_ft", "source_pt", "target_pt", "base-change", "eft", "patch", "patch+base-change", "direct")


def save_bench_models(folder: Path, **more: Any) -> dict[str, Any]:
    """Models of one shape in the roles of a recipe; source FT is a LoRA of source PT, and that LoRA the patch."""
    settings = {"family": "llama", "num_layers": 1, **more}
    save_models(folder, source_pt=settings, target_pt=settings, direct=settings)
    save_patch(folder / "source_pt", folder / "patch")
    return {
        "source_ft": {"model": str(folder / "source_pt"), "adapter": str(folder / "patch")},
        "source_pt": str(folder / "source_pt"),
        "target_pt": str(folder / "target_pt"),
        "patch": str(folder / "patch"),
        "direct": str(folder / "direct"),
    }


def save_patch(base: Path, out: Path, seed: int = 0) -> Path:
    """A random LoRA of a model."""
    torch.manual_seed(seed)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(out)
    return out


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
    tasks: list[TaskFigures]
    reported: dict[str, str]

    def method(self, name: str, task: int = 0) -> MethodFigure:
        return self.tasks[task].method(name)


def run_bench(path: Path, out: Path, *, costs: bool = False) -> Ran:
    """Run the recipe at `path` into `out`."""
    bench = Bench(read_recipe(path))
    reported: dict[str, str] = {}
    with Store(out, bench.settings) as store:
        store.begin("ensembler bench")
        runner = Runner(store)
        runner.run_studies(bench.studies, lambda num: None, reported.__setitem__)
        if costs:
            measure_costs(plan_measurements(bench.studies, store), store, lambda num: None)
        return Ran(bench, summarise(bench.studies, store, runner.errors(bench.studies)), reported)
