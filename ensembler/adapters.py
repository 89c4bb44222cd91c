"""An adapter, or another patch, as part of a member: find its base, check that it fits."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ensembler.config import MemberConfig
from ensembler.errors import MemberError, PatchError, UnsupportedPatchError
from ensembler.files import find_folder, is_local, naming, one_line, read_json
from ensembler.patch.formats import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    DELTAS,
    PATCH_FILES,
    PEFT_PREFIX,
    RECORD,
    Patch,
    base_name,
    named_bases,
    own_names,
    read_patch,
    why_not_plain,
)
from ensembler.patch.model_layout import layout_of, token_weights
from ensembler.patch.patch_plan import resize_command
from ensembler.patch.peft_check import adapt_on_meta
from ensembler.safetensors_files import StoredTensor, listed, stored_tensors

DELTAS_ALONE = "DELTAS"  # the kind of a patch that has no adapter in it

# Adapters with which members still share their weights: a sum with layers (`_why_not_in_layers`), a LoRA with these
# keys, and these kinds of PEFT, whose layers stand beside the weights and are turned off exactly.
_KEYS_BESIDE = frozenset({"use_dora", "lora_bias", "trainable_token_indices", "target_parameters"})
_KINDS_BESIDE = frozenset(
    {
        *("ADALORA", "BEFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "GLORA", "GRALORA", "HIRA", "HRA", "IA3", "LILY"),
        *("LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "PVERA", "RANDLORA", "ROAD"),
        *("SUPERTUNING", "TINYLORA", "VBLORA", "VERA", "WAVEFT"),
    }
)
_KINDS_COPIED = frozenset({"TRAINABLE_TOKENS"})  # on tied weights PEFT takes one of them
_REFUSED_KEYS = {
    "alora_invocation_tokens": "which acts behind its invocation alone (aLoRA)",
    "layer_replication": "which makes a model of other layers",
    "arrow_config": "which chooses among other adapters for each token",
}
_REFUSED_STARTS = ("corda", "loftq", "pissa_niter")  # PEFT needs data, or draws anew, to make the base again

_logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class CheckedAdapter:
    """An adapter, or another patch, whose files fit the member's base.

    `kind` is PEFT's name of it. `patch`: its addition to weights; None where only PEFT knows how to merge it.
    `needs_peft`: beside the weights it runs in PEFT's layers alone. `why_copied`: why its member needs a copy of the
    weights of its own; None where it may share them. `notes`: a sentence each.
    """

    folder: Path
    kind: str
    num_parameters: int
    patch: Patch | None = None
    needs_peft: bool = False
    why_copied: str | None = None
    notes: tuple[str, ...] = ()

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
    is_patch = (folder / ADAPTER_CONFIG).is_file() or (folder / RECORD).is_file()
    if not is_patch or (folder / "config.json").is_file():
        return config
    if config.adapter is not None:
        raise MemberError(f"{role}: {folder} is an adapter itself; give its base as the model, or merge the two first")
    with naming(role):
        bases = named_bases(folder)
    # What `extract` made records its base by the path from the patch too: both may have been moved together.
    base = next((one for one in bases if Path(one).is_dir() or (folder / one).is_dir()), next(iter(bases), None))
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


def check_adapter(
    role: str, adapter: str, model: str, model_config: Any, *, trust_remote_code: bool = False
) -> CheckedAdapter:
    """Compare names and shapes in the headers of an adapter or a patch with those of this base, built without memory.

    `trust_remote_code`: run the base's own code for that. Patches are meant to be carried to new bases, so a base of
    another name is a note alone. Raises MemberError.
    """
    with naming(role):
        folder = find_folder(adapter, allow_patterns=PATCH_FILES)
        base = next(iter(named_bases(folder)), None)
        is_own_base = base is None or Path(base).name == Path(model).name  # where each is on disk says nothing
        built = _build_on_meta(folder, model, model_config, trust_remote_code=trust_remote_code)
        patch = _read(folder, model, built, is_own_base=is_own_base)
        num_parameters = 0 if patch is None else sum(delta.num_elements for delta in patch.full.values())
        if (folder / ADAPTER_CONFIG).is_file():
            config = read_json(folder / ADAPTER_CONFIG, PatchError)
            reason = None if patch is None else _why_not_in_layers(patch, config, built)
            needs_peft = patch is None or reason is not None
            names = _names_in_file(folder, as_peft=needs_peft)
            left_out = set() if patch is None or needs_peft else set(patch.carried)
            extra, num = _check_with_peft(folder, model, built, names, left_out, None if is_own_base else base)
            if needs_peft and (patch is None or not (patch.full or patch.replaced)):
                reason = _why_not_beside(config, extra)
            found = CheckedAdapter(folder, str(config["peft_type"]), num_parameters + num, patch, needs_peft, reason)
        else:
            reason = "is full deltas, which are added to them"
            found = CheckedAdapter(folder, DELTAS_ALONE, num_parameters, patch, why_copied=reason)
    if is_own_base:
        return found
    word = "patch" if found.is_deltas_alone else "adapter"
    note = f"{role}: the {word} {adapter} was made for {base}, not {model}"
    _logger.info_once(note)
    return replace(found, notes=(note,))


def _read(folder: Path, model: str, built: Any, *, is_own_base: bool) -> Patch | None:
    """Return the addition to the weights of `model`; None where only PEFT knows it. Raises MemberError."""
    try:
        patch = read_patch(folder)
    except UnsupportedPatchError:
        if (folder / DELTAS).is_file():  # PEFT would leave them out
            raise
        return None
    if is_own_base:  # as PEFT, which loads them over the base's own
        patch = replace(patch, replaced={**patch.carried, **patch.replaced}, carried={})
    return _fit_deltas(patch, model, built) if patch.full else patch


def _why_not_in_layers(patch: Patch, config: Mapping[str, Any], model: nn.Module) -> str | None:
    """Return why a patch cannot act on the rows of one member in the layers of `model`; None where it can.

    A LoRA adds s·B·A to linear layers and embeddings that see all rows (Hu et al. 2022); experts are given some tokens
    of some rows. Values of its own can stand in for those of a layer that computes with them by itself.
    """
    is_embedding = any(factors.is_embedding for factors in patch.low_rank.values())
    if config.get("ensure_weight_tying") and (patch.replaced or is_embedding):
        return "trains tied weights (ensure_weight_tying)"
    if config.get("target_parameters"):
        return "trains tensors by themselves (target_parameters), which PEFT adds in its own way"
    layers = dict(model.named_modules(remove_duplicate=False))
    for name in patch.names:
        layer = layers.get(name.rpartition(".")[0])
        is_plain = isinstance(layer, nn.Linear | Conv1D | nn.Embedding)
        is_norm = layer is not None and not any(layer.children()) and all(one.dim() == 1 for one in layer.parameters())
        if ".experts." in name or not (is_plain or (is_norm and name not in patch.low_rank)):
            return f"changes {name}, which belongs to no linear layer, embedding or norm that sees all rows"
    return None


def _why_not_beside(config: Mapping[str, Any], extra: str | None) -> str | None:
    """Return why PEFT cannot run an adapter of this configuration beside weights that stay as they are, or None."""
    if config.get("bias", "none") != "none":
        return f"trains biases (bias={config['bias']!r})"
    if config.get("ensure_weight_tying"):
        return "trains tied weights (ensure_weight_tying)"
    if extra is not None:
        return f"holds the base's {extra}"
    if config.get("peft_type") in _KINDS_COPIED:
        return f"is of kind {config['peft_type']}"
    return why_not_plain(config, _KEYS_BESIDE) if config.get("peft_type") == "LORA" else None


def _fit_deltas(patch: Patch, model: str, base: Any) -> Patch:
    """Return the patch with its full deltas under the names of the loaded model's weights, or raise MemberError."""
    shapes = {name: tuple(weight.shape) for name, weight in base.named_parameters(remove_duplicate=False)}
    layout = layout_of(base)
    full = {layout.find(name) or name: delta for name, delta in patch.full.items()}
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


