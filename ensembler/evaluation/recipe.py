"""Recipes of benchmarks: YAML files, read and checked before anything else is. A fault is told in one sentence."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    SkipValidation,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from ensembler.config import MemberConfig
from ensembler.errors import ConfigError
from ensembler.evaluation.figures import COSTS, METHODS, ROLES, TUNED
from ensembler.evaluation.lm_eval_settings import PromptSettings
from ensembler.rules import parse_alphas

_OF_TEXTS = ("num_fewshot", "apply_chat_template", "fewshot_as_multiturn", "system_instruction", "gen_kwargs")


def nearest(name: str, known: Sequence[str]) -> str:
    """Return the end of an error's sentence: the nearest of the known names, or all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; expected one of {', '.join(known)}"


def _one_of(known: Sequence[str], kind: str) -> BeforeValidator:
    def check(name: Any) -> Any:
        if name not in known:
            raise ConfigError(f"unknown {kind} {name!r}{nearest(str(name), known)}")
        return name

    return BeforeValidator(check)


def _check_distinct(values: Sequence[Any]) -> Sequence[Any]:
    for index, value in enumerate(values):
        if value in values[:index]:
            raise ConfigError(f"{value!r} is given twice; leave one out")
    return values


def _find(name: str | None, info: ValidationInfo) -> str | None:
    """Return the path in the recipe's folder (the context) if there is such a file or folder; else the name."""
    if name is None:
        return None
    beside = Path(info.context or "", name)
    return str(beside) if beside.exists() else os.path.expanduser(name)


def _read_models(given: Mapping[str, Any], info: ValidationInfo) -> dict[str, MemberConfig]:
    models = {}
    for role, member in given.items():
        if role == "patch" and not isinstance(member, str):
            raise ConfigError(f"the patch is {member!r}; expected the path of a LoRA or of an extracted patch")
        try:
            found = MemberConfig.parse(role, member)
        except ConfigError as error:
            raise ConfigError(f"{role}: {error}") from error
        paths: dict[str, Any] = {key: _find(getattr(found, key), info) for key in ("model", "adapter", "head")}
        models[role] = replace(found, **paths)
    return models


def _check_seeds(seeds: tuple[Members, ...]) -> tuple[Members, ...]:
    for number, models in enumerate(seeds, start=1):
        if not models:
            raise ConfigError(f"number {number} has no models; give them by role: {', '.join(ROLES)}")
        if models.keys() != seeds[0].keys():
            roles, expected = ", ".join(models), ", ".join(seeds[0])
            raise ConfigError(f"number {number} has the roles {roles}; expected those of number 1: {expected}")
        if models in seeds[: number - 1]:
            raise ConfigError(f"number {number} has the models of an earlier one; give those of another seed")
    return seeds


def _add_first_seed(models: Members, info: ValidationInfo) -> Members:
    found = {**models, **(info.data.get("seeds") or ({},))[0]}
    if not found:
        raise ConfigError(f"there are none; give them by role: {', '.join(ROLES)}")
    return found


def _possible_methods(data: Mapping[str, Any]) -> tuple[str, ...]:
    models = data.get("models", ())  # absent where they are at fault themselves
    return tuple(method for method, roles in METHODS.items() if all(role in models for role in roles))


def _check_methods(methods: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    models = info.data.get("models", ROLES)
    if not methods:
        possible = ", ".join(_possible_methods(info.data)) or "none, so give others too"
        raise ConfigError(f"no method is given; the models {', '.join(models)} allow {possible}")
    for method in methods:
        missing = [role for role in METHODS[method] if role not in models]
        if missing:
            raise ConfigError(f"{method} needs the model {missing[0]!r}; give it under models, or leave it out")
    return methods


def _check_is_run(method: str, info: ValidationInfo) -> str:
    """Refuse a figure beside which nothing stands: it would be lost in silence."""
    if method not in info.data.get("methods", METHODS):
        raise ConfigError(f"{method} is not among the methods; add it to them, or leave its figures out")
    return method


Flag = Annotated[bool, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True, ge=1)]
CountFrom0 = Annotated[int, Field(strict=True, ge=0)]
Text = Annotated[str, Field(strict=True, pattern=r"\S")]
FoundPath = Annotated[Text, AfterValidator(_find)]
Members = Annotated[
    Mapping[Annotated[str, _one_of(ROLES, "role")], SkipValidation[MemberConfig]], AfterValidator(_read_models)
]
MethodName = Annotated[str, _one_of(tuple(METHODS), "method")]
Tuned = Annotated[str, _one_of(TUNED, "method with an alpha")]
CostName = Annotated[str, _one_of(tuple(COSTS), "cost")]
Alphas = Annotated[
    tuple[Number, ...],
    BeforeValidator(lambda given: given if isinstance(given, list | tuple) else parse_alphas(str(given))),
    AfterValidator(_check_distinct),
]
IsRun = AfterValidator(_check_is_run)
Figure = Number | Annotated[Mapping[str, Number], Field(min_length=1)]


