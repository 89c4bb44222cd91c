"""Members' decode steps under torch.compile: a graph and a static cache for each, kept from call to call.

Steps of one token are compiled; a prefill has another length each time and stays eager. A static cache has room for a
power of two of positions, so that texts of similar lengths use the same graph. What a model makes for a static cache,
mask and positions, is made outside of its graph, as `generate` of transformers does it. Nothing here ran on a GPU.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from ensembler.backbones import Backbone
from ensembler.cache import EnsembleCache
from ensembler.errors import ConfigError
from ensembler.runners import Forward, Group

_logger = logging.getLogger(__name__)

Backend = str | Callable[..., Any]

SMALLEST_BUCKET = 64  # positions
_NUM_GRAPHS = 64  # of one member: one for each bucket and number of rows


def bucket(num_positions: int) -> int:
    """Return the room of a static cache for `num_positions`: the next power of two, at least SMALLEST_BUCKET."""
    return max(SMALLEST_BUCKET, 1 << (num_positions - 1).bit_length())


class CompiledStep:
    """One model on static caches, its decode step as a graph of its own. It is called as the model is."""

    def __init__(self, model: PreTrainedModel, backend: Backend) -> None:
        self._model: Any = model
        with_cuda_graphs = backend == "inductor" and model.device.type == "cuda"
        # Models of one family run the same code, and would share its limit of graphs. Older torch knows neither option.
        limits = {"isolate_recompiles": True, "recompile_limit": _NUM_GRAPHS}
        known = inspect.signature(torch.compile).parameters
        compile_with: Any = torch.compile
        self._graph: Any = compile_with(
            model.__call__,
            backend=backend,
            mode="reduce-overhead" if with_cuda_graphs else None,
            dynamic=False,
            **{name: value for name, value in limits.items() if name in known},
        )

    def takes(self, cache: Cache | None) -> bool:
        """Whether `cache` is static; the graph is for steps of one token behind what it holds."""
        return isinstance(cache, StaticCache)

    def __call__(self, **inputs: Any) -> CausalLMOutputWithPast:
        """Return what the model's forward returns. The attention mask is given for tokens, (rows, past + new)."""
        if inputs["input_ids"].shape[1] > 1 or not inputs["past_key_values"].is_initialized:
            prefilled: CausalLMOutputWithPast = self._model(**self._model.prepare_inputs_for_generation(**inputs))
            return prefilled
        positions = inputs.get("position_ids")
        if positions is not None:  # a slice has the strides of its prompt, which a graph would be compiled anew for
            inputs["position_ids"] = positions.clone(memory_format=torch.contiguous_format)
        stepped: CausalLMOutputWithPast = self._graph(**self._model.prepare_inputs_for_generation(**inputs))
        return stepped


class CompiledMembers:
    """The compiled steps of an ensemble's members, and the static caches that they run on."""

    def __init__(self, backend: Backend = "inductor") -> None:
        """`backend` is one of torch.compile. Raises ConfigError where it needs a C++ compiler and there is none."""
        if backend == "inductor":
            check_compiler()
        self._backend = backend
        self._steps: dict[int, CompiledStep] = {}
        self._kept: tuple[object, EnsembleCache] | None = None

    def plan(self, groups: Sequence[Group], backbones: Sequence[Backbone]) -> list[Group]:
        """Return `groups` with their steps compiled, but for members that cannot be, which are said."""
        views = [view for backbone in backbones for view in backbone.views.values()]
        return [tuple(self._compiled(forward, views) for forward in group) for group in groups]

    def _compiled(self, forward: Forward, views: Sequence[PreTrainedModel]) -> Forward:
        reason = _obstacle(forward.model, views)
        if reason is not None:
            _logger.warning("%s runs without --compile: %s", " and ".join(forward.roles), reason)
            return forward
        return replace(forward, decode=CompiledStep(forward.model, self._backend))

    @staticmethod
    def begin_step() -> None:
        """Say that a step begins: the logits that CUDA graphs made stay whole until the next, whoever runs after."""
        if torch.cuda.is_available():
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]

    def cache(self, groups: Sequence[Group], num_rows: int, num_positions: int) -> EnsembleCache:
        """Return an empty cache for `num_rows` texts of at most `num_positions`, growing for members not compiled.

        It is the one of the call before, emptied, where that has the same rows and bucket: what a graph has recorded
        stays where it is. The texts of that call are gone from it.
        """
        length = bucket(num_positions)
        forwards = [forward for group in groups for forward in group]
        places = tuple((id(forward.model), forward.model.dtype, forward.model.device) for forward in forwards)
        key = (num_rows, length, places, torch.is_inference_mode_enabled())
        if self._kept is None or self._kept[0] != key:
            self._kept = None  # before the next is allocated
            self._kept = key, EnsembleCache({forward.roles: _new_cache(forward, length) for forward in forwards})
        self._kept[1].reset()
        return self._kept[1]


def _new_cache(forward: Forward, length: int) -> Cache:
    if forward.decode is None:
        return DynamicCache(config=forward.model.config)
    cache = StaticCache(config=forward.model.config.get_text_config(decoder=True), max_cache_len=length)
    # Sliding windows keep everything too, and masks cut them: a rolling window counts on the host, and is compiled anew
    # with each count.
    cache.layers = [StaticLayer(max_cache_len=length) for _ in cache.layers]
    return cache


def _obstacle(model: Any, views: Sequence[PreTrainedModel]) -> str | None:
    """Why the steps of a model cannot be compiled, or None."""
    if any(view is model for view in views):
        return "its adapter is switched on weights that it shares"
    if hasattr(model, "_orig_mod"):
        return "it is compiled already"
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_compileable:
        return f"its quantisation ({quantizer.quantization_config.quant_method}) does not take part"
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return "it is spread over devices"
    kinds = (StaticLayer, StaticSlidingWindowLayer)
    static = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=1)
    is_plain = all(type(layer) in kinds for layer in static.layers)
    return (
        None
        if is_plain and getattr(model, "_can_compile_fullgraph", False)
        else f"{type(model).__name__} keeps no static cache"
    )


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
