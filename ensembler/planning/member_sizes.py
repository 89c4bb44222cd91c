"""Sizes of members before they are loaded, from configs and file headers.

Models are built on the meta device, which holds no memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from ensembler.safetensors_files import stored_tensors, weight_files

_TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def measure(checked: CheckedEnsemble) -> list[GroupSizes]:
    """Return the sizes of the groups that `checked` would be loaded as. Raises MemberError."""
    anchor = checked.config.get_rule().anchor
    return [measure_group(group, anchor) for group in group_members(checked.files)]


def predicted_bytes(group: Sequence[MemberFiles]) -> int | None:
    """Return the bytes that a group's weights take when they are loaded; None where its files do not say."""
    config = group[0].config
    try:
        sizes = measure_group(group, group[0].role)
    except MemberError:
        return None
    return sizes.weight_bytes(config.quantization, is_spread=config.device_map is not None)


def loaded_bytes(models: Iterable[nn.Module]) -> int:
    """Return bytes that loaded models hold: parameters, buffers, scales of quantised weights; shared ones once."""
    found: dict[int, int] = {}
    for module in (module for model in models for module in model.modules()):
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            state = getattr(tensor, "quant_state", None)
            held = [tensor, getattr(tensor, "SCB", None)]
            for scales in (state, getattr(state, "state2", None)):
                held += [] if scales is None else vars(scales).values()
            found |= {each.data_ptr(): each.nbytes for each in held if isinstance(each, Tensor)}
    return sum(found.values())


def measure_group(group: Sequence[MemberFiles], anchor: str) -> GroupSizes:
    """Return the sizes of members that `group_members` put together. Raises MemberError."""
    first, config = group[0], group[0].config
    return GroupSizes(
        roles=tuple(member.role for member in group),
        name=config.model,
        model=measure_model(
            first.model_config, member_dtype(first), role=first.role, trust_remote_code=first.config.trust_remote_code
        ),
        adapters={member.role: member.adapter.num_parameters for member in group if member.adapter is not None},
        quantization=config.quantization,
        device=None if config.device == "cpu" else config.device,  # 'cpu' is the default, not a choice
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
        blocks=tuple(_measure_blocks(model, _layer_caches(model))),
    )


def member_dtype(files: MemberFiles) -> str:
    """Return the dtype that a member is loaded in; 'auto' as in transformers: that of the config, then of the file."""
    if files.config.dtype != "auto":
        return files.config.dtype
    dtype = files.model_config.dtype
    if dtype is None:
        stored = stored_parameters(files.config.model, files.config.revision)
        dtype = stored.most_common(1)[0][0] if stored else "float32"
    return str(dtype).removeprefix("torch.")


def stored_parameters(model: str, revision: str | None) -> Counter[str]:
    """Return numbers of parameters by dtype, from the headers of a model's files; empty where they are not here."""
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
    """Yield the blocks in the order of the modules; tied weights belong to the first that has them."""
    kept = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or ())]
    whole = set(model._no_split_modules or ())
    blocks = list(_unsplit(model, "", whole))
    layers = [index for index, (module, _) in enumerate(blocks) if type(module).__name__ in whole] or [0]
    of_blocks: dict[int, list[LayerCache]] = {index: [] for index in range(len(blocks))}
    for number, cache in enumerate(caches):
        of_blocks[layers[number * len(layers) // len(caches)]].append(cache)
    seen: set[int] = set()
    for index, (_, modules) in enumerate(blocks):
        plain, linear = 0, []
        for name, module in modules:
            converts = type(module) in (nn.Linear, Conv1D) and should_convert_module(name, kept)
            for attribute, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if id(tensor) in seen:
                    continue
                seen.add(id(tensor))
                if converts and attribute == "weight":
                    linear.append((tensor.numel(), tensor.shape[1 if isinstance(module, Conv1D) else 0]))
                else:
                    plain += tensor.nbytes
        if plain or linear or of_blocks[index]:
            yield Block(plain, tuple(linear), model.dtype.itemsize, tuple(of_blocks[index]))


def _unsplit(module: nn.Module, name: str, whole: set[str]) -> Iterator[tuple[nn.Module, list[tuple[str, nn.Module]]]]:
    """Yield the modules that are not split, each with the named modules in it."""
    if type(module).__name__ in whole:
        yield module, list(module.named_modules(prefix=name))
        return
    yield module, [(name, module)]
    for child_name, child in module.named_children():
        yield from _unsplit(child, f"{name}.{child_name}".lstrip("."), whole)


def _layer_caches(model: PreTrainedModel) -> list[LayerCache]:
    """Return the cache of each layer after a forward of one token without memory, or from the config's head counts."""
    cache = DynamicCache(config=model.config)
    try:
        with torch.device("meta"), torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
        return [_layer_cache(layer) for layer in cache.layers]
    except Exception:  # a forward that looks at values (GPT-2's does) cannot run without them
        config = model.config.get_text_config(decoder=True)
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        num = getattr(config, "num_key_value_heads", None) or heads
        layers = DynamicCache(config=model.config).layers or [None] * config.num_hidden_layers
        return [LayerCache(2 * num * width * model.dtype.itemsize, _window(layer)) for layer in layers]


def _layer_cache(layer: Any) -> LayerCache:
    states = [layer.keys, layer.values] if getattr(layer, "keys", None) is not None else []
    fixed = [value for name, value in vars(layer).items() if name.endswith("states")]
    return LayerCache(_nbytes(states), _window(layer), _nbytes(fixed))


def _nbytes(value: Any) -> int:
    """Return the bytes of all tensors in nested lists and mappings."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        value = list(value.values())
    return sum(map(_nbytes, value)) if isinstance(value, list | tuple) else 0


def _window(layer: Any) -> int | None:
    """Return how many tokens a sliding layer keeps: the newest token of a full window is not among them."""
    window = getattr(layer, "sliding_window", None)
    return None if window is None else int(window) - 1