def _names_in_file(folder: Path, *, as_peft: bool) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an adapter's tensors by their names: as PEFT reads them, or those of the model's modules."""
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise MemberError(f"{folder / ADAPTER_WEIGHTS} is not there; expected an adapter's weights as safetensors")
    stored = stored_tensors(folder / ADAPTER_WEIGHTS)
    own = own_names(folder, stored, unwrap=False)
    if as_peft:
        return {name.removeprefix(PEFT_PREFIX): tensor.shape for name, tensor in stored.items()}
    return {name: tensor.shape for name, tensor in own.items()}


def _check_with_peft(
    folder: Path,
    model: str,
    built: Any,
    found: Mapping[str, tuple[int, ...]],
    left_out: Set[str],
    other_base: str | None,
) -> tuple[str | None, int]:
    """Return a tensor of the base that an adapter holds as well, and its number of parameters.

    `left_out`: the base's own tensors in the adapter that are not used, of any size up to that of the model's.
    `other_base`: the name of the adapter's base where it is not the model's. Raises MemberError unless PEFT finds the
    adapter to fit the model.
    """
    from peft import get_peft_model_state_dict

    base_shapes = {name: tuple(tensor.shape) for name, tensor in built.named_parameters(remove_duplicate=False)}
    tokens = token_weights(built)
    adapted = _adapt(folder, model, built)
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    state = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in state.items()}
    for key, shape in found.items():
        name = base_name(key)
        expected = base_shapes.get(name, shape)
        if shape == expected:
            continue
        misfit = f"the adapter {folder} holds {name} in shape {shape}; {model} has it in {expected}: it was made for"
        if name in tokens and shape[1:] == expected[1:] and shape > expected:
            raise MemberError(
                f"{misfit} a base with resized embeddings; resize it first, and name the result as the model: "
                f"{resize_command(model, shape[0])}"
            )
        if name not in left_out:
            raise MemberError(f"{misfit} another base")
    missing = sorted(state.keys() - found.keys())
    extra = sorted(found.keys() - state.keys())
    unknown = [name for name in extra if base_name(name) not in base_shapes]
    if missing or unknown:
        misfit = f"lacks {missing[0]}" if missing else f"changes {unknown[0]}, which is not there"
        if (folder / RECORD).is_file():  # `extract` writes the names on disk where PEFT has none of its own
            raise MemberError(f"the patch {folder} {misfit} in {model}; add it to files with: ensembler patch apply")
        hint = "" if other_base is None else f"; give it its base, {other_base}"
        raise MemberError(f"the adapter {folder} was made for another base: for {model} it {misfit}{hint}")
    for name, tensor in state.items():
        if found[name] != tuple(tensor.shape):
            raise MemberError(
                f"{name} in the adapter {folder} has shape {found[name]}; for {model} it must be {tuple(tensor.shape)}"
                ": it was made for another base"
            )
    return next(map(base_name, extra), None), sum(tensor.numel() for tensor in state.values())


def _build_on_meta(folder: Path, model: str, model_config: Any, *, trust_remote_code: bool) -> Any:
    """Return the base without memory."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(model_config, trust_remote_code=trust_remote_code)
    except Exception as error:  # a model's own code raises what it likes
        raise MemberError(f"the adapter {folder} does not fit {model}: {one_line(error)}") from error


