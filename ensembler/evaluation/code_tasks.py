"""Code tasks in the form of HumanEval: programs that a model wrote are run in a sandbox, and pass@k is told.

A YAML task of one's own names these functions: ``metric: !function ensembler.evaluation.code_tasks.pass_at_k`` and
``filter_fn: !function ensembler.evaluation.code_tasks.build_programs``. lm-eval's own functions for HumanEval run the
code without limits, the first of it when they are imported; `read_code_task` puts these in their place.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ensembler.errors import ConfigError
from ensembler.evaluation.sandbox import check_sandbox, run_program
from ensembler.extras import require

_FENCE = "```"


def pass_at_k(
    references: Sequence[str], predictions: Sequence[Sequence[str]], k: int | Sequence[int]
) -> dict[str, float]:
    """Return pass@k of one problem by k: the probability that one of k samples passes its tests, from n ≥ k samples.

    `references`: one text of tests; `predictions`: one list of n programs. 1 − C(n−c, k) / C(n, k) where c of n pass:
    the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374), section 2.1. Equal programs are run once. Raises
    RunError where no program can be run.
    """
    programs = [f"{program}\n{references[0]}" for program in predictions[0]]
    num_right = sum(map(_run_all(programs).__getitem__, programs))
    return {f"pass@{each}": estimate(len(programs), num_right, each) for each in ([k] if isinstance(k, int) else k)}


def estimate(num_samples: int, num_right: int, k: int) -> float:
    """Return 1 − C(n−c, k) / C(n, k), the probability that k of n samples hold one of the c right ones."""
    if k > num_samples:
        raise ConfigError(f"pass@{k} needs {k} samples or more; {num_samples} were made: raise the task's 'repeats'")
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def _run_all(programs: Sequence[str]) -> dict[str, bool]:
    distinct = list(dict.fromkeys(programs))
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        return {
            program: outcome.passed for program, outcome in zip(distinct, pool.map(run_program, distinct), strict=True)
        }


def build_programs(resps: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return each document's prompt followed by each of its samples: a filter of lm-eval's."""
    return [[doc["prompt"] + text for text in texts] for texts, doc in zip(resps, docs, strict=True)]


def build_programs_from_chat(resps: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the same, each sample cut where its code block ends."""
    return build_programs([[text.split(_FENCE)[0] for text in texts] for texts in resps], docs)


_OURS = {
    "pass_at_k": pass_at_k,
    "build_predictions": build_programs,
    "build_predictions_instruct": build_programs_from_chat,
}


def is_code_task(settings: Mapping[str, Any]) -> bool:
    """Whether a YAML task says that it runs code which a model wrote."""
    return bool(settings.get("unsafe_code"))


def read_code_task(settings: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return a task's settings with its functions, `settings` having them as paths (`load_yaml(resolve_func=False)`).

    lm-eval's functions of HumanEval become those of this module; a task that names others of lm-eval's, which run code
    without limits, raises ConfigError.
    """
    theirs = str(Path(str(require("lm_eval.tasks", "eval").__file__)).parent)
    loader = require("lm_eval.tasks._yaml_loader", "eval")

    def resolve(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: resolve(each) for key, each in value.items()}
        if isinstance(value, list):
            return [resolve(each) for each in value]
        if not isinstance(value, str) or not value.startswith(os.sep):
            return value
        folder, _, name = value.rpartition(os.sep)
        if folder == os.path.join(theirs, "humaneval") and (ours := _OURS.get(name.rpartition(".")[2])):
            return ours
        if folder.startswith(theirs):
            raise ConfigError(
                f"{path}: {name} of lm-eval runs code without limits; code tasks are those in the form of HumanEval"
            )
        return loader._import_func_in_yml(name, Path(folder)) if _is_function(Path(folder), name) else value

    return {key: resolve(value) for key, value in settings.items()}


def _is_function(folder: Path, name: str) -> bool:
    return name.startswith("ensembler.") or (folder / f"{name.rpartition('.')[0].replace('.', '/')}.py").is_file()


def check_code_task(task: Any) -> None:
    """Make ready a task of lm-eval's that runs code: its metrics by k, enough samples, a sandbox that works.

    Raises ConfigError, or RunError where this machine cannot run programs within limits.
    """
    functions = list(task._metric_fn_list.values())
    if not any(getattr(function, "__self__", function) is pass_at_k for function in functions):
        raise ConfigError(
            f"task {task.task_name} runs code by a metric of its own, without limits; use "
            "'metric: !function ensembler.evaluation.code_tasks.pass_at_k' in its YAML file"
        )
    check_sandbox()
    ks = task._metric_fn_kwargs["pass_at_k"]["k"]
    for k in [ks] if isinstance(ks, int) else ks:
        estimate(task.config.repeats, 0, k)
        for known in (task._aggregation_list, task._higher_is_better):
            known[f"pass@{k}"] = known["pass_at_k"]
    for known in (task._aggregation_list, task._higher_is_better):
        del known["pass_at_k"]
