"""An adapter, or another patch, as part of a member: find its base, check that it fits."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.utils import logging

from ensembler.config import MemberConfig
from ensembler.errors import MemberError, PatchError
from ensembler.patch.formats import ADAPTER_PICKLE, ADAPTER_WEIGHTS, DELTAS, RECORD, Patch, read_patch
from ensembler.patch.headers import StoredTensor, listed
from ensembler.patch.settings import ADAPTER_CONFIG
from ensembler.sources import find_file, one_line
from ensembler.weights import naming, safetensors_header

DELTAS_ALONE = "DELTAS"  # the kind of a patch that has no adapter in it

# Other ways to initialise change the base's weights too, and only PEFT knows how.
_PLAIN_INIT = (True, False, "gaussian", "orthogonal", "eva")

_logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class CheckedAdapter:
    """An adapter, or another patch, whose files fit the member's base.

    `patch`: what it adds to which weights; None where only PEFT knows how to merge it. `kind` is PEFT's name of it.
    `scaling`, where it is plain LoRA: for each module that it changes, by name in the base, the number s of W + s·B·A
    (Hu et al. 2022; lora_alpha / r, or lora_alpha / √r with rslora, by module where patterns say so). None: anything
    else, which only PEFT knows how to run.
    """

    path: str
    kind: str
    scaling: dict[str, float] | None
    num_parameters: int
    patch: Patch | None = None

    @property
    def deltas(self) -> Mapping[str, StoredTensor]:
        """Full deltas by the name of the weight that they are added to: `patch extract` keeps them beside a LoRA."""
        return {} if self.patch is None else self.patch.full

    @property
    def is_deltas_alone(self) -> bool:
        """Return whether it has no LoRA, and so can only be added to weights and not be kept beside them."""
        return self.kind == DELTAS_ALONE

    def without_deltas(self) -> CheckedAdapter | None:
        """Return the rest of the patch once its full deltas are in the weights; None where nothing is left."""
        if self.patch is None or not self.deltas:
            return self
        return None if self.is_deltas_alone else replace(self, patch=replace(self.patch, full={}))


def resolve_adapter(role: str, config: MemberConfig) -> MemberConfig:
    """Return the base of a PEFT folder as the model and the folder as its adapter; other members as they are."""
    folder = Path(config.model)
    settings, key = folder / ADAPTER_CONFIG, "base_model_name_or_path"
    if not settings.is_file():
        settings, key = folder / RECORD, "base"
    if not settings.is_file() or (folder / "config.json").is_file():
        return config
    if config.adapter is not None:
        raise MemberError(f"{role}: {folder} is an adapter itself; give its base as the model, or merge the two first")
    base = _read_json(role, settings).get(key)
    if not base:
        raise MemberError(f"{role}: {settings} names no base model; set {key} in it")
    if (folder / base).is_dir():
        base = str((folder / base).resolve())
    return replace(config, model=base, adapter=config.model)


def check_adapter(role: str, adapter: str, model: str, model_config: Any) -> CheckedAdapter:
    """Compare names and shapes in the headers of an adapter or a patch with those of this base, built without memory.

    Raises MemberError; a base of another name is only said, since patches are meant to be carried to new bases.
    """
    found = {name: find_file(role, adapter, name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, DELTAS, RECORD)}
    patch = None
    if found[DELTAS] is not None or found[ADAPTER_WEIGHTS] is not None:
        patch = _read_patch(role, next(path for path in found.values() if path is not None).parent)
    if patch is not None and patch.full:
        patch = _check_deltas(role, patch, model, model_config)
    if patch is not None and found[ADAPTER_CONFIG] is None:
        if patch.base is not None and _is_other(patch.base, model):
            _logger.warning("%s: the patch %s was made for %s, not %s", role, adapter, patch.base, model)
        return CheckedAdapter(adapter, DELTAS_ALONE, None, _num_elements(patch.full), patch)
    checked = _check_with_peft(role, adapter, model, model_config)
    num_parameters = checked.num_parameters + (0 if patch is None else _num_elements(patch.full))
    return replace(checked, patch=patch, num_parameters=num_parameters)


def _is_other(base: str, model: str) -> bool:
    """Return whether two models have different names; where each is on disk says nothing."""
    return Path(base).name != Path(model).name


def _num_elements(tensors: Mapping[str, StoredTensor]) -> int:
    return sum(tensor.num_elements for tensor in tensors.values())


def _read_patch(role: str, folder: Path) -> Patch | None:
    """Return the changes that the folder adds to weights; None for an adapter of a kind that is no sum with them."""
    try:
        with naming(role):
            return read_patch(folder)
    except PatchError as error:
        if (folder / DELTAS).is_file():  # PEFT would leave them out
            raise MemberError(f"{role}: {error}") from error
        return None


def _check_deltas(role: str, patch: Patch, model: str, model_config: Any) -> Patch:
    """Return the patch with its full deltas under the names of the loaded model's weights, or raise MemberError."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(model_config)
    shapes = {name: tuple(weight.shape) for name, weight in base.named_parameters(remove_duplicate=False)}
    renamings = [entry for entry in get_model_conversion_mapping(base) if isinstance(entry, WeightRenaming)]
    names = {name: name if name in shapes else _renamed(name, renamings) for name in patch.full}
    patch = replace(patch, full={names[name]: delta for name, delta in patch.full.items()})
    missing = [name for name, loaded in names.items() if loaded not in shapes]
    if missing:
        raise MemberError(
            f"{role}: the patch {patch.folder} changes {listed(missing)}, which {model} does not have when it is "
            "loaded; it was made for another model, or is to be added on disk: ensembler patch apply"
        )
    for name, delta in patch.full.items():
        if delta.shape != shapes[name]:
            raise MemberError(
                f"{role}: {name} in the patch {patch.folder} has shape {delta.shape}; in {model} it has {shapes[name]}"
                ": it was made for another model"
            )
    return patch


