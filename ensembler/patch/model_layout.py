"""The weights of a model as transformers builds it from config.json, and their names on disk. Reads no weights.

Patches name weights as the loaded model does. Its files may call them otherwise, keep several as one, and hold more
than the class builds: layers for other uses, old buffers, a copy of a tied head. All of that is known to the class.
"""

from __future__ import annotations

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

from ensembler.safetensors_files import StoredModel

# Classes that adapters are trained on, beside the one that saved the model.
_MAPPINGS = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
# Layers that PEFT gives a LoRA, with the way that their weight lies: (out, in), (in, out), (tokens, width).
_KINDS: dict[type[nn.Module], str] = {nn.Linear: "linear", Conv1D: "transposed", nn.Embedding: "embedding"}


@dataclass(frozen=True)
class ModelLayout:
    """The weights of one class of model.

    `weights`: all names in the loaded model. `stored`: name on disk of each that lies there as it is when loaded.
    `fused`: tensors on disk that are put together or turned when they are loaded. `kinds`: 'linear', 'transposed'
    (in, out) or 'embedding' of the weights of such layers. `tied`: the names of one tensor, for each of them.
    `token_weights`: those with a row for each token. `decoder`: the module that a text model alone is called.
    `is_known`: transformers has the class; otherwise names are those on disk.
    """

    weights: frozenset[str]
    stored: Mapping[str, str]
    fused: frozenset[str]
    kinds: Mapping[str, str]
    tied: Mapping[str, tuple[str, ...]]
    token_weights: frozenset[str]
    decoder: str = ""
    rename: Callable[[str], str] = str
    is_known: bool = True

    def find(self, name: str) -> str | None:
        """Return the loaded name of a weight that a patch or a file calls `name`, or None where there is none.

        Older versions of the class, and its text model alone, call it otherwise.
        """
        names = (name, self.rename(name), f"{self.decoder}.{name.partition('.')[2]}")
        return next((each for each in names if each in self.weights), None)

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
    classes += [mapping.get(type(config), None) for mapping in _MAPPINGS]
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
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix
    loaded = {name: rename_source_key(name, renamings, converters, prefix, built) for name in sorted(tensors)}
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    rows = {id(end.weight) for end in ends if isinstance(getattr(end, "weight", None), nn.Parameter)}
    decoder = model.get_decoder()
    return ModelLayout(
        weights=frozenset(weights),
        stored={name: disk for disk, (name, converter) in loaded.items() if converter is None and name in weights},
        fused=frozenset(disk for disk, (_, converter) in loaded.items() if converter is not None),
        kinds=kinds,
        tied={name: tuple(names) for names in same.values() if len(names) > 1 for name in names},
        token_weights=frozenset(name for name, weight in weights.items() if id(weight) in rows),
        decoder=next((name for name, module in model.named_modules() if module is decoder), ""),
        rename=lambda name: rename_source_key(name, renamings, [], prefix, built)[0],
    )


def _as_stored(model: StoredModel) -> ModelLayout:
    """Return a layout by the files alone; a model that does not say otherwise ties what has a row for each token."""
    text = model.config.get("text_config") or model.config
    width = text.get("vocab_size")
    ends = [name for name, each in model.tensors.items() if len(each.shape) == 2 and each.shape[0] == width]
    is_tied = False not in (text.get("tie_word_embeddings"), model.config.get("tie_word_embeddings"))
    return ModelLayout(
        weights=frozenset(model.tensors),
        stored={name: name for name in model.tensors},
        fused=frozenset(),
        kinds={},
        tied={name: (name, "the other end of the model") for name in ends} if is_tied else {},
        token_weights=frozenset(ends),
        is_known=False,
    )
