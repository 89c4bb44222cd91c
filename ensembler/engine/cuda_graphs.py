"""Make decode steps cheap: captured once as a CUDA graph and replayed, or compiled by torch.compile.

A decode step is hundreds of small launches, which cost more than the work.
"""

from __future__ import annotations

import inspect
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ensembler.engine.backbone import Backbone
from ensembler.engine.devices import out_of_memory
from ensembler.engine.row_cache import why_not_by_row
from ensembler.engine.scaled_positions import scaled_rotaries
from ensembler.errors import ConfigError, RunError
from ensembler.files import one_line

Backend = str | Callable[..., Any]
_NUM_GRAPHS = 64  # of one member: one for each shape of a step


def compile_steps(model: PreTrainedModel, backend: Backend) -> Callable[..., Any]:
    """Return what is called as the model is, and compiled with a `backend` of torch.compile.

    Raises ConfigError where it needs a C++ compiler and there is none.
    """
    if backend == "inductor":
        check_compiler()
    # Models of one family run the same code, and would share its limit of graphs. Older torch knows neither option.
    limits = {"isolate_recompiles": True, "recompile_limit": _NUM_GRAPHS}
    known = inspect.signature(torch.compile).parameters
    compile_with: Any = torch.compile
    compiled: Callable[..., Any] = compile_with(
        model.__call__,
        backend=backend,
        dynamic=False,
        **{name: value for name, value in limits.items() if name in known},
    )
    return compiled


def why_not_compiled(model: Any, backbones: Sequence[Backbone]) -> str | None:
    """Return why the steps of a model cannot be compiled, or None."""
    if any(view is model for backbone in backbones for view in backbone.views.values()):
        return "its adapter is switched on weights that it shares"
    if hasattr(model, "_orig_mod"):
        return "it is compiled already"
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_compileable:
        return f"its quantisation ({quantizer.quantization_config.quant_method}) does not take part"
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return "it is spread over devices"
    return _why_not_static(model) or why_not_by_row(model)


def _why_not_static(model: Any) -> str | None:
    return "its positions are scaled by the length of each text" if scaled_rotaries(model) else None


def check_compiler() -> None:
    """Raise ConfigError unless there is a C++ compiler, without which torch.compile makes no code."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ConfigError(
            "--compile needs a C++ compiler and there is none here; install g++ or name one in CXX, or leave it out"
        ) from error


_logger = logging.getLogger(__name__)

Outputs = dict[str, Tensor]
Function = Callable[..., Outputs]

_MOST = 48  # graphs that are kept: a text passes few lengths, a run few numbers of rows
_WARM_UP = 2  # runs before a capture: lazy initialisation must not happen inside of it


class Recorder(Protocol):
    """Records a function on fixed buffers; returns what replays it, and the outputs that each replay fills anew."""

    def record(
        self, function: Function, buffers: Sequence[Tensor], device: torch.device
    ) -> tuple[Callable[[], None], Outputs]: ...


class CudaRecorder:
    """CUDA graphs, all in one memory pool."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._streams: dict[torch.device, Any] = {}

    def record(
        self, function: Function, buffers: Sequence[Tensor], device: torch.device
    ) -> tuple[Callable[[], None], Outputs]:
        """Run the function on the device's own stream, capture it there; return the replay and its outputs."""
        with torch.cuda.device(device):
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream = self._streams[device]
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    function(*buffers)
            torch.cuda.synchronize(device)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # The outer context leaves the stream where a capture fails, which torch's own does not.
            with torch.cuda.stream(stream), torch.cuda.graph(graph, pool=self._pool, stream=stream):
                outputs = function(*buffers)
        return graph.replay, outputs


@dataclass(frozen=True)
class _Recorded:
    buffers: tuple[Tensor, ...]
    replay: Callable[[], None]
    outputs: Outputs


class StepGraphs:
    """The graphs of a member set, at most `most`, recorded by what `make_recorder` returns.

    `num_recorded` counts captures; `reason` says why there are none any more.
    """

    def __init__(self, make_recorder: Callable[[], Recorder], most: int = _MOST) -> None:
        self.num_recorded = 0
        self.reason: str | None = None
        self._make_recorder = make_recorder
        self._recorder = make_recorder()
        self._most = most
        self._kept: OrderedDict[Hashable, _Recorded] = OrderedDict()

    def clear(self) -> None:
        """Forget all graphs, and the memory that they shared."""
        self._kept.clear()
        self._recorder = self._make_recorder()

    def run(self, key: Hashable, function: Function, inputs: Sequence[Tensor], device: torch.device) -> Outputs:
        """Return what `function` returns for `inputs`, which are copied to `device`; the next run overwrites it.

        Equal keys stand for the same work on the same shapes. A step that cannot be captured runs as it is, and so do
        all later ones.
        """
        recorded = self._kept.get(key)
        if recorded is None:
            with torch.inference_mode(mode=False):  # they may outlive the mode of this call, and are written to then
                buffers = tuple(value.to(device, copy=True) for value in inputs)
            try:
                replay, outputs = self._recorder.record(function, buffers, device)
            except (RuntimeError, RunError) as error:  # whatever torch, or a member inside, does that no graph can hold
                # Of a capture that a member's error has ended, torch itself says only that it is not valid.
                inner = error if isinstance(error, RunError) else error.__context__ or error
                if any(map(out_of_memory, (error, inner, inner.__cause__))):
                    raise
                self.reason = f"a step could not be captured ({one_line(inner)})"
                _logger.warning("CUDA graphs are off: %s; steps are launched one by one", self.reason)
                self.clear()
                return function(*buffers)
            recorded = _Recorded(buffers, replay, outputs)
            self.num_recorded += 1
            while len(self._kept) >= self._most:
                self._kept.popitem(last=False)
        else:
            for buffer, value in zip(recorded.buffers, inputs, strict=True):
                buffer.copy_(value, non_blocking=True)
        self._kept[key] = recorded
        self._kept.move_to_end(key)
        recorded.replay()
        return recorded.outputs


def why_not_captured(model: Any) -> str | None:
    """Return why the steps of a model cannot be captured, or None."""
    if model.device.type != "cuda":
        return f"it is on {model.device.type}"
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return "it is spread over devices"
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return "accelerate has put hooks on its modules"
    # transformers sets the implementation for models without experts, too
    has_experts = any(type(module).__name__.endswith("Experts") for module in model.modules())
    experts = getattr(model.config.get_text_config(decoder=True), "_experts_implementation", "eager")
    if has_experts and experts == "eager":
        return "its experts run in a loop over the data; load it with experts_implementation 'grouped_mm'"
    return _why_not_static(model)
