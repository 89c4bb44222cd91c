"""An adapter, or another patch, as part of a member: find its base, check that it fits."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.utils import logging

from ensembler.config import MemberConfig
from ensembler.errors import MemberError, UnsupportedPatchError
from ensembler.files import find_folder, is_local, naming, one_line
from ensembler.patch.formats import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    DELTAS,
    PATCH_FILES,
    PEFT_PREFIX,
    RECORD,
    Patch,
    named_base,
    read_patch,
)
from ensembler.safetensors_files import StoredTensor, listed, stored_tensors

DELTAS_ALONE = "DELTAS"  # the kind of a patch that has no adapter in it

_logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class CheckedAdapter:
    """An adapter, or another patch, whose files fit the member's base.

    `kind` is PEFT's name of it. `patch`: its addition to weights; None where only PEFT knows how to merge it.
    """

    folder: Path
    kind: str
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

    @property
    def is_plain_lora(self) -> bool:
        """Return whether its layers add s·B·A to linear layers that see all rows (Hu et al. 2022).

        Experts are given some tokens of some rows.
        """
        return self.patch is not None and not any(
            factors.is_embedding or "expert" in name for name, factors in self.patch.low_rank.items()
        )

    def without_deltas(self) -> CheckedAdapter | None:
        """Return the rest of the patch once its full deltas are in the weights; None where nothing is left."""
        if self.patch is None or not self.deltas:
            return self
        return None if self.is_deltas_alone else replace(self, patch=replace(self.patch, full={}))


def resolve_adapter(role: str, config: MemberConfig) -> MemberConfig:
    """Return the base of a PEFT folder as the model and the folder as its adapter; other members as they are."""
    folder = Path(config.model)
    is_patch = (folder / ADAPTER_CONFIG).is_file() or (folder / RECORD).is_file()
    if not is_patch or (folder / "config.json").is_file():
        return config
    if config.adapter is not None:
        raise MemberError(f"{role}: {folder} is an adapter itself; give its base as the model, or merge the two first")
    with naming(role):
        base = named_base(folder)
    if base is None:
        raise MemberError(
            f"{role}: {folder} names no base model; set base_model_name_or_path in its {ADAPTER_CONFIG}, or give the "
            "base as the model and this as its adapter"
        )
    if (folder / base).is_dir():
        base = str((folder / base).resolve())
    elif is_local(base) and not Path(base).expanduser().is_dir():
        raise MemberError(
            f"{role}: {folder} is a LoRA of {base} (base_model_name_or_path in {ADAPTER_CONFIG}), which is not there; "
            "correct that, or give the base as the model and this as its adapter (--source-pt BASE --source-ft-adapter)"
        )
    return replace(config, model=base, adapter=config.model)


def check_adapter(role: str, adapter: str, model: str, model_config: Any) -> CheckedAdapter:
    """Compare names and shapes in the headers of an adapter or a patch with those of this base, built without memory.

    Raises MemberError. A base of another name is a warning alone, since patches are meant to be carried to new bases.
    """
    with naming(role):
        folder = find_folder(adapter, allow_patterns=PATCH_FILES)
        try:
            patch = read_patch(folder)
        except UnsupportedPatchError:
            if (folder / DELTAS).is_file():  # PEFT would leave them out
                raise
            patch = None
        if patch is not None and patch.full:
            patch = _fit_deltas(patch, model, model_config)
        kind, num_parameters = DELTAS_ALONE, 0
        if (folder / ADAPTER_CONFIG).is_file():
            kind, num_parameters = _check_with_peft(folder, model, model_config)
        base = named_base(folder) if patch is None else patch.base
    if base is not None and _is_other(base, model):
        word = "patch" if kind == DELTAS_ALONE else "adapter"
        _logger.warning("%s: the %s %s was made for %s, not %s", role, word, adapter, base, model)
    if patch is not None:
        num_parameters += sum(delta.num_elements for delta in patch.full.values())
    return CheckedAdapter(folder, kind, num_parameters, patch)


def _is_other(base: str, model: str) -> bool:
    """Return whether two models have different names; where each is on disk says nothing."""
    return Path(base).name != Path(model).name


def _fit_deltas(patch: Patch, model: str, model_config: Any) -> Patch:
    """Return the patch with its full deltas under the names of the loaded model's weights, or raise MemberError."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(model_config)
    shapes = {name: tuple(weight.shape) for name, weight in base.named_parameters(remove_duplicate=False)}
    renamings = [entry for entry in get_model_conversion_mapping(base) if isinstance(entry, WeightRenaming)]
    full = {}
    for name, delta in patch.full.items():
        loaded = name
        for renaming in renamings if name not in shapes else ():
            loaded, _ = renaming.rename_source_key(loaded)
        full[loaded] = delta
    missing = [delta.name for name, delta in full.items() if name not in shapes]
    if missing:
        raise MemberError(
            f"the patch {patch.folder} changes {listed(missing)}, which {model} does not have when it is loaded; it "
            "was made for another model, or is to be added on disk: ensembler patch apply"
        )
    for name, delta in full.items():
        if delta.shape != shapes[name]:
            raise MemberError(
                f"{delta.name} in the patch {patch.folder} has shape {delta.shape}; in {model} it has {shapes[name]}: "
                "it was made for another model"
            )
    return replace(patch, full=full)