def _renamed(name: str, renamings: Sequence[WeightRenaming]) -> str:
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


def _check_with_peft(role: str, adapter: str, model: str, model_config: Any) -> CheckedAdapter:
    from peft import get_peft_model_state_dict

    settings = _read_json(role, _find(role, adapter, ADAPTER_CONFIG))
    base = settings.get("base_model_name_or_path")
    is_other = base is not None and _is_other(str(base), model)
    weights = adapter_weights(role, adapter)
    with naming(role):
        header = safetensors_header(weights)
    patched = _on_meta(role, adapter, model, model_config)
    state = get_peft_model_state_dict(patched, save_embedding_layers=False)
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    base_tensors = patched.get_base_model().named_parameters(remove_duplicate=False)
    own = {base_name(name): tuple(tensor.shape) for name, tensor in base_tensors}
    found = {name: tuple(tensor["shape"]) for name, tensor in header.items()}
    _check_own_tensors(role, adapter, model, found, own)
    missing = sorted(expected.keys() - found.keys())
    unknown = sorted(name for name in found.keys() - expected.keys() if base_name(name) not in own)
    if missing or unknown:
        what = f"lacks {missing[0]}" if missing else f"changes {unknown[0]}, which is not there"
        hint = f"; give it its base, {base}" if is_other else ""
        raise MemberError(f"{role}: the adapter {adapter} was made for another base: for {model} it {what}{hint}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise MemberError(
                f"{role}: {name} in the adapter {adapter} has shape {found[name]}; for {model} it must be {shape}: it "
                "was made for another base"
            )
    if is_other:
        _logger.warning("%s: the adapter %s was made for %s, not %s", role, adapter, base, model)
    return CheckedAdapter(
        path=adapter,
        kind=patched.active_peft_config.peft_type.value,
        scaling=dict(_plain_scaling(patched)) if _is_plain(patched) else None,
        num_parameters=sum(tensor.numel() for tensor in state.values()),
    )


