"""Options that several commands share: which ensemble, and how to decode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ensembler.errors import ConfigError
from ensembler.planning.budgets import parse_size
from ensembler.quantization import Quantization
from ensembler.rules import RULE_NAMES

if TYPE_CHECKING:
    from ensembler.config import EnsembleConfig
    from ensembler.decoding.options import DecodingOptions

Command = TypeVar("Command", bound=Callable[..., Any])

DEMO = "demo"


@dataclass(frozen=True)
class EnsembleOptions:
    """The ensemble as given on the command line; `load_config` turns it into a configuration."""

    ensemble: str | None = None
    source_ft: str | None = None
    source_ft_adapter: str | None = None
    source_pt: str | None = None
    target_pt: str | None = None
    member: tuple[str, ...] = ()
    patch: tuple[str, ...] = ()
    rule: str | None = None
    alpha: float | None = None
    constant: tuple[str, ...] = ()
    slope: tuple[str, ...] = ()
    cutoff: float | None = None
    outside: str | None = None
    dtype: tuple[str, ...] = ()
    quantize: tuple[str, ...] = ()
    device: tuple[str, ...] = ()
    max_memory: tuple[str, ...] = ()
    offload_folder: str | None = None

    def load_config(self) -> EnsembleConfig:
        """Return the configuration: that of the folder (with α, dtypes and places changed), or one of the members."""
        if self.ensemble is not None:
            return self._from_folder(self.ensemble)
        return self._from_members()

    def _members(self) -> dict[str, Any]:
        named = {"source_ft": self.source_ft, "source_pt": self.source_pt, "target_pt": self.target_pt}
        given: dict[str, Any] = {role: path for role, path in named.items() if path is not None}
        if self.source_ft_adapter is not None:
            if self.source_ft is not None or self.source_pt is None:
                raise ConfigError(
                    "--source-ft-adapter makes source_ft from --source-pt; give that beside it, and no --source-ft"
                )
            given["source_ft"] = {"model": self.source_pt, "adapter": self.source_ft_adapter}
        for role, path in _pairs("--member", self.member).items():
            if role in given:
                raise ConfigError(f"the member {role!r} is given twice; give it once")
            given[role] = path
        return given

    def _from_folder(self, name: str) -> EnsembleConfig:
        from ensembler import folder
        from ensembler.demo import demo_folder

        if self._members():
            raise ConfigError(f"a member was given beside the ensemble {name!r}; give the folder, or the members alone")
        config = folder.read(demo_folder() if name == DEMO else folder.find(name))
        changes = {
            "rule": self.rule,
            "alpha": self.alpha,
            "constant": _numbers("--constant", self.constant),
            "slope": _numbers("--slope", self.slope),
            "cutoff": self.cutoff,
            "outside": self.outside,
        }
        config = config.replaced(**{key: value for key, value in changes.items() if value is not None})
        return self._placed(config)

    def _from_members(self) -> EnsembleConfig:
        from ensembler.config import EnsembleConfig

        members = self._members()
        if not members:
            raise ConfigError(
                "no ensemble was given; name a folder, or demo, or the members with --source-ft --source-pt --target-pt"
            )
        config = EnsembleConfig(
            rule=self.rule or "base-change",
            alpha=1.0 if self.alpha is None else self.alpha,
            members=members,
            constant=_numbers("--constant", self.constant),
            slope=_numbers("--slope", self.slope),
            cutoff=self.cutoff,
            outside=self.outside or "mask",
        )
        return self._placed(config)

    def _placed(self, config: EnsembleConfig) -> EnsembleConfig:
        """The configuration with what was said about where and how members are loaded."""
        roles = tuple(config.members)
        for role, patch in self._patches(config).items():
            if config.members[role].adapter is not None:
                raise ConfigError(
                    f"--patch was given for {role}, which has an adapter already ({config.members[role].adapter}); add "
                    "one of them to its files first: ensembler patch apply"
                )
            config.members[role] = replace(config.members[role], adapter=patch)
        for role, dtype in by_role("--dtype", self.dtype, roles).items():
            config.members[role] = replace(config.members[role], dtype=dtype)
        for role, method in by_role("--quantize", self.quantize, roles).items():
            try:
                quantization = None if method == "none" else Quantization.parse(method)
            except ConfigError as error:
                raise ConfigError(f"--quantize {role}={method}: {error} (bnb- may be left out), or none") from error
            config.members[role] = replace(config.members[role], quantization=quantization)
        for role, device in by_role("--device", self.device, roles).items():
            config.members[role] = config.members[role].placed(device)
        for role, sizes in by_role("--max-memory", self.max_memory, roles).items():
            max_memory = _pairs("--max-memory", tuple(sizes.split(",")))
            for size in max_memory.values():
                try:
                    parse_size(size)  # a bare number would be bytes
                except ConfigError as error:
                    given = sizes if sizes in self.max_memory else f"{role}={sizes}"
                    raise ConfigError(f"--max-memory {given}: {error}") from error
            if config.members[role].device_map is None:
                raise ConfigError(
                    f"--max-memory was given for {role}, which is on one device; add --device {role}=auto"
                )
            config.members[role] = replace(config.members[role], max_memory=max_memory)
        if self.offload_folder is not None:
            config.change_members(offload_folder=self.offload_folder)
        return config

    def _patches(self, config: EnsembleConfig) -> dict[str, str]:
        """Patches by role; one without a role is for the new model, as in PortLLM."""
        found = {}
        for value in self.patch:
            role, equals, path = value.partition("=")
            if not equals or role not in config.members:
                role, path = "target_pt", value
            if role not in config.members:
                roles = ", ".join(config.members)
                raise ConfigError(f"--patch {value!r}: there is no target_pt; give ROLE=PATCH with one of {roles}")
            if role in found:
                raise ConfigError(f"--patch was given twice for {role!r}; give it once, or add them on disk first")
            found[role] = path
        return found


_RULE = click.option(
    "--rule", metavar="RULE", help=f"One of {', '.join(RULE_NAMES)}.  [default: folder's, or base-change]"
)
_ALPHA = click.option(
    "--alpha", type=float, help="Strength of the log-ratio; 0 is the anchor.  [default: folder's, or 1]"
)
_ALPHA_GRID = click.option(
    "--alpha",
    type=float,
    multiple=True,
    help="Strength of the log-ratio; 0 is the anchor; repeat it for several.  [default: folder's, or 1]",
)
_ENSEMBLE_OPTIONS = (
    click.option("--source-ft", metavar="MODEL", help="The old fine-tuned model: a folder, a hub id or a LoRA folder."),
    click.option(
        "--source-ft-adapter", metavar="ADAPTER", help="source_ft is source_pt with this; both share its weights."
    ),
    click.option("--source-pt", metavar="MODEL", help="The old pre-trained model."),
    click.option("--target-pt", metavar="MODEL", help="The new pre-trained model."),
    click.option("--member", multiple=True, metavar="ROLE=MODEL", help="A member in another role; repeat it."),
    click.option(
        "--patch",
        multiple=True,
        metavar="[ROLE=]PATCH",
        help="Add a LoRA, or what `patch extract` made, to a member when it is loaded.  [default role: target_pt]",
    ),
    _RULE,
    _ALPHA,
    click.option("--constant", multiple=True, metavar="ROLE=NUMBER", help="A constant of the rule linear; repeat it."),
    click.option("--slope", multiple=True, metavar="ROLE=NUMBER", help="A slope of the rule linear; repeat it."),
    click.option("--cutoff", type=float, help="Plausibility cut-off of the rule contrastive.  [default: 0.1]"),
    click.option("--outside", metavar="mask|neutral", help="Tokens that not every member holds: forbid, or ratio 0."),
    click.option(
        "--dtype",
        multiple=True,
        metavar="[ROLE=]DTYPE",
        help="auto, float32, bfloat16 or float16; repeat it for roles.",
    ),
    click.option(
        "--quantize",
        multiple=True,
        metavar="[ROLE=]METHOD",
        help="8bit, nf4, fp4 or none; 4 bits with compute dtype: nf4:bfloat16[:double].",
    ),
    click.option(
        "--device",
        multiple=True,
        metavar="[ROLE=]DEVICE",
        help="cpu, cuda:1 ..., or auto, balanced ... to spread a member over devices.",
    ),
    click.option(
        "--max-memory",
        multiple=True,
        metavar="[ROLE=]DEVICE=SIZE,...",
        help="What --device auto may use: target_pt=cuda:0=20GiB,cpu=60GiB.",
    ),
    click.option("--offload-folder", metavar="DIR", help="Where weights go that --device auto puts on disk."),
)

_DECODING_OPTIONS = (
    click.option("--max-new-tokens", type=click.IntRange(1), default=128, show_default=True, help="Tokens each."),
    click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy."),
    click.option("--top-k", type=click.IntRange(1), help="Sample from the K most probable tokens."),
    click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Sample from the nucleus of this mass."),
    click.option("--min-p", type=click.FloatRange(0, 1), help="Sample tokens above this fraction of the largest."),
    click.option("--repetition-penalty", type=click.FloatRange(0, min_open=True), help="Above 1 discourages repeats."),
    click.option("--num-beams", type=click.IntRange(1), default=1, show_default=True, help="Beam search above 1."),
    click.option("--num-return-sequences", type=click.IntRange(1), default=1, show_default=True, help="Texts each."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End a text here and cut it off; repeat it."),
    click.option("--seed", type=click.IntRange(0), help="Makes sampling repeatable."),
    click.option(
        "--draft",
        metavar="auto|none|ROLE|ngram",
        default="auto",
        show_default=True,
        help="Who drafts tokens that the others verify: the lightest member where that is light enough, nobody, a "
        "member, the text's own repetitions.",
    ),
    click.option(
        "--draft-tokens",
        type=click.IntRange(1),
        default=8,
        show_default=True,
        help="Most positions read in a round: the newest token, and those drafted behind it.",
    ),
    click.option("--prefill-chunk", type=click.IntRange(1), metavar="N", help="Read long prompts N tokens at a time."),
)

_PLAN_OPTIONS = (
    click.option(
        "--budget",
        multiple=True,
        metavar="SIZE",
        help="Memory of cuda:0, again for cuda:1 ...: 24GiB.  [default: what is free on this machine]",
    ),
    click.option(
        "--context",
        type=click.IntRange(1),
        help="Tokens of a text, its answer included.  [default: members' shortest, at most 4096]",
    ),
    click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True, help="Texts at the same time."),
)


def ensemble_options(*, argument: bool = True, grid: bool = False, point: bool = True) -> Callable[[Command], Command]:
    """Add the options that say which ensemble; the command gets them as one `EnsembleOptions`.

    With `grid`, --alpha may be repeated; the command gets all of them under `alphas`, the options the first. Without
    `point`, there is neither --alpha nor --rule: the command has options of its own for a grid of them.
    """

    def decorate(function: Command) -> Command:
        @wraps(function)
        def collected(*args: Any, ensemble: str | None = None, **kwargs: Any) -> Any:
            names = [field.name for field in fields(EnsembleOptions) if field.name != "ensemble"]
            if grid:
                kwargs["alphas"] = kwargs["alpha"]
                kwargs["alpha"] = next(iter(kwargs["alphas"]), None)
            given = EnsembleOptions(ensemble=ensemble, **{name: kwargs.pop(name, None) for name in names})
            return function(*args, given=given, **kwargs)

        command: Any = collected
        for option in reversed(_ENSEMBLE_OPTIONS):
            if not point and option in (_ALPHA, _RULE):
                continue
            command = (_ALPHA_GRID if grid and option is _ALPHA else option)(command)
        if argument:
            command = click.argument("ensemble", required=False)(command)
        result: Command = command
        return result

    return decorate


def plan_options(function: Command) -> Command:
    """Add the options that say for what a placement is planned: `budget`, `context` and `batch_size`."""
    command: Any = function
    for option in reversed(_PLAN_OPTIONS):
        command = option(command)
    result: Command = command
    return result


def decoding_options(function: Command) -> Command:
    """Add the options that say how to decode; the command gets them as one `DecodingOptions` under `decoding`."""

    @wraps(function)
    def collected(*args: Any, **kwargs: Any) -> Any:
        from ensembler.decoding.options import DecodingOptions

        names = [field.name for field in fields(DecodingOptions)]
        decoding: DecodingOptions = DecodingOptions(**{name: kwargs.pop(name) for name in names})
        return function(*args, decoding=decoding, **kwargs)

    command: Any = collected
    for option in reversed(_DECODING_OPTIONS):
        command = option(command)
    result: Command = command
    return result


def _pairs(option: str, values: tuple[str, ...]) -> dict[str, str]:
    pairs = {}
    for value in values:
        role, equals, rest = value.partition("=")
        if not equals or not role or not rest:
            form = "[ROLE=]DEVICE=SIZE,... (target_pt=cpu=20GiB)" if option == "--max-memory" else "ROLE=VALUE"
            raise ConfigError(f"{option} {value!r} is not of the form {form}")
        if role in pairs:
            raise ConfigError(f"{option} was given twice for {role!r}; give it once")
        pairs[role] = rest
    return pairs


def by_role(option: str, values: tuple[str, ...], roles: tuple[str, ...]) -> dict[str, str]:
    """Return values by role; one without a role is for all that have none of their own. Raises ConfigError."""
    for_all, own = [], {}
    for value in values:
        role, equals, rest = value.partition("=")
        if equals and role in roles and rest:
            if role in own:
                raise ConfigError(f"{option} was given twice for {role!r}; give it once")
            own[role] = rest
        elif equals and option != "--max-memory":
            raise ConfigError(f"{option} {value!r}: expected a value, or ROLE=VALUE with one of {', '.join(roles)}")
        else:
            for_all.append(value)
    if len(for_all) > 1:
        raise ConfigError(f"{option} was given twice for all members, {for_all[0]!r} and {for_all[1]!r}; give it once")
    return {**{role: value for value in for_all for role in roles}, **own}


def _numbers(option: str, values: tuple[str, ...]) -> dict[str, float] | None:
    try:
        return {role: float(number) for role, number in _pairs(option, values).items()} or None
    except ValueError as error:
        raise ConfigError(f"{option}: {error}; expected ROLE=NUMBER") from error