def _check_with_peft(folder: Path, model: str, model_config: Any) -> tuple[str, int]:
    """Return the kind of an adapter and its number of parameters; raise MemberError unless it fits the model."""
    from peft import get_peft_model_state_dict

    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise MemberError(f"{folder / ADAPTER_WEIGHTS} is not there; expected an adapter's weights as safetensors")
    found = {name: tensor.shape for name, tensor in stored_tensors(folder / ADAPTER_WEIGHTS).items()}
    adapted = _build_on_meta(folder, model, model_config)
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    base_weights = adapted.get_base_model().named_parameters(remove_duplicate=False)
    base_shapes = {base_name(name): tuple(tensor.shape) for name, tensor in base_weights}
    for key, shape in found.items():
        name = base_name(key)
        if ("embed" in name or "head" in name) and shape != base_shapes.get(name, shape):
            raise MemberError(
                f"the adapter {folder} holds {name} in shape {shape}; {model} has it in {base_shapes[name]}: it was "
                "made for a base with resized embeddings; save that base and name it as the model"
            )
    missing = sorted(state.keys() - found.keys())
    unknown = sorted(name for name in found.keys() - state.keys() if base_name(name) not in base_shapes)
    if missing or unknown:
        misfit = f"lacks {missing[0]}" if missing else f"changes {unknown[0]}, which is not there"
        base = named_base(folder)
        hint = f"; give it its base, {base}" if base is not None and _is_other(base, model) else ""
        raise MemberError(f"the adapter {folder} was made for another base: for {model} it {misfit}{hint}")
    for name, tensor in state.items():
        if found[name] != tuple(tensor.shape):
            raise MemberError(
                f"{name} in the adapter {folder} has shape {found[name]}; for {model} it must be {tuple(tensor.shape)}"
                ": it was made for another base"
            )
    kind: str = adapted.active_peft_config.peft_type.value
    return kind, sum(tensor.numel() for tensor in state.values())


def base_name(name: str) -> str:
    """Return the name that a tensor of the base had before PEFT wrapped the layers."""
    return name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".").replace(".original_module.", ".")


def _build_on_meta(folder: Path, model: str, model_config: Any) -> Any:
    """Return the PeftModel of this adapter on this base, without memory."""
    from peft import PeftConfig, get_peft_model

    try:
        settings = PeftConfig.from_pretrained(folder)
        if settings.is_prompt_learning:
            raise MemberError(
                f"the adapter {folder} is of kind {settings.peft_type.value}, which adds tokens of its own; expected "
                "one that changes weights, LoRA for example"
            )
        with torch.device("meta"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*base_model_name_or_path.* was renamed")  # we warn ourselves
            return get_peft_model(AutoModelForCausalLM.from_config(model_config), settings, low_cpu_mem_usage=True)
    except MemberError:
        raise
    except Exception as error:  # PEFT refuses settings in its own ways: unknown modules, kinds, keys
        raise MemberError(f"the adapter {folder} does not fit {model}: {one_line(error)}") from error
