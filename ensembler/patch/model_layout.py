"""The weights of a model as transformers builds it from config.json, and their names on disk. Reads no weights.

Patches name weights as the loaded model does. Its files may call them otherwise, keep several as one, and hold more
than the class builds: layers for other uses, old buffers, a copy of a tied head. All of that is known to the class.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from inspect import signature

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)
from transformers.pytorch_utils import Conv1D

from ensembler.patch.boxes import Shape
from ensembler.patch.conversions import Conversions, Place
from ensembler.safetensors_files import StoredModel

# Classes that adapters are trained on, beside the one that saved the model.
MAPPINGS = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
# Layers that PEFT gives a LoRA, with the way that their weight lies: (out, in), (in, out), (tokens, width).
_KINDS: dict[type[nn.Module], str] = {nn.Linear: "linear", Conv1D: "transposed", nn.Embedding: "embedding"}
# Names of the text model in models of images and text, of today and of before.
_INSIDE = re.compile(r"^(?:model\.language_model|language_model\.model)\.|^language_model\.(?=lm_head\.)")


@dataclass(frozen=True)
class ModelLayout:
    """The weights of one class of model.

    `weights`: the shapes of all in the loaded model, in its order. `stored`: name on disk of each that lies there as it
    is when loaded. `fused`: tensors on disk that are put together or turned when they are loaded. `kinds`: 'linear',
    'transposed' (in, out) or 'embedding' of the weights of such layers. `tied`: the names of one tensor, for each of
    them. `token_weights`: those with a row for each token. `unused`: tensors on disk that are not loaded. `text_model`:
    of a model of images and text, the prefix of names in its text model alone, and the prefix that they have in this
    one. `names`: the loaded names that a weight of some name may have. `turned`: stacks of matrices that the class
    keeps as (matrices, in, out), and that PEFT takes as such. `conversions`: what the class does to tensors when it
    loads them. `is_known`: transformers has the class; otherwise names are those on disk.
    """

    weights: Mapping[str, Shape]
    stored: Mapping[str, str]
    fused: frozenset[str]
    kinds: Mapping[str, str]
    tied: Mapping[str, tuple[str, ...]]
    token_weights: frozenset[str]
    conversions: Conversions
    unused: frozenset[str] = frozenset()
    text_model: tuple[str, str] | None = None
    names: Callable[[str], list[str]] = lambda name: [name]
    turned: frozenset[str] = frozenset()
    is_known: bool = True

    def find(self, name: str) -> str | None:
        """Return the loaded name of a weight that a patch or a file calls `name`, or None where there is none.

        Older versions of the class, and its text model alone, call it otherwise.
        """
        if name in self.unused:
            return None
        return next((each for each in self.names(name) if each in self.weights), None)

    def on_disk(self, name: str) -> list[str]:
        """Return the tensors on disk that a weight is loaded from as it is: of tied ones there may be two."""
        return [self.stored[each] for each in self.tied.get(name, (name,)) if each in self.stored]


def read_layouts(model: StoredModel) -> list[ModelLayout]:
    """Return the layouts of the classes that load this model: the one that saved it, then those of `transformers`.

    Builds them without memory. Code of a model's own is not run: its names are then those on disk.
    """
    try:
        config = AutoConfig.from_pretrained(model.folder, trust_remote_code=False)
    except Exception:  # unknown types, code of its own, damaged settings: each raises what it likes
        return [_as_stored(model)]
    classes = [getattr(transformers, name, None) for name in config.architectures or ()]
    classes += [mapping.get(type(config), None) for mapping in MAPPINGS]
    layouts = []
    for kind in dict.fromkeys(classes):
        if isinstance(kind, type) and issubclass(kind, PreTrainedModel):
            try:
                with torch.device("meta"):
                    built = kind(deepcopy(config))
            except Exception:  # the class is of another kind of config, or wants a package that is not here
                continue
            layouts.append(layout_of(built, model.tensors))
    return layouts or [_as_stored(model)]


def layout_of(model: PreTrainedModel, tensors: Iterable[str] = ()) -> ModelLayout:
    """Return the layout of a model in memory or on the meta device, whose files hold `tensors`."""
    built = model.state_dict()
    known = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    weights = {name: known[name] for name in built if name in known}
    same: dict[int, list[str]] = defaultdict(list)
    for name, weight in weights.items():
        same[id(weight)].append(name)
    kinds = {
        f"{name}.weight": kind
        for name, module in model.named_modules(remove_duplicate=False)
        for layer, kind in _KINDS.items()
        if isinstance(module, layer) and len(signature(type(module).forward).parameters) == 2  # itself, its input
    }
    conversions, names = _conversions(model, {name: tuple(weight.shape) for name, weight in weights.items()})
    loaded = {name: conversions.place_of(name) for name in sorted(tensors)}
    plain = {disk: place.weight for disk, place in loaded.items() if place.converter is None}
    return ModelLayout(
        weights=conversions.weights,
        stored={name: disk for disk, name in plain.items() if name in weights},
        fused=frozenset(loaded.keys() - plain.keys()),
        kinds=kinds,
        tied={name: tuple(names) for names in same.values() if len(names) > 1 for name in names},
        token_weights=token_weights(model),
        unused=frozenset(disk for disk, name in plain.items() if name not in weights),
        text_model=_text_model(model),
        names=names,
        turned=frozenset(
            f"{name}.{parameter}"
            for name, module in model.named_modules()
            if getattr(module, "is_transposed", False)
            for parameter, weight in module.named_parameters(recurse=False)
            if weight.dim() == 3
        ),
        conversions=conversions,
    )


def _conversions(
    model: PreTrainedModel, weights: Mapping[str, Shape]
) -> tuple[Conversions, Callable[[str], list[str]]]:
    """Return the conversions of a model's class, and a function that returns the loaded names a weight may have."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, built, text = model.base_model_prefix, model.state_dict(), _text_model(model)
    inside = _inner_prefix(model)

    def spellings(name: str) -> list[str]:
        found = [name]
        if text is not None and name.startswith(text[0]):
            found.append(text[1] + name.removeprefix(text[0]))
        elif text is not None and name.startswith("lm_head."):
            found.append(text[1].removesuffix(text[0]) + name)
        elif text is None and (match := _INSIDE.match(name)):  # a name in a model of images, and this is its text model
            rest = name[match.end() :]
            found.append(rest if rest.startswith("lm_head.") else inside + rest)
        return found

    def names(name: str) -> list[str]:
        return [
            each for one in spellings(name) for each in (one, rename_source_key(one, renamings, [], prefix, built)[0])
        ]

    def place(name: str) -> Place:
        for one in spellings(name):
            loaded, pattern = rename_source_key(one, renamings, converters, prefix, built)
            if loaded not in built and one in built:
                loaded, pattern = one, None
            if loaded in built and pattern is None:
                return Place(loaded)
            if loaded in built:
                renamed = rename_source_key(one, renamings, [])[0]
                number = re.search(pattern.replace("*.", r"(?P<number>\d+)\.", 1), renamed)
                found = number.groupdict().get("number") if number else None
                return Place(loaded, of_pattern[pattern], pattern, None if found is None else int(found))
        return Place(name)

    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", 0) or 0
    groups = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // max(1, heads)
    return Conversions(weights, str(config.model_type), (heads * width, groups * width), place), names


