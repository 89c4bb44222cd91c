"""Options that several commands share: which ensemble, how to decode, what to read and where to write."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ensembler.cli.command_class import Decorated, section
from ensembler.cli.ensemble_options import EnsembleOptions
from ensembler.errors import ConfigError
from ensembler.rules import RULE_NAMES, parse_alphas

if TYPE_CHECKING:
    from ensembler.decoding.decoding_options import DecodingOptions


class AlphaType(click.ParamType[Any]):
    """A number, or with `several` a grid: 0,0.5,1 or 0:1.5:0.1. The value is a tuple then, else a float."""

    name = "grid"
    takes_list = True

    def __init__(self, *, several: bool) -> None:
        self._several = self.takes_several = several

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number or numbers. Raises ConfigError for what is none, and for several where one is wanted."""
        if isinstance(value, tuple):
            return value
        alphas = parse_alphas(",".join(map(str, value)) if isinstance(value, list) else str(value))
        option = "--alpha" if param is None else param.opts[0]
        if len(set(alphas)) < len(alphas):
            raise ConfigError(f"{option} {value} names a number twice; name it once")
        if self._several:
            return alphas
        if len(alphas) > 1:
            command = "this command" if ctx is None else ctx.info_name
            raise ConfigError(f"{option} {value} is a grid of {len(alphas)}; {command} takes one number")
        return alphas[0]


class RuleType(click.ParamType[Any]):
    """The name of a rule, or with `several` names with commas between them. The value is a tuple then, else a text."""

    name = "rule"
    takes_list = True

    def __init__(self, *, several: bool) -> None:
        self._several = several

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the name or names. Raises ConfigError for several where one is wanted, and for one given twice."""
        if isinstance(value, tuple):
            return value
        names = tuple(name.strip() for name in (value if isinstance(value, list) else str(value).split(",")))
        if len(set(names)) < len(names):
            raise ConfigError(f"--rule {value} names a rule twice; name it once")
        if self._several:
            return names
        if len(names) > 1:
            command = "this command" if ctx is None else ctx.info_name
            raise ConfigError(f"--rule {value} names {len(names)} rules; {command} takes one")
        return names[0]


class JsonObject(click.ParamType[Any]):
    """An object in JSON. The value is a dict."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the object. Raises ConfigError for a text that is none."""
        if isinstance(value, dict):
            return value
        try:
            found = json.loads(value)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            name = "this option" if param is None else param.opts[-1]
            raise ConfigError(f"{name} {value!r} is no JSON object; expected such as '{{\"enable_thinking\": false}}'")
        return found


_members, _rule, _devices = section("Members"), section("Rule"), section("Devices")


def _point_options(*, several: bool, default_alpha: str) -> list[Callable[..., Any]]:
    """Return --rule and --alpha, of which `several` may be given; `alpha` tells the default."""
    rules = ", ".join(RULE_NAMES)
    return [
        _rule(
            "--rule",
            type=RuleType(several=several),
            metavar="RULE,..." if several else "RULE",
            help=f"{'Some' if several else 'One'} of {rules}.  [default: folder's, or base-change]",
        ),
        _rule(
            "--alpha",
            type=AlphaType(several=several),
            metavar="A|GRID" if several else "A",
            help="Strength of the log-ratio, 0 is the anchor"
            + (": 0.5, or several as 0,0.5,1 or 0:1.5:0.1." if several else ".")
            + f"  [default: {default_alpha}]",
        ),
    ]


