"""A benchmark as a YAML file: models by role, tasks, methods, seeds, and published figures to set beside."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from ensembler.config import MemberConfig
from ensembler.decoding.points import parse_alphas
from ensembler.errors import ConfigError

METHODS: Mapping[str, tuple[str, ...]] = {
    "source_ft": ("source_ft",),
    "source_pt": ("source_pt",),
    "target_pt": ("target_pt",),
    "base-change": ("source_ft", "source_pt", "target_pt"),
    "eft": ("source_ft", "source_pt", "target_pt"),
    "patch": ("target_pt", "patch"),
    "patch+base-change": ("source_ft", "source_pt", "target_pt", "patch"),
    "direct": ("direct",),
}
"""What can be compared, and the roles that each needs. `patch`: θ′ + Δθ_i (PortLLM, eq. 6); `patch+base-change`: that
as the target of base-change; `direct`: the target fine-tuned itself."""

ROLES = ("source_ft", "source_pt", "target_pt", "patch", "direct")
TUNED = ("base-change", "eft", "patch+base-change")  # methods with an α


@dataclass(frozen=True)
class Speed:
    """How speed is measured, in fresh processes by turns: `rounds` of all methods.

    In each, `num_prompts` prompts are decoded one by one for `new_tokens` tokens, and `num_examples` are scored.
    """

    rounds: int = 3
    num_prompts: int = 4
    new_tokens: int = 32
    num_examples: int = 16

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < (0 if each.name == "rounds" else 1):
                raise ConfigError(f"speed: {each.name} is {value!r}; expected a count")


@dataclass(frozen=True)
class Experiment:
    """One set of models on some tasks.

    `models`: members by role, `patch` a path. `alphas`: the grid that validation chooses from; `alpha` fixes it for a
    method. `validation`: a number of examples or a split. `published`: figures in the metric's unit of a paper by task
    and method, printed beside what was measured; its source is `source`. `speed`: how it is measured; None: not at all.
    """

    name: str
    models: Mapping[str, MemberConfig]
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    patch: str | None = None
    alphas: tuple[float, ...] = ()
    alpha: Mapping[str, float] = field(default_factory=dict)
    validation: str | None = None
    metric: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 8
    seed: int = 0
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    source: str = ""
    speed: Speed | None = None


@dataclass(frozen=True)
class Recipe:
    """A benchmark: its experiments."""

    name: str
    description: str
    experiments: tuple[Experiment, ...]


_EXPERIMENT_KEYS = (
    "name",
    "models",
    "tasks",
    "methods",
    "alphas",
    "alpha",
    "validation",
    "metric",
    "num_fewshot",
    "limit",
    "batch_size",
    "seed",
    "published",
    "source",
    "speed",
)
_KEYS = ("description", "experiments", *_EXPERIMENT_KEYS)
_DEFAULT_ALPHAS = "0.1:1.5:0.1"  # base-change at prediction, appendix B


def read_recipe(path: Path) -> Recipe:
    """Return the recipe in a YAML file; raise ConfigError for what is wrong with it.

    What stands at the top holds for all `experiments` that do not say otherwise; without any, it is the one. Relative
    paths are looked for beside the file, then in the current folder.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as a recipe: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path} is no recipe; expected a mapping with models and tasks")
    _check_keys(content, _KEYS, str(path))
    shared = {key: value for key, value in content.items() if key in _EXPERIMENT_KEYS}
    given = content.get("experiments", [{}])
    if not isinstance(given, list) or not given:
        raise ConfigError(f"{path}: experiments is {given!r}; expected a list of one or more")
    experiments = tuple(_experiment(shared, one, path, number) for number, one in enumerate(given))
    names = [experiment.name for experiment in experiments]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{path}: two experiments are called {twice!r}; give each a name of its own")
    return Recipe(str(content.get("name", path.stem)), str(content.get("description", "")), experiments)


