"""Check the devices that the configs of members name, before the first weight is read."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

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
        for device in _named_devices(member.config):
            try:
                torch.empty(0, device=device)
            except (RuntimeError, AssertionError, NotImplementedError) as error:
                num = torch.cuda.device_count() if torch.cuda.is_available() else 0
                raise ConfigError(
                    f"{member.role}: device {device!r} is not there ({num} CUDA devices were found); use 'cpu' or one "
                    "that is"
                ) from error


def _named_devices(config: MemberConfig) -> list[str]:
    named = {config.device, *(config.max_memory or ())}
    if isinstance(config.device_map, dict):
        named |= set(config.device_map.values())
    return sorted(f"cuda:{name}" if name.isdigit() else name for name in named - {"disk"})


def check_device_names(role: str, config: MemberConfig) -> None:
    """Raise ConfigError unless the member names devices; this machine need not have them."""
    if isinstance(config.device_map, dict) and "disk" in config.device_map.values() and config.offload_folder is None:
        raise ConfigError(f"{role}: its device_map puts modules on disk; give an offload_folder beside it")
    for device in _named_devices(config):
        try:
            is_device = torch.device(device).type != "meta"
        except RuntimeError:
            is_device = False
        if not is_device:
            raise ConfigError(f"{role}: {device!r} is no device; give cpu, cuda, cuda:1 ..., or auto for several")


def placement_options(config: MemberConfig) -> dict[str, Any]:
    """Return the options of `from_pretrained` that put a member on devices; accelerate counts GPUs and bytes as int."""
    devices, sizes = config.device_map, config.max_memory
    if devices is None:
        return {"device_map": {"": config.device}}
    return {
        "device_map": devices if isinstance(devices, str) else {name: _as_number(to) for name, to in devices.items()},
        "max_memory": sizes and {_as_number(on.removeprefix("cuda:")): _as_number(of) for on, of in sizes.items()},
        "offload_folder": config.offload_folder,
    }


def _as_number(text: str) -> int | str:
    return int(text) if text.isdigit() else text