_MEMBER_OPTIONS = (
    _members("--source-ft", metavar="MODEL", help="The old fine-tuned model: a folder, a hub id or a LoRA folder."),
    _members(
        "--source-ft-adapter", metavar="ADAPTER", help="source_ft is source_pt with this; both share its weights."
    ),
    _members("--source-pt", metavar="MODEL", help="The old pre-trained model."),
    _members("--target-pt", metavar="MODEL", help="The new pre-trained model."),
    _members("--member", multiple=True, metavar="ROLE=MODEL", help="A member in another role; repeat it."),
    _members(
        "--patch",
        multiple=True,
        metavar="[ROLE=]PATCH",
        help="Add a LoRA, or what `patch extract` made, to a member when it is loaded.  [default role: target_pt]",
    ),
    _members(
        "--trust-remote-code",
        multiple=True,
        metavar="ROLE,...",
        help="Let this member's folder run code of its own; repeat it.",
    ),
)
_RULE_OPTIONS = (
    _rule("--constant", multiple=True, metavar="ROLE=NUMBER", help="A constant of the rule linear; repeat it."),
    _rule("--slope", multiple=True, metavar="ROLE=NUMBER", help="A slope of the rule linear; repeat it."),
    _rule("--cutoff", type=float, help="Plausibility cut-off of the rule contrastive.  [default: 0.1]"),
    _rule("--outside", metavar="mask|neutral", help="Tokens that not every member holds: forbid, or ratio 0."),
    _rule(
        "--allow-renamed-special",
        is_flag=True,
        default=None,
        help="Added tokens may have other names at the same ids; `inspect` lists them.",
    ),
    _rule(
        "--text-tolerance",
        type=float,
        metavar="SHARE",
        help="Different tokenizers: the share of a probability that may stay unknown.  [default: 0.02]",
    ),
    _rule(
        "--text-candidates",
        type=int,
        metavar="K",
        help="Different tokenizers: next tokens of the anchor that are compared.  [default: 64]",
    ),
    _rule(
        "--chat-template",
        metavar="per-member|anchor",
        help="Different tokenizers: whose chat template a member reads.  [default: per-member]",
    ),
)
_DEVICE_OPTIONS = (
    _devices(
        "--dtype",
        multiple=True,
        metavar="[ROLE=]DTYPE",
        help="auto, float32, bfloat16 or float16; repeat it for roles.",
    ),
    _devices(
        "--quantize",
        multiple=True,
        metavar="[ROLE=]METHOD",
        help="8bit, nf4, fp4 or none; 4 bits with compute dtype: nf4:bfloat16[:double].",
    ),
    _devices(
        "--device",
        multiple=True,
        metavar="[ROLE=]DEVICE",
        help="cpu, cuda:1 ..., or auto, balanced ... to spread a member over devices.",
    ),
    _devices(
        "--max-memory",
        multiple=True,
        metavar="[ROLE=]DEVICE=SIZE,...",
        help="What --device auto may use: target_pt=cuda:0=20GiB,cpu=60GiB.",
    ),
    _devices("--offload-folder", metavar="DIR", help="Where weights go that --device auto puts on disk."),
)

_decoding, _speed = section("Decoding"), section("Speed")
_DECODING_OPTIONS = (
    _decoding(
        "--max-new-tokens", type=click.IntRange(1), default=128, show_default=True, help="Most tokens of a text."
    ),
    _decoding("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy."),
    _decoding("--top-k", type=click.IntRange(1), help="Sample from the K most probable tokens."),
    _decoding("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Sample from the nucleus of this mass."),
    _decoding("--min-p", type=click.FloatRange(0, 1), help="Sample tokens above this fraction of the largest."),
    _decoding("--repetition-penalty", type=click.FloatRange(0, min_open=True), help="Above 1 discourages repeats."),
    _decoding("--num-beams", type=click.IntRange(1), default=1, show_default=True, help="Beam search above 1."),
    _decoding(
        "--num-return-sequences", type=click.IntRange(1), default=1, show_default=True, help="Texts of a prompt."
    ),
    _decoding("--stop", multiple=True, metavar="TEXT", help="End a text here and cut it off; repeat it."),
    _decoding("--seed", type=click.IntRange(0), help="Makes sampling repeatable."),
    _speed(
        "--draft",
        metavar="auto|none|ROLE|ngram",
        default="auto",
        show_default=True,
        help="Who drafts tokens that the others verify: the lightest member where that is light enough, nobody, a "
        "member, the text's own repetitions.",
    ),
    _speed(
        "--draft-tokens",
        type=click.IntRange(1),
        default=8,
        show_default=True,
        help="Most positions read in a round: the newest token, and those drafted behind it.",
    ),
    _speed("--prefill-chunk", type=click.IntRange(1), metavar="N", help="Read long prompts N tokens at a time."),
)

