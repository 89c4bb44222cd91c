"""Sizes of members before they are loaded, from configs and file headers.

Models are built on the meta device, which holds no memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import floor
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from ensembler.engine.members import MemberFiles, group_members
from ensembler.errors import MemberError
from ensembler.files import find_folder, one_line
from ensembler.planning.sizes import Block, GroupSizes, LayerCache, ModelSizes
from ensembler.preflight import CheckedEnsemble
from ensembler.quantization import Quantization
from ensembler.safetensors_files import stored_tensors, weight_files

_KEPT_BY_QUANTIZERS = 0.9  # transformers uses this part of max_memory where bitsandbytes quantises


@dataclass(frozen=True)
class Share:
    """A device's share of a model: bytes with its part of the KV cache, and its limit as max_memory wants it."""

    num_bytes: int
    limit: str


@dataclass(frozen=True)
class Pieces:
    """The pieces of a model in their order.

    `exact`: bytes with the KV cache. `sizes`: bytes of the weights as transformers counts them, times `error`, so that
    none is too small; the scales of quantised weights are not counted there. `weights`: the smallest fraction of a
    piece that is weights and not KV cache. `kept`: the part of max_memory that transformers uses.
    """

    exact: tuple[int, ...]
    sizes: tuple[float, ...]
    error: float
    weights: float
    kept: float

    @classmethod
    def of(cls, blocks: Sequence[Block], method: Quantization | None, *, context: int, rows: int) -> Pieces:
        """Measure `blocks` for `rows` rows (all members of the group together) of `context` tokens."""
        exact = [block.num_bytes(method) for block in blocks]
        caches = [block.cache_bytes(context) * rows for block in blocks]
        estimates = [block.estimate(method) for block in blocks]
        error = max((size / counted for size, counted in zip(exact, estimates, strict=True) if counted), default=1.0)
        sizes = tuple(counted * error for counted in estimates)
        both = [(size, size + cache) for size, cache in zip(sizes, caches, strict=True)]
        return cls(
            exact=tuple(size + cache for size, cache in zip(exact, caches, strict=True)),
            sizes=sizes,
            error=error,
            weights=min((size / total for size, total in both if total), default=1.0),
            kept=1.0 if method is None else _KEPT_BY_QUANTIZERS,
        )


def spread(pieces: Pieces, room: Mapping[str, int]) -> dict[str, Share] | None:
    """Return the share of each device of which `room` bytes are free, or None where the model does not fit."""
    limits = {device: free * pieces.weights for device, free in room.items() if free > 0}
    placed = _fill(pieces.sizes, limits)
    if placed is None:
        return None
    first = next(iter(limits))
    if placed[0] != first:  # a device that gets nothing is not named, and the next is then the first
        return spread(pieces, {**room, first: 0})
    used: dict[str, int] = {}
    for device, num_bytes in zip(placed, pieces.exact, strict=True):
        used[device] = used.get(device, 0) + num_bytes
    return {
        device: Share(num_bytes, f"{floor(limits[device] / pieces.error / pieces.kept / 2**10)}KiB")
        for device, num_bytes in used.items()
    }


def _fill(sizes: Sequence[float], limits: Mapping[str, float]) -> list[str] | None:
    """The device of each piece, or None where they do not fit."""
    devices = list(limits)
    largest_left = list(accumulate(reversed(sizes), max))[::-1]
    placed: list[str] = []
    current, used = 0, 0.0
    for size, largest in zip(sizes, largest_left, strict=True):
        while current < len(devices):
            reserve = largest if current == 0 else 0
            if used + size + reserve <= limits[devices[current]] - 2**10:  # limits are written in whole KiB
                break
            current, used = current + 1, 0.0
        else:
            return None
        used += size
        placed.append(devices[current])
    return placed


_TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def measure(checked: CheckedEnsemble) -> list[GroupSizes]:
    """The sizes of the groups that `checked` would be loaded as."""
    anchor = checked.config.get_rule().anchor
    return [measure_group(group, anchor) for group in group_members(checked.files)]


def loaded_bytes(models: Iterable[nn.Module]) -> int:
    """Bytes that loaded models hold together: parameters, buffers, scales of quantised weights; shared ones once."""
    found: dict[int, int] = {}
    for module in (module for model in models for module in model.modules()):
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            state = getattr(tensor, "quant_state", None)
            scales = [
                getattr(tensor, "SCB", None),
                *_state_tensors(state),
                *_state_tensors(getattr(state, "state2", None)),
            ]
            for part in (tensor, *scales):
                if isinstance(part, Tensor):
                    found[part.data_ptr()] = part.nbytes
    return sum(found.values())


def _state_tensors(state: Any) -> list[Any]:
    return [] if state is None else [value for value in vars(state).values() if isinstance(value, Tensor)]


def measure_group(group: Sequence[MemberFiles], anchor: str) -> GroupSizes:
    """Return the sizes of members that `group_members` put together. Raises MemberError."""
    first = group[0]
    config = first.config
    is_free = config.device == "cpu"  # the default: a member that was put elsewhere stays there
    return GroupSizes(
        roles=tuple(member.role for member in group),
        name=config.model,
        model=measure_model(
            first.model_config, member_dtype(first), role=first.role, trust_remote_code=first.trust_remote_code
        ),
        adapters={member.role: member.adapter.num_parameters for member in group if member.adapter is not None},
        quantization=config.quantization,
        device=None if is_free else config.device,
        is_anchor=any(member.role == anchor for member in group),
    )


