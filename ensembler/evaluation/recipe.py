"""The content of a recipe, checked: experiments with their models, tasks, methods, seeds and published figures."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    SkipValidation,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic.fields import FieldInfo

from ensembler.config import EnsembleConfig, MemberConfig
from ensembler.errors import ConfigError, nearest
from ensembler.evaluation.figures import ALL_METHODS, COSTS, METHODS, ROLES, TUNED
from ensembler.evaluation.lm_eval_settings import PromptSettings
from ensembler.rules import parse_alphas
from ensembler.vocab import CHAT_TEMPLATES


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
    beside = Path(info.context.folder if info.context else "", name)
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
        missing = [role for role in ALL_METHODS[method] if role not in models]
        if missing:
            raise ConfigError(f"{method} needs the model {missing[0]!r}; give it under models, or leave it out")
    return methods


def _check_is_run(method: str, info: ValidationInfo) -> str:
    """Refuse a figure beside which nothing stands: it would be lost in silence."""
    if method not in info.data.get("methods", ALL_METHODS):
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
MethodName = Annotated[str, _one_of(tuple(ALL_METHODS), "method")]
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


SpeedOrFalse = Annotated[Speed | None, BeforeValidator(lambda given: None if given is False else given)]


class Experiment(BaseModel, frozen=True, extra="forbid"):
    """One set of language models on some tasks; a subclass is of models of another kind.

    `models`: members by role, and the path of `patch` as one of them. `seeds`: models of several seeds of training by
    role; `models` has those of the first. `methods`: by default all that the models allow. `alphas`: the grid that
    validation chooses from; `alpha` fixes it for a method. `validation`: a number of documents or a split.
    `num_fewshot`, `limit`, `apply_chat_template`, `fewshot_as_multiturn`, `system_instruction` and `gen_kwargs`: as in
    lm-eval. `chat_template_kwargs`: variables of the chat template. `allow_renamed_special`, `text_candidates`,
    `text_tolerance` and `chat_template`: of `EnsembleConfig`.
    `transport_data`: a file of labelled examples for patch:sign-mask; `transport_texts`: one of texts for
    patch:procrustes.

    `cluster`: a field of the documents; those that share its value count together in intervals and tests. `margin`:
    the difference up to which methods are tested to be alike, in the unit of the report's table. `published`: figures
    of a paper by task and method in that unit (per cent for shares of right answers): a number is of the metric that
    is shown, a mapping by metric. `published_alphas`: the α that it chose, by task and method. `published_costs`: its
    costs by method and name (`COSTS`). `source` is theirs. `speed`: how it is measured; None: not at all.
    """

    name: Text
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
    chat_template_kwargs: Mapping[str, Any] | None = None
    transport_data: FoundPath | None = None
    transport_texts: FoundPath | None = None
    allow_renamed_special: Flag = False
    text_candidates: Count = EnsembleConfig.text_candidates
    text_tolerance: Annotated[Number, Field(gt=0, lt=1)] = EnsembleConfig.text_tolerance
    chat_template: Annotated[str, _one_of(CHAT_TEMPLATES, "chat template")] = EnsembleConfig.chat_template
    batch_size: Count = 8
    seed: CountFrom0 = 0
    cluster: Text | None = None
    margin: Annotated[Number, Field(gt=0)] | None = None
    published: Mapping[str, Mapping[Annotated[MethodName, IsRun], Figure]] = {}
    published_alphas: Mapping[str, Mapping[Annotated[Tuned, IsRun], Number]] = {}
    published_costs: Mapping[Annotated[MethodName, IsRun], Mapping[CostName, Number]] = {}
    source: Text = ""
    speed: SpeedOrFalse = Field(default_factory=Speed)

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
        return any(role in models for models in self.seeds for role in ALL_METHODS[method])

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
        return self


def _validate_kind(given: Any, of_texts: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Experiment:
    kinds = info.context.kinds if info.context else {}
    keys = [key for key in kinds if isinstance(given, Mapping) and given.get(key) is not None]
    found: Experiment = kinds[keys[0]].model_validate(given, context=info.context) if keys else of_texts(given)
    return found


OfItsKind = Annotated[Experiment, WrapValidator(_validate_kind)]


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
    experiments: Annotated[tuple[OfItsKind, ...], Field(min_length=1), AfterValidator(_check_names)]


class RecipeContext(NamedTuple):
    """The folder of the file of a recipe, and the kinds of experiments beside those on texts, by the key that tells."""

    folder: Path
    kinds: Mapping[str, type[Experiment]]

    @property
    def fields(self) -> dict[str, FieldInfo]:
        """The keys that an experiment of any kind may have."""
        kinds: list[Any] = [*self.kinds.values(), Experiment]
        return {key: field for kind in kinds for key, field in kind.model_fields.items()}
