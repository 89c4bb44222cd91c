"""Members' steps under torch.compile: one compiled model for each, on a row cache, for steps of few tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ensembler.engine.backbone import Backbone
from ensembler.engine.row_cache import why_not_by_row
from ensembler.errors import ConfigError

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
    return why_not_by_row(model)


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