def _experiment(shared: Mapping[str, Any], given: Any, path: Path, number: int) -> Experiment:
    where = f"{path}: experiment {number}"
    _check_keys(given, _EXPERIMENT_KEYS, where)
    content = {**shared, **given}
    for key in ("models", "alpha", "published"):
        content[key] = {**(shared.get(key) or {}), **(given.get(key) or {})}
    name = str(given.get("name", shared.get("name", path.stem)))
    _check_keys(content["models"], ROLES, f"{where}: models")
    models = {role: _member(role, value, path.parent) for role, value in content["models"].items() if role != "patch"}
    patch = content["models"].get("patch")
    if patch is not None and not isinstance(patch, str):
        raise ConfigError(f"{where}: the patch is {patch!r}; expected the path of a LoRA or of an extracted patch")
    methods = _methods(content.get("methods"), content["models"], where)
    tasks = content.get("tasks")
    if not isinstance(tasks, list) or not tasks or not all(isinstance(task, str) for task in tasks):
        raise ConfigError(f"{where}: tasks is {tasks!r}; expected a list of names or YAML files")
    _check_keys(content["alpha"], TUNED, f"{where}: alpha")
    _check_published(content["published"], where)
    validation = content.get("validation")
    experiment = Experiment(
        name=name,
        models=models,
        patch=None if patch is None else _find(patch, path.parent),
        tasks=tuple(_find(task, path.parent) for task in tasks),
        methods=methods,
        alphas=parse_alphas(str(content.get("alphas", _DEFAULT_ALPHAS))),
        alpha={method: _number(value, f"{where}: alpha of {method}") for method, value in content["alpha"].items()},
        validation=None if validation is None else str(validation),
        metric=content.get("metric"),
        num_fewshot=_count(content.get("num_fewshot"), f"{where}: num_fewshot", least=0),
        limit=_count(content.get("limit"), f"{where}: limit"),
        batch_size=_count(content.get("batch_size", 8), f"{where}: batch_size") or 8,
        seed=_count(content.get("seed", 0), f"{where}: seed", least=0) or 0,
        published=content["published"],
        source=str(content.get("source", "")),
        speed=_speed(content.get("speed", {}), f"{where}: speed"),
    )
    _check_choice(experiment, where)
    return experiment


def _check_choice(experiment: Experiment, where: str) -> None:
    """Every α must come from somewhere, and not from the examples that report it."""
    free = [method for method in experiment.methods if method in TUNED and method not in experiment.alpha]
    if free and experiment.validation is None and len(experiment.alphas) > 1:
        raise ConfigError(
            f"{where}: nothing chooses the alpha of {free[0]}; give validation (a number of examples or a split), or "
            f"alpha: {{{free[0]}: NUMBER}}"
        )


def _speed(given: Any, where: str) -> Speed | None:
    if given is False:
        return None
    _check_keys(given, [each.name for each in fields(Speed)], where)
    return Speed(**given)


def _methods(given: Any, models: Mapping[str, Any], where: str) -> tuple[str, ...]:
    if given is None:
        given = [method for method, roles in METHODS.items() if all(role in models for role in roles)]
    if not isinstance(given, list) or not given:
        raise ConfigError(f"{where}: methods is {given!r}; expected a list of {', '.join(METHODS)}")
    for method in given:
        if method not in METHODS:
            raise ConfigError(f"{where}: unknown method {method!r}{_nearest(str(method), tuple(METHODS))}")
        missing = [role for role in METHODS[method] if role not in models]
        if missing:
            raise ConfigError(
                f"{where}: {method} needs the model {missing[0]!r}; give it under models, or leave it out"
            )
    if len(set(given)) < len(given):
        raise ConfigError(f"{where}: a method is given twice; leave one out")
    return tuple(given)


def _member(role: str, value: Any, folder: Path) -> MemberConfig:
    if isinstance(value, str):
        value = {"model": value}
    if isinstance(value, Mapping):
        value = {key: _find(each, folder) if key in ("model", "adapter") else each for key, each in value.items()}
    return MemberConfig.parse(role, value)


def _find(name: Any, folder: Path) -> Any:
    """The path beside the recipe if there is such a file or folder; else the name as it is."""
    return str(folder / name) if isinstance(name, str) and (folder / name).exists() else name


def _check_published(published: Any, where: str) -> None:
    for task, figures in published.items():
        if not isinstance(figures, Mapping):
            raise ConfigError(f"{where}: published of {task} is {figures!r}; expected figures by method")
        _check_keys(figures, tuple(METHODS), f"{where}: published of {task}")
        for method, value in figures.items():
            _number(value, f"{where}: published figure of {method} on {task}")


def _check_keys(content: Any, known: Sequence[str], where: str) -> None:
    if not isinstance(content, Mapping):
        raise ConfigError(f"{where} is {content!r}; expected a mapping")
    for key in content:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}{_nearest(str(key), known)}")


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; expected one of {', '.join(known)}"


def _count(value: Any, where: str, *, least: int = 1) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{where} is {value!r}; expected a whole number from {least}")
    return value


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{where} is {value!r}; expected a number")
    return float(value)