def _adapt(folder: Path, model: str, built: Any) -> Any:
    """Return the PeftModel of this adapter on a base without memory; raise MemberError for one that cannot be run."""
    from peft import PeftConfig

    try:
        settings = PeftConfig.from_pretrained(folder)
        refusal = _refusal(settings)
        if refusal is not None:
            raise MemberError(
                f"the adapter {folder} {refusal}; merge it into its base with PEFT, if it can be, and give the result "
                "as the model"
            )
        return adapt_on_meta(built, settings)
    except MemberError:
        raise
    except Exception as error:  # PEFT refuses settings in its own ways: unknown modules, kinds, keys
        raise MemberError(f"the adapter {folder} does not fit {model}: {one_line(error)}") from error


def _refusal(settings: Any) -> str | None:
    """Return why a member cannot have an adapter of these settings at all, or None."""
    kind, start = settings.peft_type.value, getattr(settings, "init_lora_weights", None)
    if settings.is_prompt_learning:
        return f"is of kind {kind}, which adds tokens of its own"
    if kind != "LORA" and kind not in _KINDS_BESIDE | _KINDS_COPIED:
        return f"is of kind {kind}, which members cannot have"
    for key, reason in _REFUSED_KEYS.items():
        if getattr(settings, key, None):
            return f"uses {key}, {reason}"
    if isinstance(start, str) and start.startswith(_REFUSED_STARTS):
        return f"was started with init_lora_weights={start!r}, and its base's weights cannot be made again without more"
    return None
