"""All commands: options in sections, --config, -q, -v and --log-level; one value for an option that takes one."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from ensembler.errors import ConfigError, EnsemblerError, nearest

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

log = logging.getLogger("ensembler.cli")  # notices to the user: INFO; -q leaves WARNING

_GENERAL = "General"
_LAST = ("Speed", "Devices", _GENERAL)  # sections, in this order
_LEVELS = ("debug", "info", "warning", "error")


class Interruption(EnsemblerError):
    """Ctrl-C, or SIGINT."""

    exit_code = 130


@dataclass
class Session:
    """Settings of one call of `main` that its options change."""

    debug: bool = False


class Option(click.Option):
    """An option that stands in a `section` of its command's help. Several values in the environment stand in lines."""

    def __init__(self, *args: Any, section: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section
        if self.metavar is None and isinstance(self.type, click.types.IntParamType | click.types.FloatParamType):
            self.metavar = "N" if isinstance(self.type, click.types.IntParamType) else "X"

    def value_from_envvar(self, ctx: click.Context) -> Any:
        """Return the value in the environment; a text with spaces is one value."""
        value = self.resolve_envvar_value(ctx)
        return value.splitlines() if value is not None and self.multiple else value


def section(name: str) -> Callable[..., Callable[[Decorated], Decorated]]:
    """Return what makes options of this section, as `click.option` does."""

    def option(*names: str, **settings: Any) -> Callable[[Decorated], Decorated]:
        return click.option(*names, cls=Option, section=name, **settings)

    return option


class Command(click.Command):
    """A command with options in sections, --config, -q, -v, --log-level and --debug."""

    def __init__(self, *args: Any, is_resumable: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params = [*self.params, *_common_options()]
        self._is_resumable = is_resumable

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; raise Interruption for Ctrl-C, which says whether rows are kept."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            click.echo(err=True)  # behind the ^C of the terminal
            left = "nothing half-written is left"
            output = ctx.params.get("output")
            if self._is_resumable and output is not None and output.exists() and not ctx.params.get("dry_run"):
                how = " without --overwrite" if ctx.params.get("overwrite") else ""
                left = f"finished rows are kept; go on with the same command{how}"
            raise Interruption(f"interrupted; {left}") from error

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as click does, which takes the last of several values in silence: refuse them."""
        _, _, given = self.make_parser(ctx).parse_args(list(args))
        for param in given:
            if isinstance(param, click.Option) and not param.multiple and not param.count and given.count(param) > 1:
                several = ", or several as 0.5,0.7" if getattr(param.type, "takes_several", False) else ""
                name = param.opts[-1]
                raise click.UsageError(f"{name} was given {given.count(param)} times; give it once{several}.", ctx)
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options section by section, those that matter least to most people last."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if isinstance(param, click.Option) and (record := param.get_help_record(ctx)) is not None:
                name = param.section if isinstance(param, Option) else _GENERAL
                sections.setdefault(name, []).append(record)
        for name in sorted(sections, key=lambda name: _LAST.index(name) if name in _LAST else -1):
            with formatter.section(name):
                formatter.write_dl(sections[name])


def _common_options() -> list[click.Parameter]:
    common = partial(Option, section=_GENERAL, expose_value=False)
    return [
        common(
            ["--config"],
            type=click.Path(path_type=Path),
            metavar="FILE",
            is_eager=True,
            callback=_read_config,
            help="Options from a YAML file (max-new-tokens: 64); those given here win.",
        ),
        common(["-q", "--quiet"], is_flag=True, callback=_set_levels, help="No notices and no progress."),
        common(["-v", "--verbose"], is_flag=True, callback=_set_levels, help="Log details."),
        common(
            ["--log-level"],
            type=click.Choice(_LEVELS),
            callback=_set_levels,
            help="Log this and worse, with times, of all libraries too.",
        ),
        common(["--debug"], is_flag=True, callback=_set_debug, help="Show the traceback of an error."),
    ]


def _read_config(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Make the values of a YAML file the defaults of the options. Raises ConfigError."""
    if path is None:
        return
    from ensembler.yaml_file import read_yaml

    content = read_yaml(path, "by --config", "give a YAML file of options")
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} holds no options; expected lines such as max-new-tokens: 64")
    known: dict[str, tuple[click.Parameter, bool]] = {}  # with whether the name is that of the opposite
    for param in ctx.command.params:
        names = [param.human_readable_name.lower()] if isinstance(param, click.Argument) else param.opts
        known |= {name.lstrip("-"): (param, False) for name in names if param.name != "config"}
        known |= {name.lstrip("-"): (param, True) for name in param.secondary_opts}
    defaults: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("_", "-")
        if name not in known:
            raise ConfigError(f"--config {path}: {ctx.command_path} has no option {key!r}{nearest(name, [*known])}")
        param, is_opposite = known[name]
        value = not value if is_opposite and isinstance(value, bool) else value
        is_list = param.multiple if isinstance(param, click.Option) else param.nargs == -1
        takes_list = is_list or getattr(param.type, "takes_list", False)
        if isinstance(value, dict) or (isinstance(value, list) and not takes_list):
            raise ConfigError(f"--config {path}: {key} is {value!r}; expected one value, as on the command line")
        if param.name is not None and value is not None:
            defaults[param.name] = [value] if is_list and not isinstance(value, list) else value
    ctx.default_map = {**(ctx.default_map or {}), **defaults}


def _set_debug(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
    if value and isinstance(ctx.obj, Session):
        ctx.obj.debug = True
    return value


class _StandardError(logging.Handler):
    """Writes to the standard error of this moment, which a rank or a test may replace."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(self.format(record), err=True)


_handler = _StandardError()


def _set_levels(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """Set the levels of the loggers when the last of the three options is known."""
    given: dict[str, Any] = ctx.meta.setdefault("ensembler.verbosity", {})
    given[str(param.name)] = value
    if len(given) < 3:
        return value
    both = [f"--{name.replace('_', '-')}" for name, one in given.items() if one]
    if len(both) > 1:
        raise ConfigError(f"{both[0]} and {both[1]} were both given; leave one of them out")
    package, root = logging.getLogger("ensembler"), logging.getLogger()
    level = given["log_level"]
    root.removeHandler(_handler)
    package.addHandler(_handler)
    package.setLevel(logging.INFO if given["verbose"] else logging.WARNING)
    log.setLevel(logging.WARNING if given["quiet"] else logging.INFO)
    _handler.setFormatter(None)
    if level is not None:
        package.removeHandler(_handler)
        root.addHandler(_handler)
        _handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        for logger in (root, package, log):
            logger.setLevel(level.upper())
        os.environ["TRANSFORMERS_VERBOSITY"] = level
    return value


def is_quiet() -> bool:
    """Return whether notices and progress are unwanted."""
    return not log.isEnabledFor(logging.INFO)