class Speed(BaseModel, frozen=True, extra="forbid"):
    """Settings of measuring speed, in fresh processes by turns: `rounds` of all methods.

    In each, `num_prompts` prompts are decoded one by one for `new_tokens` tokens, and `num_examples` are scored.
    """

    rounds: CountFrom0 = 4
    num_prompts: Count = 4
    new_tokens: Annotated[int, Field(strict=True, ge=2)] = 32  # a speed is that behind the first token
    num_examples: Count = 16


class Images(BaseModel, frozen=True, extra="forbid"):
    """Settings of image classifiers, as of `ensembler create`: paths of files, or None."""

    classes: FoundPath | None = None
    templates: FoundPath | None = None
    aliases: FoundPath | None = None


class Experiment(BaseModel, frozen=True, extra="forbid"):
    """One set of models on some tasks: language models, or with `images` classifiers on folders of images.

    `models`: members by role, and the path of `patch` as one of them. `seeds`: models of several seeds of training by
    role; `models` has those of the first. `methods`: by default all that the models allow. `alphas`: the grid that
    validation chooses from; `alpha` fixes it for a method. `validation`: a number of documents or a split.
    `num_fewshot`, `limit`, `apply_chat_template`, `fewshot_as_multiturn`, `system_instruction` and `gen_kwargs`: as in
    lm-eval.

    `cluster`: a field of the documents; those that share its value count together in intervals and tests. `margin`:
    the difference up to which methods are tested to be alike, in the unit of the report's table. `published`: figures
    of a paper by task and method in that unit (per cent for shares of right answers): a number is of the metric that
    is shown, a mapping by metric. `published_alphas`: the α that it chose, by task and method. `published_costs`: its
    costs by method and name (`COSTS`). `source` is theirs. `speed`: how it is measured; None: not at all.
    """

    name: Text
    images: Images | None = None
    seeds: Annotated[tuple[Members, ...], Field(min_length=2), AfterValidator(_check_seeds)] = ()
    models: Annotated[Members, AfterValidator(_add_first_seed)] = Field(default={}, validate_default=True)
    tasks: Annotated[tuple[FoundPath, ...], Field(min_length=1)]
    methods: Annotated[tuple[MethodName, ...], AfterValidator(_check_distinct), AfterValidator(_check_methods)] = Field(
        default_factory=_possible_methods, validate_default=True
    )
    alphas: Alphas = parse_alphas("0.1:1.5:0.1")  # base-change at prediction, appendix B
    alpha: Mapping[Tuned, Number] = {}
    validation: Annotated[Count | Text, AfterValidator(str)] | None = None
    metric: Text | None = None
    num_fewshot: CountFrom0 | None = None
    limit: Count | None = None
    apply_chat_template: Flag | Text = False
    fewshot_as_multiturn: Flag = Field(default_factory=lambda data: bool(data.get("apply_chat_template")))
    system_instruction: Text | None = None
    gen_kwargs: Mapping[str, Any] | Text | None = None
    batch_size: Count = 8
    seed: CountFrom0 = 0
    cluster: Text | None = None
    margin: Annotated[Number, Field(gt=0)] | None = None
    published: Mapping[str, Mapping[Annotated[MethodName, IsRun], Figure]] = {}
    published_alphas: Mapping[str, Mapping[Annotated[Tuned, IsRun], Number]] = {}
    published_costs: Mapping[Annotated[MethodName, IsRun], Mapping[CostName, Number]] = {}
    source: Text = ""
    speed: Annotated[Speed | None, BeforeValidator(lambda given: None if given is False else given)] = Field(
        default_factory=lambda data: Speed() if data.get("images") is None else None
    )

    @property
    def by_seed(self) -> list[Experiment]:
        """The experiment with the models of each seed of training, and no `seeds`; itself where there are none."""
        found = [self.model_copy(update={"models": {**self.models, **models}, "seeds": ()}) for models in self.seeds]
        return found or [self]

    @property
    def missing_models(self) -> dict[str, list[str]]:
        """The roles that each method of several lacks and is not run for; of none where `methods` were given."""
        wanted = {} if "methods" in self.model_fields_set else METHODS
        missing = {method: [role for role in roles if role not in self.models] for method, roles in wanted.items()}
        return {method: roles for method, roles in missing.items() if roles and len(METHODS[method]) > 1}

    def has_seeds(self, method: str) -> bool:
        """Return whether a method has models of several seeds."""
        return any(role in models for models in self.seeds for role in METHODS[method])

    def published_figures(self, task: str, method: str, metric: str) -> dict[str, float]:
        """Return a paper's figures by metric; one that names none is of `metric`, the one that the table shows."""
        figure = self.published.get(task, {}).get(method, {})
        return dict(figure) if isinstance(figure, Mapping) else {metric: figure}

    def check_published(self, metrics: Mapping[str, Sequence[str]]) -> None:
        """Raise ConfigError for figures of a task that is not run, or by none of its `metrics`, given by task."""
        for task in (*self.published, *self.published_alphas):
            if task not in metrics:
                raise ConfigError(f"published figures of a task that is not run, {task!r}{nearest(task, [*metrics])}")
        for task, by_method in self.published.items():
            for key in (key for figure in by_method.values() if isinstance(figure, Mapping) for key in figure):
                if key not in metrics[task]:
                    hint = nearest(key, metrics[task])
                    raise ConfigError(f"published figures of {task} by an unknown metric, {key!r}{hint}")

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Check the prompts, and that every α comes from somewhere, and not from the documents that report it."""
        PromptSettings.of(self)
        free = [method for method in self.methods if method in TUNED and method not in self.alpha]
        if free and not self.alphas:
            raise ConfigError("alphas is empty; expected FIRST:LAST:STEP or a list of numbers")
        if free and self.validation is None and len(self.alphas) > 1:
            raise ConfigError(
                f"nothing chooses the alpha of {free[0]}; give validation (a number of examples or a split), or "
                f"alpha: {{{free[0]}: NUMBER}}"
            )
        if self.images is not None and self.speed is not None:
            raise ConfigError("speed is measured of texts alone; leave it out, or write speed: false")
        of_texts = [key for key in _OF_TEXTS if getattr(self, key)]
        if self.images is not None and of_texts:
            raise ConfigError(f"{of_texts[0]} is a setting of texts; leave it out of an experiment on images")
        return self


def _check_names(experiments: tuple[Experiment, ...]) -> tuple[Experiment, ...]:
    names = [experiment.name for experiment in experiments]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two of them are called {name!r}; give each a name of its own")
    return experiments


class Recipe(BaseModel, frozen=True, extra="forbid"):
    """A benchmark: its experiments, each with a name of its own."""

    name: Text
    description: Annotated[str, BeforeValidator(str)] = ""
    experiments: Annotated[tuple[Experiment, ...], Field(min_length=1), AfterValidator(_check_names)]


_MAPPINGS = ("models", "alpha", "published", "published_alphas", "published_costs")  # an experiment adds to the top's
_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
_EXPECTED = {  # by key, else by pydantic's type of error
    "seeds": "a list of two or more mappings of models by role",
    "tasks": "a list of names or YAML files",
    "methods": f"a list of {', '.join(METHODS)}",
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


class _Loader(yaml.SafeLoader):  # type: ignore[misc,unused-ignore]
    """YAML without some of its surprises.

    A later key takes the place of an earlier one in silence: a figure, or a model, would be lost. The key `on` is true.
    0:1:0.1, a grid to us, is a number to the base of 60. And 1e9 is a text.
    """

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        tag: str = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call,unused-ignore]
        if kind is not yaml.ScalarNode or not implicit[0]:
            return tag
        if _FLOAT.fullmatch(value):
            return "tag:yaml.org,2002:float"
        return self.DEFAULT_SCALAR_TAG if ":" in value and tag.endswith((":int", ":float")) else tag

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for index, key in enumerate(keys):
            if key.value in [other.value for other in keys[:index]]:
                raise yaml.composer.ComposerError(None, None, f"the key {key.value!r} is there twice", key.start_mark)
            key.tag = key.tag if key.value == "<<" else self.DEFAULT_SCALAR_TAG
        return node


def read_recipe(path: Path) -> Recipe:
    """Return the recipe in a YAML file; raise ConfigError for the first fault in it.

    Keys at the top hold for all `experiments` that do not say otherwise; without any, it is the one. Relative paths are
    looked for beside the file, then in the current folder. A key without a value is one that is left out.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join((getattr(error, "strerror", None) or str(error)).split())[:200]
        raise ConfigError(f"{path} cannot be read as a recipe: {reason}; give a YAML file, or `demo`") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path} is no recipe; expected a mapping with models and tasks")
    content = _share({"name": path.stem, **content})
    try:
        return Recipe.model_validate(content, context=path.parent)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_sentence(error, content)}") from error


def _share(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe with the keys at its top in all of its experiments; faults stay in it."""
    top = {key: value for key, value in content.items() if key in Experiment.model_fields}
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


def _sentence(error: ValidationError, content: Mapping[str, Any]) -> str:
    """Say where the first fault is, what was given and what was expected."""
    errors = sorted(error.errors(), key=lambda each: each["type"] != "extra_forbidden")  # others may come of these
    faults = [(_keys(each["loc"], content), each) for each in errors]
    first = faults[0][0]  # of a union, the deepest fault is of the type that was meant
    keys, fault = max((each for each in faults if each[0][: len(first)] == first), key=lambda each: len(each[0]))
    if fault["type"] == "extra_forbidden":
        *keys, key = keys
        models: dict[str, type[BaseModel]] = {"speed": Speed, "images": Images}
        known = [*models.get(keys[-1] if keys else "", Experiment).model_fields]
        known = known if keys else ["description", "experiments", *known]
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
