"""Options that several commands of `ensembler patch` take, which read, carry and add patches alike."""

from __future__ import annotations

from typing import TypeVar

from ensembler.cli.command_class import section
from ensembler.cli.option_groups import PATH, with_options

Decorated = TypeVar("Decorated")
patch_option = section("Patch")
device_option = patch_option(
    "--device",
    default="cpu",
    show_default=True,
    metavar="DEVICE",
    help="Device of the arithmetic: cpu, cuda, cuda:1 ...; verify takes that of apply.",
)
_READING = (
    patch_option("--allow-pickle", is_flag=True, help="Read a patch that is kept as a pickle (adapter_model.bin)."),
    patch_option(
        "--unwrap", is_flag=True, help="Leave out what torch.compile, FSDP or DDP put into the names in PATCH."
    ),
)
_STRENGTHS = (
    patch_option(
        "--scale",
        multiple=True,
        metavar="[PATTERN=]NUMBER",
        help="Strength of PATCH, or of its modules that match (down_proj=0.5); repeat it.  [default: 1]",
    ),
    patch_option("--also", multiple=True, metavar="PATCH2", help="Another patch, added too; repeat it."),
    patch_option("--scale2", type=float, multiple=True, help="Strength of PATCH2, one for each --also.  [default: 1]"),
)
_TRANSPORT = (
    patch_option(
        "--transport",
        default="add",
        show_default=True,
        metavar="NAME",
        help="How PATCH is carried to MODEL: add, orthogonal or sign-mask.",
    ),
    patch_option(
        "--from", "old", metavar="MODEL", help="The base that PATCH was made for, for --transport orthogonal."
    ),
    patch_option("--data", type=PATH, metavar="FILE", help="Lines with prompt and answer, for --transport sign-mask."),
)


def reading_options(function: Decorated) -> Decorated:
    """Add --allow-pickle and --unwrap."""
    command: Decorated = with_options(function, _READING)
    return command


def strength_options(function: Decorated) -> Decorated:
    """Add --scale, --also and --scale2: the patches that are added together, and how strongly."""
    command: Decorated = with_options(function, _STRENGTHS)
    return command


def transport_options(function: Decorated) -> Decorated:
    """Add --transport, --from and --data; the command gets them as `transport`, `old` and `data`."""
    command: Decorated = with_options(function, _TRANSPORT)
    return command
