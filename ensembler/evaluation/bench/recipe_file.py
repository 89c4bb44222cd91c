"""A recipe as a YAML file. What is wrong with it is told in one line, before anything else is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import yaml

from ensembler.config import MemberConfig
from ensembler.errors import ConfigError
from ensembler.evaluation.bench.published import read_costs, read_figures, read_published_alphas
from ensembler.evaluation.bench.recipe import METHODS, ROLES, TUNED, Experiment, Images, Recipe, Speed
from ensembler.evaluation.bench.values import (
    check_keys,
    check_mapping,
    nearest,
    read_alphas,
    read_count,
    read_number,
    read_text,
    read_validation,
)

_EXPERIMENT_KEYS = tuple(each.name for each in fields(Experiment) if each.name != "patch")  # that is among the models
_KEYS = ("description", "experiments", *_EXPERIMENT_KEYS)
_MAPPINGS = (
    "models",
    "alpha",
    "published",
    "published_alphas",
    "published_costs",
)  # an experiment adds to those at the top
_DECIMAL = {
    "tag:yaml.org,2002:int": re.compile(r"[-+]?[0-9]+$"),
    "tag:yaml.org,2002:float": re.compile(
        r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$|[-+]?\.inf$|\.nan$"
    ),
}
_DEFAULT_ALPHAS = "0.1:1.5:0.1"  # base-change at prediction, appendix B


class _Loader(yaml.SafeLoader):  # type: ignore[misc,unused-ignore]
    """YAML without two of its surprises.

    A later key takes the place of an earlier one in silence: a figure, or a model, would be lost. And 0:1:0.1, a grid
    to us, is a number to the base of 60.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
        first: [(tag, _DECIMAL.get(tag, pattern)) for tag, pattern in resolvers]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} is there twice", node.start_mark)
        return node


def read_recipe(path: Path) -> Recipe:
    """Return the recipe in a YAML file; raise ConfigError for what is wrong with it.

    What stands at the top holds for all `experiments` that do not say otherwise; without any, it is the one. Relative
    paths are looked for beside the file, then in the current folder.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path} cannot be read as a recipe: {reason}; give a YAML file, or `demo`") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path} is no recipe; expected a mapping with models and tasks")
    check_keys(content, _KEYS, str(path))
    shared = {key: value for key, value in content.items() if key in _EXPERIMENT_KEYS}
    given = content.get("experiments", [{}])
    if not isinstance(given, list) or not given:
        raise ConfigError(f"{path}: experiments is {given!r}; expected a list of one or more")
    experiments = tuple(_experiment(shared, one, path, number) for number, one in enumerate(given, start=1))
    names = [experiment.name for experiment in experiments]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{path}: two experiments are called {twice!r}; give each a name of its own")
    return Recipe(
        read_text(content.get("name", path.stem), f"{path}: name"),
        str(content.get("description", "")),
        experiments,
    )


def _speed(given: Any, where: str) -> Speed | None:
    if given is False:
        return None
    check_keys(given, [each.name for each in fields(Speed)], f"{where}: speed")
    try:
        return Speed(**given)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _images(given: Any, folder: Path, where: str) -> Images | None:
    if given is None:
        return None
    check_keys(given, [each.name for each in fields(Images)], f"{where}: images")
    return Images(**{key: _find(read_text(value, f"{where}: {key}"), folder) for key, value in given.items()})


def _experiment(shared: Mapping[str, Any], given: Any, path: Path, number: int) -> Experiment:
    check_keys(given, _EXPERIMENT_KEYS, f"{path}: experiment {number}")
    name = read_text(given.get("name", shared.get("name", path.stem)), f"{path}: name of experiment {number}")
    where = f"{path}: experiment {name}"
    content = {**shared, **given}
    for key in _MAPPINGS:
        content[key] = {**_mapping(shared, key, str(path)), **_mapping(given, key, where)}
    models, patch = _models(content["models"], path.parent, where)
    methods = _methods(content.get("methods"), content["models"], where)
    check_keys(content["alpha"], TUNED, f"{where}: alpha", "method")
    experiment = Experiment(
        name=name,
        models=models,
        patch=patch,
        tasks=_tasks(content.get("tasks"), path.parent, where),
        methods=methods,
        alphas=read_alphas(content.get("alphas", _DEFAULT_ALPHAS), where),
        alpha={method: read_number(value, f"{where}: alpha of {method}") for method, value in content["alpha"].items()},
        published=read_figures(content["published"], methods, where),
        published_alphas=read_published_alphas(content["published_alphas"], methods, where),
        published_costs=read_costs(content["published_costs"], methods, where),
        images=_images(content.get("images"), path.parent, where),
        speed=_speed(content.get("speed", False if "images" in content else {}), where),
        **_settings(content, where),
    )
    _check_choice(experiment, where)
    return experiment


def _mapping(content: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    found = content.get(key, {})
    check_mapping(found, f"{where}: {key}")
    return dict(found)


def _models(given: Mapping[str, Any], folder: Path, where: str) -> tuple[dict[str, MemberConfig], str | None]:
    check_keys(given, ROLES, f"{where}: models", "role")
    if not given:
        raise ConfigError(f"{where} has no models; give them by role: {', '.join(ROLES)}")
    patch = given.get("patch")
    if "patch" in given and not isinstance(patch, str):
        raise ConfigError(f"{where}: the patch is {patch!r}; expected the path of a LoRA or of an extracted patch")
    members = {role: _member(role, value, folder, where) for role, value in given.items() if role != "patch"}
    return members, None if patch is None else _find(patch, folder)


def _member(role: str, value: Any, folder: Path, where: str) -> MemberConfig:
    if isinstance(value, str):
        value = {"model": value}
    if isinstance(value, Mapping):
        value = {
            key: _find(each, folder) if key in ("model", "adapter", "head") else each for key, each in value.items()
        }
    try:
        return MemberConfig.parse(role, value)
    except ConfigError as error:
        raise ConfigError(f"{where}: models: {role}: {error}") from error


def _find(name: Any, folder: Path) -> Any:
    """The path beside the recipe if there is such a file or folder; else the name as it is, ~ being one's home."""
    if not isinstance(name, str):
        return name
    return str(folder / name) if (folder / name).exists() else str(Path(name).expanduser()) if name[:1] == "~" else name