_placement = section("Placement")
_PLAN_OPTIONS = (
    _placement(
        "--budget",
        multiple=True,
        metavar="SIZE",
        help="Memory of cuda:0, again for cuda:1 ...: 24GiB.  [default: what is free on this machine]",
    ),
    _placement(
        "--context",
        type=click.IntRange(1),
        help="Tokens of a text, its answer included.  [default: members' shortest, at most 4096]",
    ),
    _placement("--batch-size", type=click.IntRange(1), default=1, show_default=True, help="Texts at the same time."),
)


def ensemble_options(
    *, argument: bool = True, several: bool = False, default_alpha: str = "folder's, or 1"
) -> Callable[[Decorated], Decorated]:
    """Add the options that say which ensemble; the command gets them as one `EnsembleOptions` under `given`.

    With `several`, --rule and --alpha take several, and the command gets them as tuples under `rules` and `alphas`,
    empty where none was given; the ensemble is that of the first rule, and of the alpha where there is one.
    `default_alpha` is for the help.
    """
    options = [
        *_MEMBER_OPTIONS,
        *_point_options(several=several, default_alpha=default_alpha),
        *_RULE_OPTIONS,
        *_DEVICE_OPTIONS,
    ]

    def decorate(function: Decorated) -> Decorated:
        @wraps(function)
        def collected(*args: Any, ensemble: str | None = None, **kwargs: Any) -> Any:
            if several:
                rules: tuple[str, ...] = kwargs.pop("rule") or ()
                alphas: tuple[float, ...] = kwargs.pop("alpha") or ()
                kwargs |= {"rules": rules, "alphas": alphas}
                point: dict[str, Any] = {
                    "rule": next(iter(rules), None),
                    "alpha": alphas[0] if len(alphas) == 1 else None,
                }
            else:
                point = {"rule": kwargs.pop("rule"), "alpha": kwargs.pop("alpha")}
            names = [field.name for field in fields(EnsembleOptions) if field.name not in ("ensemble", *point)]
            others: dict[str, Any] = {name: kwargs.pop(name) for name in names}
            return function(*args, given=EnsembleOptions(ensemble=ensemble, **(point | others)), **kwargs)

        command: Decorated = with_options(collected, options)
        return click.argument("ensemble", required=False)(command) if argument else command

    return decorate


def with_options(command: Any, options: Sequence[Callable[..., Any]]) -> Any:
    """Return the command with these options, in their order."""
    for option in reversed(options):
        command = option(command)
    return command


def point_options(function: Decorated) -> Decorated:
    """Add --rule and --alpha of one point: `rule` and `alpha`."""
    command: Decorated = with_options(function, _point_options(several=False, default_alpha="folder's, or 1"))
    return command


def plan_options(function: Decorated) -> Decorated:
    """Add the options that say for what a placement is planned: `budget`, `context` and `batch_size`."""
    command: Decorated = with_options(function, _PLAN_OPTIONS)
    return command


def decoding_options(function: Decorated) -> Decorated:
    """Add the options that say how to decode; the command gets them as one `DecodingOptions` under `decoding`."""

    @wraps(function)
    def collected(*args: Any, **kwargs: Any) -> Any:
        from ensembler.decoding.decoding_options import DecodingOptions

        names = [field.name for field in fields(DecodingOptions)]
        decoding: DecodingOptions = DecodingOptions(**{name: kwargs.pop(name) for name in names})
        return function(*args, decoding=decoding, **kwargs)

    command: Decorated = with_options(collected, _DECODING_OPTIONS)
    return command


prompt_option, output_option = section("Prompts"), section("Input and output")
TEMPLATE_KWARGS: dict[str, Any] = {
    "type": JsonObject(),
    "metavar": "JSON",
    "help": "Variables of the chat template: '{\"enable_thinking\": false}'.",
}
PATH = click.Path(path_type=Path)
overwrite_option = output_option("--overwrite", is_flag=True, help="Begin again where --output exists.")
verify_option = output_option(
    "--verify-weights",
    is_flag=True,
    help="From the first run on: compare all bytes of members' weights to go on, in place of sizes and times of their "
    "files. Members on the hub go by their commit.",
)
replace_option = output_option("--overwrite", is_flag=True, help="Replace --output if it exists.")
strict_option = output_option(
    "--strict/--skip-bad",
    default=True,
    help="Refuse rows or images that cannot be read, or name and skip them.  [default: strict]",
)
