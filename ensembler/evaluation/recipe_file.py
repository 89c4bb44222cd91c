"""A recipe as a YAML file, read and checked before anything else is; a fault is told in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ensembler.errors import ConfigError, nearest
from ensembler.evaluation.figures import ALL_METHODS
from ensembler.evaluation.recipe import Experiment, Recipe, RecipeContext
from ensembler.yaml_file import read_yaml

_MAPPINGS = ("models", "alpha", "published", "published_alphas", "published_costs")  # an experiment adds to the top's
_EXPECTED = {  # by key, else by pydantic's type of error
    "seeds": "a list of two or more mappings of models by role",
    "tasks": "a list of names or YAML files",
    "methods": f"a list of {', '.join(ALL_METHODS)}",
    "validation": "a number of examples from 1, or the name of a split",
    "apply_chat_template": "true, false or the name of a chat template",
    "gen_kwargs": "a mapping, or a text such as temperature=0.8,do_sample=true",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "greater_than_equal": "a whole number from {ge}",
    "float_type": "a number",
    "finite_number": "a number",
    "greater_than": "a number above {gt:g}",
    "string_type": "a text",
    "string_pattern_mismatch": "a text",
    "tuple_type": "a list",
    "too_short": "a list of one or more",
    "dict_type": "a mapping",
    "model_type": "a mapping",
}


def read_recipe(path: Path, kinds: Mapping[str, type[Experiment]] | None = None) -> Recipe:
    """Return the recipe in a YAML file; raise ConfigError for the first fault in it.

    An experiment with one of the keys of `kinds` is of that kind, others are of language models on texts.

    Keys at the top hold for all `experiments` that do not say otherwise; without any, it is the one. Relative paths are
    looked for beside the file, then in the current folder. A key without a value is one that is left out.
    """
    content = read_yaml(path, "as a recipe", "give a YAML file, or `demo`")
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path} is no recipe; expected a mapping with models and tasks")
    context = RecipeContext(path.parent, kinds or {})
    content = _share({"name": path.stem, **content}, context.fields)
    try:
        return Recipe.model_validate(content, context=context)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_sentence(error, content, context.fields)}") from error


def _share(content: Mapping[str, Any], fields: Mapping[str, FieldInfo]) -> dict[str, Any]:
    """Return the recipe with the keys at its top in all of its experiments; faults stay in it."""
    top = {key: value for key, value in content.items() if key in fields}
    others = {key: value for key, value in content.items() if key not in top and value is not None}
    given = others.get("experiments", [{}])
    if isinstance(given, list):
        given = [_merge(top, own) if isinstance(own, Mapping) else own for own in given]
    return {**others, "name": top["name"], "experiments": given}


def _merge(top: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    merged = {key: value for key, value in {**top, **own}.items() if value is not None}
    for key in _MAPPINGS:
        both = [given[key] for given in (top, own) if given.get(key) is not None]
        faults = [one for one in both if not isinstance(one, Mapping)]
        merged[key] = faults[0] if faults else {name: one[name] for one in both for name in one}
    return {"tasks": None, **merged}


def _sentence(error: ValidationError, content: Mapping[str, Any], fields: Mapping[str, FieldInfo]) -> str:
    """Say where the first fault is, what was given and what was expected."""
    errors = sorted(error.errors(), key=lambda each: each["type"] != "extra_forbidden")  # others may come of these
    faults = [(_keys(each["loc"], content), each) for each in errors]
    first = faults[0][0]  # of a union, the deepest fault is of the type that was meant
    keys, fault = max((each for each in faults if each[0][: len(first)] == first), key=lambda each: len(each[0]))
    if fault["type"] == "extra_forbidden":
        *keys, key = keys
        known = [*fields] if keys else ["description", "experiments", *fields]
        field = fields.get(keys[-1]) if keys else None
        for each in () if field is None else (field.annotation, *get_args(field.annotation)):
            known = [*each.model_fields] if isinstance(each, type) and issubclass(each, BaseModel) else known
        return ": ".join([*keys, f"unknown key {key!r}{nearest(key, known)}"])
    if fault["type"] == "value_error":
        return ": ".join([*keys, str(fault["ctx"]["error"])])
    kind = keys[-1] if len(keys) == 2 and keys[-1] in _EXPECTED else fault["type"]
    expected = _EXPECTED[kind].format(**fault.get("ctx", {})) if kind in _EXPECTED else fault["msg"]
    return f"{': '.join(keys)} is {fault['input']!r}; expected {expected}"


def _keys(loc: tuple[int | str, ...], content: Any) -> list[str]:
    """Return the keys of the file among those of a fault, to which pydantic adds the kinds of a union."""
    found: list[str] = []
    for key in loc[:-2] if loc[-1:] == ("[key]",) else loc:
        try:
            content = content[key]
        except (KeyError, IndexError, TypeError):
            continue
        number = key + 1 if isinstance(key, int) else 0
        if found == ["experiments"] and number:
            found = [f"experiment {content['name'] if isinstance(content, Mapping) else number}"]
        else:
            found.append(f"number {number}" if number else str(key))
    return found
