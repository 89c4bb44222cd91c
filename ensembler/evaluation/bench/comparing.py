"""Two benchmarks side by side, from their folders alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensembler.errors import OutputError
from ensembler.evaluation.bench.report import SUMMARY


@dataclass(frozen=True)
class Side:
    """A method's figure in one folder: metric, 95 % interval, α, tokens/s; None where the folder has none."""

    estimate: float | None
    low: float | None
    high: float | None
    alpha: float | None
    tokens_per_second: float | None


@dataclass(frozen=True)
class Pair:
    """One method of one task in two folders; `same_examples`: both were tested on the same documents."""

    experiment: str
    task: str
    metric: str
    method: str
    a: Side | None
    b: Side | None
    same_examples: bool


def compare_folders(a: Path, b: Path) -> list[Pair]:
    """Return every method of every task that either folder has. Raises OutputError for a folder without a summary."""
    one, other = _read(a), _read(b)
    found = []
    for key in dict.fromkeys((*one, *other)):
        left, right = one.get(key), other.get(key)
        like: Mapping[str, Any] = left or right or {}
        same = left is not None and right is not None and left["tests"] == right["tests"]
        found.append(Pair(*key[:2], like["metric"], key[2], _side(left), _side(right), same))
    return found


def _read(folder: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    path = folder / SUMMARY
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        found = {}
        for task in summary["tasks"]:
            for method in task["methods"]:
                key = (task["experiment"], task["task"], method["method"])
                found[key] = {"metric": task["metric"], "tests": task["tests"], "method": method}
        return found
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise OutputError(f"{path} is no summary of a benchmark; give two folders of `ensembler bench`") from error


def _side(found: Mapping[str, Any] | None) -> Side | None:
    if found is None:
        return None
    method, test = found["method"], found["method"]["test"] or {}
    speed = method["cost"].get("tokens_per_second") or {}
    return Side(test.get("estimate"), test.get("low"), test.get("high"), method["alpha"], speed.get("median"))
