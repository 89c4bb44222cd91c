"""Find the files of members, check them without reading weights, load them: those that share a backbone together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils import logging

from ensembler.adapters import CheckedAdapter, check_adapter, resolve_adapter
from ensembler.config import IMAGES, EnsembleConfig, MemberConfig
from ensembler.engine.backbone import Backbone
from ensembler.engine.devices import check_device_names, check_devices, out_of_memory, placement_options
from ensembler.errors import MemberError, RunError
from ensembler.files import CHAT_TEMPLATE, TOKENIZER_FILES, find_file, is_local, naming, not_found, one_line
from ensembler.patch.addition import add_deltas, merge_adapter
from ensembler.quantization import Quantization
from ensembler.safetensors_files import check_folder
from ensembler.vocab import MemberVocabulary, read_vocabulary

if TYPE_CHECKING:
    from ensembler.engine.distributed import World

_logger = logging.get_logger(__name__)

# Names of the longest text in configs of models.
_LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")
DUAL_ENCODERS = frozenset(MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES)  # such as CLIP, by model type


@dataclass(frozen=True)
class MemberFiles:
    """A member whose files were found and checked: nothing of its weights is loaded yet."""

    role: str
    config: MemberConfig
    model_config: Any
    tokenizer: Any | None
    adapter: CheckedAdapter | None = None

    @property
    def vocabulary(self) -> MemberVocabulary:
        return read_vocabulary(self.role, self.tokenizer, self.model_config)

    @property
    def context(self) -> int | None:
        """The longest text in tokens, or None where the model sets no limit."""
        return context_length(self.model_config)

    def generation_config(self) -> GenerationConfig:
        """The model's own, or what its config says about end tokens."""
        try:
            return GenerationConfig.from_pretrained(self.config.model, revision=self.config.revision)
        except OSError:
            if is_local(self.config.model) and (Path(self.config.model) / "generation_config.json").exists():
                raise MemberError(f"{self.role}: generation_config.json in {self.config.model} is damaged") from None
            return GenerationConfig.from_model_config(self.model_config)
        except (TypeError, ValueError) as error:
            raise MemberError(f"{self.role}: generation_config.json in {self.config.model} is damaged") from error


def context_length(model_config: Any) -> int | None:
    """Return the longest text of a model in tokens, by the name that its config has for it; None where it has none.

    A dynamic NTK reaches `factor` times as far as `max_position_embeddings`, where its scaling begins.
    """
    config = model_config.get_text_config(decoder=True)
    length = next((int(number) for name in _LENGTHS if (number := getattr(config, name, None))), None)
    rope = getattr(config, "rope_parameters", None) or {}
    return length and int(length * (rope.get("factor", 1) if rope.get("rope_type") == "dynamic" else 1))


def shortest_context(model_configs: Mapping[str, Any]) -> tuple[str, int] | None:
    """Return the role with the shortest context and its length in tokens, or None where no member sets a limit."""
    lengths = {role: context_length(config) for role, config in model_configs.items()}
    return min(((role, length) for role, length in lengths.items() if length), key=lambda one: one[1], default=None)


def check_member(role: str, config: MemberConfig) -> MemberFiles:
    """Find and check a member's files: configs, tokenizer, safetensors headers, adapter shapes. Loads no weights.

    Raises MemberError or ConfigError.
    """
    check_device_names(role, config)
    config = resolve_adapter(role, config.absolute()).absolute()
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    model_config = read_model_config(role, config.model, **options)
    if getattr(model_config, "is_encoder_decoder", False):
        raise MemberError(f"{role}: {config.model} is an encoder-decoder model; expected a causal language model")
    _check_kind(role, config, model_config)
    tokenizer = _load_tokenizer(role, config, options)
    adapter = None
    if config.adapter is not None:
        adapter = check_adapter(
            role, config.adapter, config.model, model_config, trust_remote_code=config.trust_remote_code
        )
    return MemberFiles(role, config, model_config, tokenizer, adapter)


def read_model_config(role: str, model: str, *, revision: str | None, **options: Any) -> Any:
    """Return the configuration of a member's model; raise MemberError for an ensemble, and for files not whole."""
    kind = None
    with suppress(OSError, ValueError, AttributeError):  # a missing or damaged file is reported below
        kind = EnsembleConfig.get_config_dict(model, revision=revision)[0].get("model_type")
    if kind == EnsembleConfig.model_type:
        raise MemberError(
            f"{role}: {model} is an ensemble, and a member has to be one model; give one of those that "
            "`ensembler inspect` shows in it"
        )
    if is_local(model):
        check_folder(role, Path(model))
    with naming(role):
        try:
            return AutoConfig.from_pretrained(model, revision=revision, **options)
        except (OSError, ValueError, KeyError) as error:
            if _ASKS_FOR_TRUST in str(error):
                raise _own_code(role, model) from error
            raise not_found(model, error) from error


