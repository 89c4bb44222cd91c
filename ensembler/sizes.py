"""Bytes of members before they are loaded: weights, quantised weights, adapters, KV cache, logits.

Everything is told from configs and file headers, on models that are built on the meta device, which holds no memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from ensembler.errors import MemberError
from ensembler.members import MemberFiles
from ensembler.quantization import Quantization
from ensembler.sources import is_local, one_line
from ensembler.weights import safetensors_header, weight_files

_TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_LOGIT_BYTES = 4  # combined in fp32, whatever the member's dtype
_BLOCK_4BIT, _BLOCK_OF_SCALES = 64, 256  # weights per scale, and scales per scale of scales, in bitsandbytes
_CODE_4BIT, _CODE_8BIT = 16 * 4, 256 * 4  # bytes of the tables that each quantised layer keeps


@dataclass(frozen=True)
class LayerCache:
    """The KV cache of one layer and one row: bytes per token, at most `window` tokens (None: all), and what is fixed
    (a recurrent state).
    """

    per_token: int
    window: int | None = None
    fixed: int = 0

    def num_bytes(self, length: int) -> int:
        """Bytes of one row of `length` tokens."""
        return self.fixed + self.per_token * (length if self.window is None else min(length, self.window))


@dataclass(frozen=True)
class Block:
    """A piece of a model that stays on one device: a decoder layer, an embedding, a head.

    `plain`: bytes of what is never quantised. `linear`: (weights, output rows) of each layer that can be, `itemsize`
    bytes a weight as long as it is not. `cache`: of the decoder layers in it.
    """

    plain: int
    linear: tuple[tuple[int, int], ...] = ()
    itemsize: int = 2
    cache: tuple[LayerCache, ...] = ()

    def num_bytes(self, quantization: Quantization | None = None) -> int:
        """Bytes of the weights."""
        return self.plain + sum(
            num * self.itemsize if quantization is None else _quantised(num, rows, quantization)
            for num, rows in self.linear
        )

    def estimate(self, quantization: Quantization | None = None) -> float:
        """Bytes as transformers counts them when it spreads a model: quantised weights without their scales."""
        each = self.itemsize if quantization is None else quantization.bits / 8
        return self.plain + sum(num * each for num, _ in self.linear)

    def cache_bytes(self, length: int) -> int:
        """Bytes of the KV cache of one row of `length` tokens."""
        return sum(layer.num_bytes(length) for layer in self.cache)


@dataclass(frozen=True)
class ModelSizes:
    """One copy of a model's weights: parameters (tied ones once), dtype, logits per row, pieces in their order."""

    parameters: int
    dtype: str
    width: int
    blocks: tuple[Block, ...]

    def num_bytes(self, quantization: Quantization | None = None) -> int:
        """Bytes of parameters, buffers and scales once loaded."""
        return sum(block.num_bytes(quantization) for block in self.blocks)

    def cache_bytes(self, length: int) -> int:
        """Bytes of the KV cache of one row of `length` tokens."""
        return sum(block.cache_bytes(length) for block in self.blocks)

    @property
    def cache_per_token(self) -> int:
        """Bytes that a token adds to the KV cache of one row, as long as no sliding window is full."""
        return sum(layer.per_token for block in self.blocks for layer in block.cache)


@dataclass(frozen=True)
class GroupSizes:
    """Members on one copy of the weights.

    `adapters`: parameters of each member's adapter, by role. `quantization`: what the user chose, which stays.
    `device`: where the user put the group, or None where it may be placed. `is_anchor`: the logits of all members are
    combined beside this group.
    """

    roles: tuple[str, ...]
    name: str
    model: ModelSizes
    adapters: Mapping[str, int]
    quantization: Quantization | None = None
    device: str | None = None
    is_anchor: bool = False

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the adapters where they are kept beside the weights."""
        return sum(self.adapters.values()) * int(getattr(torch, self.model.dtype).itemsize)

    def weight_bytes(self, quantization: Quantization | None = None, *, spread: bool = False) -> int:
        """Bytes of the weights, and of the adapters that are kept beside them (one alone is merged where it can be)."""
        beside = len(self.roles) > 1 or quantization is not None or spread
        return self.model.num_bytes(quantization) + (self.adapter_bytes if beside else 0)

    def cache_bytes(self, context: int, batch_size: int) -> int:
        """Bytes of the KV cache at this length: every member has rows of its own."""
        return self.model.cache_bytes(context) * batch_size * len(self.roles)


def logits_bytes(groups: Sequence[GroupSizes], batch_size: int) -> dict[tuple[str, ...], int]:
    """Bytes of the last position's logits by group: its members' own; beside the anchor all others' and the result."""
    own = {group.roles: group.model.width * len(group.roles) * batch_size * _LOGIT_BYTES for group in groups}
    total = sum(own.values())
    return {
        group.roles: total + group.model.width * batch_size * _LOGIT_BYTES if group.is_anchor else own[group.roles]
        for group in groups
    }


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
    folder = Path(model) if is_local(model) else _cached(model, revision)
    stored = Counter[str]()
    for file in [] if folder is None else weight_files(folder):
        for tensor in safetensors_header(file).values():
            stored[_TORCH_NAMES.get(tensor["dtype"], tensor["dtype"])] += prod(tensor["shape"])
    return stored


def _cached(model: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, OSError):
        return None


def _quantised(num: int, rows: int, quantization: Quantization) -> int:
    """Bytes of a layer of `num` weights and `rows` outputs as bitsandbytes keeps it, its scales and tables included."""
    if quantization.bits == 8:
        return num + 4 * rows
    scales = ceil(num / _BLOCK_4BIT)
    kept = 4 * scales
    if quantization.double_quant:  # a byte per scale, fp32 for 256 of them, their mean and a table
        kept = scales + 4 * ceil(scales / _BLOCK_OF_SCALES) + 4 + _CODE_8BIT
    return ceil(num / 2) + kept + _CODE_4BIT


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
