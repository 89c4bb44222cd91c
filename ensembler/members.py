"""One member: find its files, check them without reading weights, load it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from ensembler.adapters import check_adapter, merge_adapter, resolve_adapter
from ensembler.config import MemberConfig
from ensembler.errors import ConfigError, MemberError
from ensembler.sources import find_file, is_local, not_found, one_line
from ensembler.vocab import MemberVocabulary, read_vocabulary
from ensembler.weights import check_folder

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


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
            if is_local(self.config.model) and (Path(self.config.model) / "generation_config.json").exists():
                raise MemberError(f"{self.role}: generation_config.json in {self.config.model} is damaged") from None
            return GenerationConfig.from_model_config(self.model_config)
        except (TypeError, ValueError) as error:
            raise MemberError(f"{self.role}: generation_config.json in {self.config.model} is damaged") from error


def context_length(model_config: Any) -> int | None:
    """Return `max_position_embeddings` of a model config, or None where it has none."""
    length = getattr(model_config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(length) if length else None


def shortest_context(model_configs: Mapping[str, Any]) -> tuple[str, int] | None:
    """Return the role with the shortest context and its length in tokens, or None where no member sets a limit."""
    lengths = [(role, context_length(config)) for role, config in model_configs.items()]
    return min(((role, length) for role, length in lengths if length), key=lambda pair: pair[1], default=None)


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
        raise not_found(role, config.model, error) from error
    if getattr(model_config, "is_encoder_decoder", False):
        raise MemberError(f"{role}: {config.model} is an encoder-decoder model; expected a causal language model")
    files = MemberFiles(role, config, model_config, _load_tokenizer(role, config, options))
    if config.adapter is not None:
        check_adapter(role, config.adapter, config.model, model_config)
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
            model = merge_adapter(model, config.adapter)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers, safetensors and models' own code each raise what they like
        raise MemberError(f"{role}: {config.model} cannot be loaded: {one_line(error)}") from error
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
    source = config.model
    if config.adapter is not None and find_file(role, config.adapter, "tokenizer.json"):
        source = config.adapter
    if not any(find_file(role, source, name, revision=config.revision) for name in TOKENIZER_FILES):
        return None  # transformers would make one up
    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # tokenizers raises bare Exceptions for files that it cannot read
        raise MemberError(f"{role}: the tokenizer in {source} cannot be read: {one_line(error)}") from error
