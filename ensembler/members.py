"""One member: find its files, check them without reading weights, load it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file, logging

from ensembler.config import MemberConfig
from ensembler.errors import ConfigError, MemberError
from ensembler.vocab import MemberVocabulary, read_vocabulary
from ensembler.weights import check_folder, naming, safetensors_header

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")

_logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class MemberFiles:
    """A member whose files were found and checked: nothing of its weights is loaded yet."""

    role: str
    config: MemberConfig
    model_config: Any
    tokenizer: Any | None

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
            return GenerationConfig.from_model_config(self.model_config)


def context_length(model_config: Any) -> int | None:
    """Return `max_position_embeddings` of a model config, or None where it has none."""
    length = getattr(model_config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(length) if length else None


def shortest_context(model_configs: Mapping[str, Any]) -> tuple[str, int] | None:
    """Return the role with the shortest context and its length in tokens, or None where no member sets a limit."""
    lengths = [(role, context_length(config)) for role, config in model_configs.items()]
    return min(((role, length) for role, length in lengths if length), key=lambda pair: pair[1], default=None)


def is_local(name: str) -> bool:
    """Whether a member's name is a path (absolute, or written with a leading dot) or an existing folder."""
    return os.path.isabs(name) or name.startswith((".", "~")) or os.path.isdir(name)


