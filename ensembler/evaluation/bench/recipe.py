"""What a benchmark compares: models by role, tasks, methods, seeds, and published figures to set beside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from ensembler.config import MemberConfig
from ensembler.errors import ConfigError

Figure = float | Mapping[str, float]

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

    rounds: int = 4
    num_prompts: int = 4
    new_tokens: int = 32
    num_examples: int = 16

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            least = {"rounds": 0, "new_tokens": 2}.get(each.name, 1)  # a speed is that behind the first token
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"speed: {each.name} is {value!r}; expected a whole number from {least}")


@dataclass(frozen=True)
class Images:
    """That the models are image classifiers, and what `ensembler create` takes of them: paths of files, or None."""

    classes: str | None = None
    templates: str | None = None
    aliases: str | None = None


@dataclass(frozen=True)
class Experiment:
    """One set of models on some tasks.

    `models`: members by role, `patch` a path; with `images` they are image classifiers, and `tasks` are folders of
    images. `alphas`: the grid that validation chooses from; `alpha` fixes it for a method. `validation`: a number of
    examples or a split. `published`: figures of a paper by task and method, in the unit of the report's table (per cent
    for shares of right answers); of one metric a number, of several a mapping by metric. `published_costs`: its costs
    by method and name (`measure.Cost`). `published_alphas`: the α that it chose, by task and method. All are printed
    beside what was measured; their source is `source`. `speed`:
    how it is measured; None: not at all.
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
    published: Mapping[str, Mapping[str, Figure]] = field(default_factory=dict)
    published_alphas: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    published_costs: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    source: str = ""
    images: Images | None = None
    speed: Speed | None = None

    def published_figures(self, task: str, method: str, metric: str) -> dict[str, float]:
        """Return a paper's figures by metric; one that names none is of `metric`, the one that the table shows."""
        figure = self.published.get(task, {}).get(method, {})
        return dict(figure) if isinstance(figure, Mapping) else {metric: figure}


@dataclass(frozen=True)
class Recipe:
    """A benchmark: its experiments."""

    name: str
    description: str
    experiments: tuple[Experiment, ...]
