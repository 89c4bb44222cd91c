"""Add an adapter or another patch to the weights of a loaded model, with the arithmetic of `patch apply`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ensembler.adapters import CheckedAdapter
from ensembler.patch.changes import load_change, patch_in_place
from ensembler.patch.formats import Patch


def merge_adapter(model: PreTrainedModel, adapter: CheckedAdapter) -> PreTrainedModel:
    """Add the update to the weights, so that one forward costs what the base costs; return the model.

    θ′ + Δθ in fp32, rounded once (PortLLM, eq. 6): the weights that `patch apply` would write. What is no sum with the
    weights (DoRA ...), or concerns one of two tied layers, is left to PEFT. Raises PatchError where a value is damaged.
    """
    if adapter.patch is None:
        return _merge_with_peft(model, adapter.path)
    if _is_sum(model, adapter.patch):
        _add(model, adapter.patch, adapter.patch.names)
        return model
    add_deltas(model, adapter)
    return _merge_with_peft(model, adapter.path)


def add_deltas(model: PreTrainedModel, adapter: CheckedAdapter) -> None:
    """Add the full deltas of a patch, and leave its LoRA alone. Raises ValueError where a weight is quantised or away.

    A LoRA runs beside weights of any kind; what PEFT has no place for must go into them.
    """
    if adapter.patch is not None:
        _add(model, replace(adapter.patch, low_rank={}, replaced={}), adapter.deltas)


def deltas_added(known: Mapping[str, Tensor], adapter: CheckedAdapter) -> dict[str, Tensor]:
    """Return copies of the weights that full deltas concern, by name, with the deltas added."""
    if adapter.patch is None:
        return {}
    added = {name: _writable(name, known[name]).detach().clone() for name in adapter.deltas}
    for name, weight in added.items():
        patch_in_place(weight, load_change([(adapter.patch, 1.0)], name))
    return added


def _weights(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


def _is_sum(model: PreTrainedModel, patch: Patch) -> bool:
    """Return whether every weight is there under its name, and none that is trained apart is tied to another layer."""
    weights = _weights(model)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is embeddings.weight
    apart = {*patch.low_rank, *patch.replaced}
    return patch.names <= weights.keys() and not (tied and any(weights[name] is head.weight for name in apart))


def _add(model: PreTrainedModel, patch: Patch, names: Iterable[str]) -> None:
    weights = _weights(model)
    # As PEFT, by the kind of each layer: a LoRA saves the fan_in_fan_out of its last layer alone.
    low_rank = {
        name: factors if factors.is_embedding else replace(factors, transposed=_is_turned(model, name))
        for name, factors in patch.low_rank.items()
    }
    patch = replace(patch, low_rank=low_rank)
    for name in names:
        patch_in_place(_writable(name, weights[name]), load_change([(patch, 1.0)], name))


def _is_turned(model: PreTrainedModel, name: str) -> bool:
    """Return whether the layer of this weight keeps it as (in, out)."""
    return isinstance(model.get_submodule(name.removesuffix(".weight")), Conv1D)


def _writable(name: str, weight: Tensor) -> Tensor:
    if weight.is_meta or not weight.is_floating_point():
        where = "on disk or offloaded" if weight.is_meta else f"quantised ({weight.dtype})"
        raise ValueError(
            f"the patch holds a full delta for {name}, whose weight is {where}; add the patch to the files first: "
            "ensembler patch apply"
        )
    return weight


def _merge_with_peft(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    from peft import PeftModel
    from peft.utils.constants import EMBEDDING_LAYER_NAMES

    patched = PeftModel.from_pretrained(model, adapter)
    targets = {name.rpartition(".")[2] for name in patched.base_model.targeted_module_names}
    if targets & set(EMBEDDING_LAYER_NAMES):
        _untie(model)
    merged: PreTrainedModel = patched.merge_and_unload(safe_merge=True)
    return merged


def _untie(model: PreTrainedModel) -> None:
    """Give the head weights of its own: an update of the one layer is none of the other."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    head, embeddings = (getattr(layer, "base_layer", layer) for layer in (head, embeddings))
    if head is None or head.weight is not embeddings.weight:
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in (model.config, model.config.get_text_config(decoder=True)):
        config.tie_word_embeddings = False