def resolve_adapter(role: str, config: MemberConfig) -> MemberConfig:
    """Where `model` is a PEFT folder, return its base as the model and the folder as the adapter."""
    folder = Path(config.model)
    if not (folder / ADAPTER_CONFIG).is_file() or (folder / "config.json").is_file():
        return config
    base = _read_json(role, folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not base:
        raise MemberError(f"{role}: {folder / ADAPTER_CONFIG} names no base model; give the base and the adapter apart")
    if (folder / base).is_dir():
        base = str((folder / base).resolve())
    return replace(config, model=base, adapter=config.model)


def check_member(role: str, config: MemberConfig, *, trust_remote_code: bool = False) -> MemberFiles:
    """Find and check a member's files: configs, tokenizer, safetensors headers, adapter shapes. Loads no weights.

    Raises MemberError or ConfigError.
    """
    check_device(role, config.device)
    config = resolve_adapter(role, config.absolute())
    if is_local(config.model):
        check_folder(role, Path(config.model))
    options = {"revision": config.revision, "trust_remote_code": trust_remote_code}
    try:
        model_config = AutoConfig.from_pretrained(config.model, **options)
    except (OSError, ValueError, KeyError) as error:
        raise _not_found(role, config.model, error) from error
    if getattr(model_config, "is_encoder_decoder", False):
        raise MemberError(f"{role}: {config.model} is an encoder-decoder model; expected a causal language model")
    files = MemberFiles(role, config, model_config, _load_tokenizer(role, config, options))
    if config.adapter is not None:
        _check_adapter(role, config, model_config)
    return files


def load_member(
    files: MemberFiles, *, attn_implementation: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a checked member in evaluation mode on its device; an adapter is merged into the weights."""
    role, config = files.role, files.config
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            config.model,
            revision=config.revision,
            dtype=config.dtype if config.dtype == "auto" else getattr(torch, config.dtype),
            use_safetensors=True,
            output_loading_info=True,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )
        if report["missing_keys"]:
            missing = sorted(report["missing_keys"])
            raise ValueError(f"its weights file lacks {len(missing)} tensors, {missing[0]} among them")
        if config.adapter is not None:
            model = _merge_adapter(model, config.adapter)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise MemberError(f"{role}: {config.model} cannot be loaded: {_one_line(error)}") from error
    model.eval()
    return model.to(config.device)


def check_device(role: str, device: str) -> None:
    """Raise ConfigError unless torch has this device."""
    try:
        if torch.empty(0, device=device).is_meta:
            raise ConfigError(f"{role}: device 'meta' is not there to hold weights; use 'cpu' or one that is")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        num = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise ConfigError(
            f"{role}: device {device!r} is not there ({num} CUDA devices were found); use 'cpu' or one that is"
        ) from error


def _load_tokenizer(role: str, config: MemberConfig, options: Mapping[str, Any]) -> Any | None:
    """The tokenizer beside the adapter, where fine-tuning left one there, or beside the model; None without any."""
    beside_adapter = config.adapter is not None and (Path(config.adapter) / "tokenizer_config.json").is_file()
    source = config.adapter if beside_adapter else config.model
    if not any(_exists(str(source), name, config.revision) for name in TOKENIZER_FILES):
        return None  # transformers would make one up
    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # tokenizers raises bare Exceptions for files that it cannot read
        raise MemberError(f"{role}: the tokenizer in {source} cannot be read: {_one_line(error)}") from error


def _exists(source: str, name: str, revision: str | None) -> bool:
    """Whether a local folder, or a model of the hub, has this file."""
    if is_local(source):
        return (Path(source) / name).is_file()
    try:
        return cached_file(source, name, revision=revision) is not None
    except OSError:
        return False


def _not_found(role: str, name: str, error: Exception) -> MemberError:
    """Tell an id that does not exist from a hub that cannot be reached."""
    text = _one_line(error)
    if is_local(name):
        return MemberError(f"{role}: {name} cannot be read: {text}")
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "") or "connect" in text or "offline" in text.lower()
    if offline:
        return MemberError(
            f"{role}: {name!r} is no folder here, is not in the local cache, and the hub cannot be reached (offline); "
            "give a folder or fetch the model first"
        )
    return MemberError(f"{role}: {name!r} is neither a folder here nor a model on the hub: {text}")


def _adapter_file(role: str, adapter: str, name: str) -> Path:
    """A file of an adapter, local or from the hub."""
    if is_local(adapter):
        path = Path(adapter) / name
        if path.is_file():
            return path
        if name == ADAPTER_WEIGHTS and (Path(adapter) / "adapter_model.bin").exists():
            raise MemberError(f"{role}: {adapter}/adapter_model.bin is a pickle file; convert it to safetensors")
        raise MemberError(f"{role}: {path} is not there; expected a PEFT LoRA folder")
    try:
        return Path(cached_file(adapter, name))
    except OSError as error:
        raise _not_found(role, adapter, error) from error


def _check_adapter(role: str, config: MemberConfig, model_config: Any) -> None:
    """Compare the shapes in the adapter's header with those of the model, built without memory."""
    assert config.adapter is not None
    settings = _read_json(role, _adapter_file(role, config.adapter, ADAPTER_CONFIG))
    base = settings.get("base_model_name_or_path")
    if base and Path(base).name != Path(config.model).name:
        _logger.warning("%s: the adapter %s was made for %s, not %s", role, config.adapter, base, config.model)
    with naming(role):
        header = safetensors_header(_adapter_file(role, config.adapter, ADAPTER_WEIGHTS))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    modules = dict(model.named_modules())
    for name, factor, shape in _lora_factors(header):
        weight = getattr(modules.get(name), "weight", None)
        if weight is None:
            raise MemberError(
                f"{role}: the adapter {config.adapter} changes {name}, which {config.model} does not have"
            )
        out_features, in_features = weight.shape[::-1] if isinstance(modules[name], Conv1D) else weight.shape
        fits = shape[1] == in_features if factor == "lora_A" else shape[0] == out_features
        if not fits:
            raise MemberError(
                f"{role}: {factor} of {name} in the adapter {config.adapter} has shape {tuple(shape)}; "
                f"the weight in {config.model} has {tuple(weight.shape)}: it was made for another base"
            )


def _lora_factors(header: Mapping[str, Any]) -> Iterator[tuple[str, str, list[int]]]:
    """Yield (module, 'lora_A' or 'lora_B', shape) for the LoRA factors of linear layers in an adapter's header."""
    for key, tensor in header.items():
        for factor in ("lora_A", "lora_B"):
            module, found, _ = key.partition(f".{factor}.")
            if found:
                yield module.removeprefix("base_model.model."), factor, tensor["shape"]


def _merge_adapter(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """Add the adapter's update to the weights: one forward then costs what the base costs."""
    from peft import PeftModel

    merged: PreTrainedModel = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    return merged


def _read_json(role: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MemberError(f"{role}: {path} cannot be read: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise MemberError(f"{role}: {path} holds no settings of an adapter; fetch it again")
    return content


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