def token_weights(model: PreTrainedModel) -> frozenset[str]:
    """Return the names of the weights with a row for each token: those of the embedding and of the head."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    rows = {id(end.weight) for end in ends if isinstance(getattr(end, "weight", None), nn.Parameter)}
    parameters = model.named_parameters(remove_duplicate=False)
    return frozenset(name for name, weight in parameters if id(weight) in rows)


def _text_model(model: PreTrainedModel) -> tuple[str, str] | None:
    """Return the prefix of names in the text model of a model of images and text, alone and in it; None for others."""
    decoder = model.get_decoder()
    if model.config.get_text_config(decoder=True) is model.config or not isinstance(decoder, PreTrainedModel):
        return None
    inside = next((name for name, module in model.named_modules() if module is decoder), None)
    if not inside:
        return None
    inner = _inner_prefix(decoder)  # of a decoder with a head of its own, as in Llama 4
    return (inner, f"{inside}.{inner}") if inner else (f"{decoder.base_model_prefix}.", f"{inside}.")


def _inner_prefix(model: PreTrainedModel) -> str:
    """Return the prefix of the model inside one with a head; nothing for others."""
    return next((f"{name}." for name, child in model.named_children() if isinstance(child, PreTrainedModel)), "")


def _as_stored(model: StoredModel) -> ModelLayout:
    """Return a layout by the files alone. All weights with a row for each token count as tied where the config says so.

    Where it says nothing they are tied unless the files hold two with different values: a head of its own.
    """
    text = model.config.get("text_config") or model.config
    width = text.get("vocab_size")
    ends = [name for name, each in model.tensors.items() if len(each.shape) == 2 and each.shape[0] == width]
    said = [is_tied for each in (text, model.config) if (is_tied := each.get("tie_word_embeddings")) is not None]
    tensors = [model.tensors[name] for name in ends]
    is_tied = all(said) if said else all(tensor.has_values_of(tensors[0]) for tensor in tensors[1:])
    weights = {name: tensor.shape for name, tensor in model.tensors.items()}
    return ModelLayout(
        weights=weights,
        stored={name: name for name in model.tensors},
        fused=frozenset(),
        kinds={},
        tied={name: (name, "the other end of the model") for name in ends} if is_tied else {},
        token_weights=frozenset(ends),
        conversions=Conversions(weights, None, (0, 0), Place),
        is_known=False,
    )
