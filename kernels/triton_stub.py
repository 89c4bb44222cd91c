"""Launch Triton kernels into nothing: compiled for an H100, dispatched by Triton, and never run. No GPU is needed.

What tests and benchmarks of the host's side need: every call goes through Triton's own binder and caches up to the
launch itself, which is counted and does nothing. Pointers are those of CPU tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]  # Triton has no type stubs
from triton.runtime import driver  # type: ignore[import-untyped]


class StubDriver:
    """A driver of one H100 that launches nothing; `launched` counts what it would have launched, by kernel."""

    def __init__(self) -> None:
        self.launched: dict[str, int] = {}
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 232_448},
            load_binary=lambda name, *others: (object(), name, 64, 0, 1024),
            unload_module=lambda module: None,
        )

    def get_current_device(self) -> int:
        """Device 0."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0

    def get_current_target(self) -> Any:
        """Return the target that kernels are compiled for."""
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """Return the launcher of a kernel."""
        name, launched = metadata.name, self.launched

        def launch(*arguments: Any) -> None:
            launched[name] = launched.get(name, 0) + 1

        return launch


@contextmanager
def launching_into_nothing() -> Iterator[StubDriver]:
    """Let Triton use a `StubDriver`. Must not be used while Triton interprets kernels (TRITON_INTERPRET)."""
    stub, before = StubDriver(), driver._active
    driver.set_active(stub)
    try:
        yield stub
    finally:
        driver._active = before