def measure_model(model_config: Any, dtype: str, *, role: str = "model", trust_remote_code: bool = False) -> ModelSizes:
    """Return the sizes of the model that `model_config` describes, loaded in `dtype` ('bfloat16' ...).

    Raises MemberError for a checkpoint that is stored quantised, or a model that cannot be built.
    """
    if getattr(model_config, "quantization_config", None) is not None:
        raise MemberError(
            f"{role}: its checkpoint is stored quantised, and what that takes cannot be told from its config; give the "
            "plain checkpoint"
        )
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                model_config, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
            )
    except Exception as error:  # models' own code raises what it likes
        raise MemberError(f"{role}: its model cannot be built from its config: {one_line(error)}") from error
    model.eval()
    return ModelSizes(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=dtype,
        width=model.get_output_embeddings().weight.shape[0],
        blocks=tuple(_measure_blocks(model, _layer_caches(model, getattr(torch, dtype).itemsize))),
    )


def member_dtype(files: MemberFiles) -> str:
    """The dtype that a member is loaded in; 'auto' as in transformers: the model's config's, then the file's."""
    if files.config.dtype != "auto":
        return files.config.dtype
    dtype = files.model_config.dtype
    if dtype is None:
        stored = stored_parameters(files.config.model, files.config.revision)
        dtype = stored.most_common(1)[0][0] if stored else "float32"
    return str(dtype).removeprefix("torch.")


def stored_parameters(model: str, revision: str | None) -> Counter[str]:
    """Numbers of parameters by dtype, from the headers of a model's files; empty where it is not on this machine."""
    stored = Counter[str]()
    try:
        folder = find_folder(model, revision=revision, local_files_only=True)
    except MemberError:
        return stored
    for file in weight_files(folder):
        for tensor in stored_tensors(file).values():
            stored[_TORCH_NAMES.get(tensor.dtype, tensor.dtype)] += tensor.num_elements
    return stored


def _measure_blocks(model: PreTrainedModel, caches: Sequence[LayerCache]) -> Iterator[Block]:
    """The pieces in the order of the modules; tied weights belong to the first that has them."""
    kept = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or ())]
    whole = set(model._no_split_modules or ())
    pieces = list(_pieces(model, "", whole))
    layers = [index for index, (module, _) in enumerate(pieces) if type(module).__name__ in whole]
    shares: dict[int, list[LayerCache]] = {index: [] for index in layers or [0]}
    for number, cache in enumerate(caches):
        shares[list(shares)[number * len(shares) // len(caches)]].append(cache)
    seen: set[int] = set()
    for index, (_, modules) in enumerate(pieces):
        plain, linear, itemsize = 0, [], model.dtype.itemsize
        for name, module in modules:
            converts = type(module) in (nn.Linear, Conv1D) and should_convert_module(name, kept)
            for part, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if id(tensor) in seen:
                    continue
                seen.add(id(tensor))
                if converts and part == "weight":
                    rows = tensor.shape[1] if isinstance(module, Conv1D) else tensor.shape[0]
                    linear.append((tensor.numel(), rows))
                else:
                    plain += tensor.nbytes
        if plain or linear or shares.get(index):
            yield Block(plain, tuple(linear), itemsize, tuple(shares.get(index, ())))


def _pieces(module: nn.Module, name: str, whole: set[str]) -> Iterator[tuple[nn.Module, list[tuple[str, nn.Module]]]]:
    """Modules that are not split, each with the named modules in it."""
    if type(module).__name__ in whole:
        yield module, list(module.named_modules(prefix=name))
        return
    yield module, [(name, module)]
    for child_name, child in module.named_children():
        yield from _pieces(child, f"{name}.{child_name}".lstrip("."), whole)


def _layer_caches(model: PreTrainedModel, itemsize: int) -> list[LayerCache]:
    """The cache of each layer: that of a forward of one token without memory, or from the head counts of the config."""
    cache = DynamicCache(config=model.config)
    try:
        with torch.device("meta"), torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
        return [_layer_cache(layer) for layer in cache.layers]
    except Exception:  # a forward that looks at values (GPT-2's does) cannot run without them
        return _from_head_counts(model, itemsize)


def _layer_cache(layer: Any) -> LayerCache:
    states = [layer.keys, layer.values] if getattr(layer, "keys", None) is not None else []
    others = [tensor for name, value in vars(layer).items() if name.endswith("states") for tensor in _tensors(value)]
    return LayerCache(sum(tensor.nbytes for tensor in states), _window(layer), sum(tensor.nbytes for tensor in others))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(entry)


def _window(layer: Any) -> int | None:
    """Tokens that a sliding layer keeps: the newest token of a full window is not among them."""
    window = getattr(layer, "sliding_window", None)
    return None if window is None else int(window) - 1


def _from_head_counts(model: PreTrainedModel, itemsize: int) -> list[LayerCache]:
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    num = getattr(config, "num_key_value_heads", None) or heads
    layers = DynamicCache(config=model.config).layers or [None] * config.num_hidden_layers
    return [LayerCache(2 * num * width * itemsize, _window(layer)) for layer in layers]