def _methods(given: Any, models: Mapping[str, Any], where: str) -> tuple[str, ...]:
    if given is None:
        given = [method for method, roles in METHODS.items() if all(role in models for role in roles)]
        if not given:
            raise ConfigError(f"{where}: no method can do with the models {', '.join(models)} alone; give others too")
    if not isinstance(given, list) or not given:
        raise ConfigError(f"{where}: methods is {given!r}; expected a list of {', '.join(METHODS)}")
    for method in given:
        if method not in tuple(METHODS):
            raise ConfigError(f"{where}: unknown method {method!r}{nearest(str(method), tuple(METHODS))}")
        missing = [role for role in METHODS[method] if role not in models]
        if missing:
            raise ConfigError(
                f"{where}: {method} needs the model {missing[0]!r}; give it under models, or leave it out"
            )
    if len(set(given)) < len(given):
        raise ConfigError(f"{where}: a method is given twice; leave one out")
    return tuple(given)


def _tasks(given: Any, folder: Path, where: str) -> tuple[str, ...]:
    if not isinstance(given, list) or not given or not all(isinstance(task, str) for task in given):
        raise ConfigError(f"{where}: tasks is {given!r}; expected a list of names or YAML files")
    return tuple(_find(task, folder) for task in given)


def _settings(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What an experiment may leave out; an empty value is one that is left out."""
    given = {key: value for key, value in content.items() if value is not None}
    found: dict[str, Any] = {
        key: read_text(given[key], f"{where}: {key}") for key in ("metric", "source") if key in given
    }
    for key, least in (("num_fewshot", 0), ("limit", 1), ("batch_size", 1), ("seed", 0)):
        if key in given:
            found[key] = read_count(given[key], f"{where}: {key}", least=least)
    if "validation" in given:
        found["validation"] = read_validation(given["validation"], f"{where}: validation")
    return found


def _check_choice(experiment: Experiment, where: str) -> None:
    """Every α must come from somewhere, and not from the examples that report it; images are not timed."""
    if experiment.images is not None and experiment.speed is not None:
        raise ConfigError(f"{where}: speed is measured of texts alone; leave it out, or write speed: false")
    free = [method for method in experiment.methods if method in TUNED and method not in experiment.alpha]
    if free and not experiment.alphas:
        raise ConfigError(f"{where}: alphas is empty; expected FIRST:LAST:STEP or a list of numbers")
    if free and experiment.validation is None and len(experiment.alphas) > 1:
        raise ConfigError(
            f"{where}: nothing chooses the alpha of {free[0]}; give validation (a number of examples or a split), or "
            f"alpha: {{{free[0]}: NUMBER}}"
        )
