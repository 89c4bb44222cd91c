"""Check the devices that the configs of members name, before the first weight is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ensembler.config import MemberConfig
from ensembler.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from ensembler.engine.members import MemberFiles


def out_of_memory(error: BaseException | None) -> bool:
    """Return whether `error` says that a device, or the host, has no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def send(values: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; a GPU takes it from the host without waiting for what it has to do before."""
    return values.to(device, non_blocking=device.type == "cuda")


def check_devices(files: Iterable[MemberFiles]) -> None:
    """Raise ConfigError unless every device that the members name is there: asked before the first weight is read.

    Raises MissingExtraError for a member to quantise without bitsandbytes. It is not part of `check_member`: an
    ensemble may be planned, inspected and written on another machine.
    """
    for member in files:
        if member.config.quantization is not None and find_spec("bitsandbytes") is None:
            raise MissingExtraError("bitsandbytes", "pip install bitsandbytes")
        for place in _places(member.config):
            check_device(member.role, place)


def _places(config: MemberConfig) -> list[str]:
    """The devices that a member names."""
    named = {config.device, *(config.max_memory or ())}
    if isinstance(config.device_map, dict):
        named |= set(config.device_map.values())
    return sorted(f"cuda:{name}" if name.isdigit() else name for name in named - {"disk"})


def check_device_names(role: str, config: MemberConfig) -> None:
    """Raise ConfigError unless the places that the member names are devices, whether or not this machine has them."""
    if isinstance(config.device_map, dict) and "disk" in config.device_map.values() and config.offload_folder is None:
        raise ConfigError(f"{role}: its device_map puts modules on disk; give an offload_folder beside it")
    for place in _places(config):
        try:
            is_one = torch.device(place).type != "meta"
        except RuntimeError:
            is_one = False
        if not is_one:
            raise ConfigError(f"{role}: {place!r} is no device; give cpu, cuda, cuda:1 ..., or auto for several")


def check_device(role: str, device: str) -> None:
    """Raise ConfigError unless torch has this device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        num = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise ConfigError(
            f"{role}: device {device!r} is not there ({num} CUDA devices were found); use 'cpu' or one that is"
        ) from error


def device_map_for(places: str | Mapping[str, str]) -> str | dict[str, int | str]:
    """As accelerate wants it: a number that was given for a GPU is a number again."""
    if isinstance(places, str):
        return places
    return {name: int(place) if place.isdigit() else place for name, place in places.items()}


def max_memory_for(sizes: Mapping[str, str]) -> dict[int | str, int | str]:
    """As accelerate wants it: GPUs by number, sizes without a unit as numbers."""
    numbers = {name: name.removeprefix("cuda:") for name in sizes}
    return {
        int(number) if number.isdigit() else name: int(sizes[name]) if sizes[name].isdigit() else sizes[name]
        for name, number in numbers.items()
    }