def _check_own_tensors(
    role: str, adapter: str, model: str, found: Mapping[str, tuple[int, ...]], own: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise MemberError where the file holds a tensor of the base (embeddings, biases) in another shape."""
    for key, shape in found.items():
        name = base_name(key)
        if "embed" in name or "head" in name:
            expected = own.get(name, shape)
            if shape != expected:
                raise MemberError(
                    f"{role}: the adapter {adapter} holds {name} in shape {shape}; {model} has it in {expected}: it "
                    "was made for a base with resized embeddings; save that base and name it as the model"
                )


def base_name(name: str) -> str:
    """The name that a tensor of the base had before PEFT wrapped the layers."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")


def _on_meta(role: str, adapter: str, model: str, model_config: Any) -> Any:
    """The PeftModel of this adapter on this base, without memory."""
    from peft import PeftConfig, get_peft_model

    try:
        settings = PeftConfig.from_pretrained(adapter)
        if settings.is_prompt_learning:
            kind = settings.peft_type.value
            raise MemberError(
                f"{role}: the adapter {adapter} is of kind {kind}, which adds tokens of its own; expected one that "
                "changes weights, LoRA for example"
            )
        with torch.device("meta"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*base_model_name_or_path.* was renamed")  # said in our words
            base = AutoModelForCausalLM.from_config(model_config)
            return get_peft_model(base, settings, low_cpu_mem_usage=True)
    except MemberError:
        raise
    except Exception as error:  # PEFT refuses settings in its own ways: unknown modules, kinds, keys
        raise MemberError(f"{role}: the adapter {adapter} does not fit {model}: {one_line(error)}") from error


def _is_plain(patched: Any) -> bool:
    """Return whether the adapter is W + s·B·A on linear layers, and nothing else."""
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.tuners_utils import BaseTunerLayer

    settings = patched.active_peft_config
    if settings.peft_type != "LORA" or settings.bias != "none" or settings.init_lora_weights not in _PLAIN_INIT:
        return False
    others = ("modules_to_save", "layer_replication", "trainable_token_indices", "target_parameters")
    if any(getattr(settings, name, None) for name in (*others, "use_dora", "use_qalora", "alora_invocation_tokens")):
        return False
    layers = [(name, layer) for name, layer in patched.named_modules() if isinstance(layer, BaseTunerLayer)]
    return all(
        type(layer) is LoraLinear
        and not any(layer.lora_variant.values())
        and not any(layer.lora_bias.values())
        and "expert" not in name  # experts are given some tokens of some rows, not all rows
        for name, layer in layers
    )


def _plain_scaling(patched: Any) -> Iterator[tuple[str, float]]:
    from peft.tuners.lora import Linear as LoraLinear

    for name, layer in patched.get_base_model().named_modules():
        if isinstance(layer, LoraLinear):
            yield name, float(layer.scaling[layer.active_adapters[0]])


def adapter_weights(role: str, adapter: str) -> Path:
    """Return the file with the adapter's tensors."""
    return _find(role, adapter, ADAPTER_WEIGHTS)


def _find(role: str, adapter: str, name: str) -> Path:
    path = find_file(role, adapter, name)
    if path is not None:
        return path
    if name == ADAPTER_WEIGHTS and find_file(role, adapter, ADAPTER_PICKLE) is not None:
        raise MemberError(f"{role}: {adapter}/{ADAPTER_PICKLE} is a pickle file; convert it to safetensors")
    raise MemberError(f"{role}: {adapter}/{name} is not there; expected a PEFT LoRA folder, or one of `patch extract`")


def _read_json(role: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MemberError(f"{role}: {path} cannot be read: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise MemberError(f"{role}: {path} holds no settings of an adapter; fetch it again")
    return content