_ASKS_FOR_TRUST = "trust_remote_code=True"  # in the errors of transformers


def _own_code(role: str, model: str) -> MemberError:
    return MemberError(
        f"{model} runs code of its own, which nobody has allowed; read its .py files, and let this member run "
        f"them with --trust-remote-code {role} (trust_remote_code=[{role!r}])"
    )


def _check_kind(role: str, config: MemberConfig, model_config: Any) -> None:
    """Raise MemberError unless `transformers`, or the model's own code, makes a causal language model of the config."""
    own_code = getattr(model_config, "auto_map", None) or {}
    has_own_code = "AutoModelForCausalLM" in own_code
    if type(model_config) in MODEL_FOR_CAUSAL_LM_MAPPING or (config.trust_remote_code and has_own_code):
        return
    if has_own_code:
        with naming(role):
            raise _own_code(role, config.model)
    kind = model_config.model_type
    if type(model_config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING or kind in DUAL_ENCODERS:
        raise MemberError(
            f"{role}: {config.model} is an image model ({kind}); add --task {IMAGES} (in a recipe: images: {{}})"
        )
    raise MemberError(f"{role}: {config.model} is a model of type {kind!r}; expected a causal language model")


def group_members(files: Mapping[str, MemberFiles]) -> list[tuple[MemberFiles, ...]]:
    """Return the members in groups with one copy of the weights each, in the order of their first members.

    Members share a backbone where they differ in their adapters alone: the same model, dtype, quantisation and place.
    """
    groups: dict[str, list[MemberFiles]] = {}
    kinds: dict[str, str] = {}  # on one copy PEFT runs adapters of one kind
    # Without any adapter the same model in two roles is two models, as was asked for.
    sharing = [member.config for member in files.values() if member.adapter and not member.adapter.why_copied]
    shared = {(config.model, config.revision) for config in sharing}
    for role, member in files.items():
        config, adapter = member.config, member.adapter
        backbone = json.dumps({**config.to_dict(), "adapter": None}, sort_keys=True)
        is_alone = (config.model, config.revision) not in shared or (adapter is not None and bool(adapter.why_copied))
        if adapter is not None and adapter.needs_peft and not is_alone:
            is_alone = kinds.setdefault(backbone, adapter.kind) != adapter.kind
        groups.setdefault(role if is_alone else backbone, []).append(member)
    return [tuple(members) for members in groups.values()]


def split_backbones(files: Mapping[str, MemberFiles]) -> list[str]:
    """Say why members that differ in their adapter do not share weights."""
    groups = group_members(files)
    found: dict[str, None] = {}
    for index, group in enumerate(groups):
        for other in groups[index + 1 :]:
            both = (*group, *other)
            one, two = group[0].config, other[0].config
            if (one.model, one.revision) != (two.model, two.revision) or not any(member.adapter for member in both):
                continue
            copied = [member for member in both if member.adapter and member.adapter.why_copied]
            for member in copied:
                assert member.adapter is not None
                found[
                    f"{member.role} has a copy of the weights of its own: its adapter {member.adapter.why_copied}"
                ] = None
            if copied:
                continue
            names = [entry.name for entry in fields(MemberConfig) if entry.name != "adapter"]
            different = [name for name in names if getattr(one, name) != getattr(two, name)]
            roles = " and ".join(member.role for member in both)
            found[
                f"{roles} have the same model and do not share its weights: they differ in {', '.join(different)}; "
                "give both the same to load it once"
                if different
                else f"{roles} do not share the weights of their model: PEFT runs adapters of one kind on one copy"
            ] = None
    return list(found)


@dataclass(frozen=True)
class LoadedGroup:
    """Models by role, in evaluation mode on their devices, and the backbone that they are views of, if they are."""

    models: dict[str, PreTrainedModel]
    backbone: Backbone | None = None


def load_group(group: Sequence[MemberFiles], *, attn_implementation: str | None = None) -> LoadedGroup:
    """Load checked members that `group_members` put together.

    A single member's adapter is merged into its weights; on a backbone that is shared, quantised or spread over devices
    it is kept beside them. Full deltas of a patch are added to a single member's weights in any case.
    Raises MemberError, or RunError where memory is short.
    """
    names = " and ".join(member.role for member in group)
    config = group[0].config
    try:
        model = _load_model(group[0], attn_implementation)
        adapters = {member.role: member.adapter for member in group}
        if len(group) == 1:
            (role,), adapter = adapters, group[0].adapter
            if adapter is not None and config.quantization is None and config.device_map is None:
                model, adapter = merge_adapter(model, adapter), None
            elif adapter is not None:
                add_deltas(model, adapter)
                adapter = adapter.without_deltas()
            if adapter is None:
                return LoadedGroup({role: model.eval()})
            adapters[role] = adapter
        backbone = Backbone(model.eval(), adapters)
    except Exception as error:  # transformers, safetensors and models' own code each raise what they like
        if out_of_memory(error):
            target = config.device if config.device_map is None else f"device_map {config.device_map}"
            raise RunError(
                f"{names} ran out of memory while {config.model} was loaded on {target}; see what fits where with: "
                "ensembler plan"
            ) from error
        raise MemberError(f"{names}: {config.model} cannot be loaded: {one_line(error)}") from error
    by_peft = {member.role: member.adapter.kind for member in group if member.adapter and member.adapter.needs_peft}
    if by_peft and len(group) > 1:
        _logger.warning(
            "%s share their weights and not their forward: PEFT runs the adapter of %s",
            names,
            " and ".join(f"{role} ({kind})" for role, kind in by_peft.items()),
        )
    return LoadedGroup(backbone.views, backbone)


def load_members(
    files: Mapping[str, MemberFiles], world: World | None = None, *, attn_implementation: str | None = None
) -> tuple[dict[str, PreTrainedModel], list[Backbone]]:
    """Load checked members, one after another, those that share a backbone together.

    With a `world` of several processes each loads its part of them. Returns models by role, and their backbones.
    """
    groups = group_members(files)
    if world is not None:
        from ensembler.planning.member_sizes import predicted_bytes  # which measures what is found here

        roles = [[member.role for member in group] for group in groups]
        groups = [groups[index] for index in world.divide(roles, [predicted_bytes(group) or 0 for group in groups])]

    def load() -> list[LoadedGroup]:
        check_devices(member for group in groups for member in group)
        return [load_group(group, attn_implementation=attn_implementation) for group in groups]

    loaded = load() if world is None else world.together(load)
    models = {role: model for group in loaded for role, model in group.models.items()}
    return models, [group.backbone for group in loaded if group.backbone is not None]


def is_whole(model: PreTrainedModel, files: MemberFiles | None, backbones: Sequence[Backbone]) -> bool:
    """Return whether a member is one model with weights of its own: neither shared nor quantised nor spread."""
    plain = getattr(model, "_orig_mod", model)
    shared = any(view is plain for backbone in backbones for view in backbone.views.values())
    return files is None or not (shared or files.config.quantization or files.config.device_map)


def load_whole(model: PreTrainedModel, files: MemberFiles | None, backbones: Sequence[Backbone]) -> PreTrainedModel:
    """Return a member as one model with its adapter merged: read again where it is shared, quantised or spread."""
    if files is None or is_whole(model, files, backbones):
        plain: PreTrainedModel = getattr(model, "_orig_mod", model)  # of a compiled one the model itself
        return plain
    config = replace(files.config.placed("cpu"), quantization=None)
    return load_group([replace(files, config=config)]).models[files.role]


def _load_model(files: MemberFiles, attn_implementation: str | None) -> PreTrainedModel:
    config = files.config
    options = placement_options(config)
    if config.quantization is not None:
        options["quantization_config"] = _bitsandbytes(config.quantization, config.dtype, files.model_config)
    model, report = AutoModelForCausalLM.from_pretrained(
        config.model,
        revision=config.revision,
        dtype=config.dtype if config.dtype == "auto" else getattr(torch, config.dtype),
        use_safetensors=True,
        output_loading_info=True,
        attn_implementation=attn_implementation,
        trust_remote_code=config.trust_remote_code,
        **options,
    )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(f"its weights file lacks {len(missing)} tensors, {missing[0]} among them")
    loaded: PreTrainedModel = model
    return loaded


def _bitsandbytes(quantization: Quantization, dtype: str, model_config: Any) -> BitsAndBytesConfig:
    if quantization.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = quantization.compute_dtype or (dtype if dtype != "auto" else None) or model_config.dtype or "float32"
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.method.removeprefix("bnb-"),
        bnb_4bit_compute_dtype=str(compute).removeprefix("torch."),
        bnb_4bit_use_double_quant=quantization.double_quant,
    )


def _load_tokenizer(role: str, config: MemberConfig, options: Mapping[str, Any]) -> Any | None:
    """The tokenizer beside the adapter, where fine-tuning left one there, or beside the model; None without any.

    A chat template beside the adapter belongs to it in any case.
    """
    source = config.model
    with naming(role):
        template = None
        if config.adapter is not None:
            if any(find_file(config.adapter, name) for name in TOKENIZER_FILES):
                source = config.adapter
            template = find_file(config.adapter, CHAT_TEMPLATE)
        if not any(find_file(source, name, revision=config.revision) for name in TOKENIZER_FILES):
            return None  # transformers would make one up
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # tokenizers raises bare Exceptions for files that it cannot read
        if _ASKS_FOR_TRUST in str(error):
            with naming(role):
                raise _own_code(role, source) from error
        raise MemberError(f"{role}: the tokenizer in {source} cannot be read: {one_line(error)}") from error
    if template is not None:
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer
