"""The head of a zero-shot member: the texts of the classes as features, made once and kept on disk.

For a class with prompts t_1 … t_n the row is s · u / ‖u‖ with u = Σ_j g(t_j) / ‖g(t_j)‖, where g is the text tower and
s its learned scale (Radford et al. 2021, section 3.1.4): with one prompt, what the dual encoder itself computes.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from ensembler.engine.members import TOKENIZER_FILES
from ensembler.errors import MemberError
from ensembler.evaluation.provenance import config_hash
from ensembler.sources import is_local, one_line
from ensembler.vision.heads import Head, load_head, read_info, save_head, unit_length
from ensembler.vision.members import ImageMember

_logger = logging.get_logger(__name__)

DEFAULT_TEMPLATES = ("a photo of a {}.",)  # Radford et al. 2021
_BATCH = 64  # texts
_FORMAT = 2  # of what is made from texts; another number makes heads anew
_TOKENIZER = (*TOKENIZER_FILES, "added_tokens.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json")
_OF_IMAGES = ("vision", "visual")  # what tensors begin with that texts do not go through


def cache_folder() -> Path:
    """Return where heads that were made from texts are kept: beside the models of the hub."""
    return Path(constants.HF_HOME) / "ensembler" / "zero_shot_heads"


def zero_shot_head(
    member: ImageMember,
    model: PreTrainedModel,
    classes: Sequence[str],
    *,
    texts: Mapping[str, str] | None = None,
    templates: Sequence[str] | None = None,
    cache: Path | None = None,
) -> Head:
    """Return the head of a dual encoder for these classes, from the cache where it was made before.

    `texts`: words for a class in prompts by label, the label itself where there are none. A file in the cache that
    cannot be read is made again. Raises MemberError.
    """
    templates = list(templates or DEFAULT_TEMPLATES)
    words = [(texts or {}).get(name, name) for name in classes]
    path = (cache or cache_folder()) / f"{_key(member, model, words, templates)}.safetensors"
    if path.is_file():
        try:
            if read_info(member.role, path).num_classes == len(classes):
                return load_head(member.role, path, normalize=True).to(model.device)
        except MemberError:
            _logger.warning("the head %s in the cache cannot be read; it is made again", path)
    head = _make(member, model, [[template.replace("{}", word) for template in templates] for word in words])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_head(head, classes, path)
    except (OSError, SafetensorError):
        return head  # a cache that cannot be written to costs time, and nothing else
    return head


def tokenizer_hash(member: ImageMember) -> str:
    """Return what tells a member's tokenizer from others: the hash of a folder's files, or the commit on the hub."""
    if not is_local(member.config.model):
        return str(getattr(member.model_config, "_commit_hash", None))
    files = [path for name in _TOKENIZER if (path := Path(member.config.model) / name).is_file()]
    return _hash([path.name.encode() + b"\0" + path.read_bytes() for path in files])


def _key(member: ImageMember, model: PreTrainedModel, words: Sequence[str], templates: Sequence[str]) -> str:
    """A name for all that a head depends on: the tensors that texts go through, config, tokenizer and texts."""
    tensors = [(name, tensor) for name, tensor in model.state_dict().items() if not name.startswith(_OF_IMAGES)]
    weights = _hash(
        part
        for name, tensor in tensors
        for part in (
            f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode(),
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(),
        )
    )
    content = [_FORMAT, weights, config_hash(member.model_config), tokenizer_hash(member), list(words), list(templates)]
    return _hash([json.dumps(content).encode()])[:32]


def _hash(parts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


@torch.inference_mode()
def _make(member: ImageMember, model: PreTrainedModel, prompts: Sequence[Sequence[str]]) -> Head:
    tokenizer = _tokenizer(member)
    flat = [prompt for of_class in prompts for prompt in of_class]
    found = [_text_features(model, tokenizer, flat[start : start + _BATCH]) for start in range(0, len(flat), _BATCH)]
    by_class = torch.split(unit_length(torch.cat(found).float()), [len(of_class) for of_class in prompts])
    mean = torch.stack([features.mean(0) for features in by_class])
    logits_scale: Any = model.logit_scale
    bias: Any = getattr(model, "logit_bias", None)  # of SigLIP
    weight = unit_length(mean) * logits_scale.float().exp()
    return Head(weight.clone(), None if bias is None else bias.float().expand(len(prompts)).clone())


def _text_features(model: PreTrainedModel, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    length = model.config.text_config.max_position_embeddings
    # SigLIP was trained on padded texts without a mask; to CLIP, which masks, the padding makes no difference.
    inputs = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    accepted = inspect.signature(model.get_text_features).parameters
    given = {name: tensor.to(model.device) for name, tensor in inputs.items() if name in accepted}
    features: Tensor = _pooled(model.get_text_features(**given))
    return features


def _pooled(output: Any) -> Tensor:
    """The projected features, which transformers hands out bare or within an output."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features


def _tokenizer(member: ImageMember) -> Any:
    try:
        return AutoTokenizer.from_pretrained(member.config.model, revision=member.config.revision)
    except Exception as error:  # tokenizers raises bare Exceptions for files that it cannot read
        raise MemberError(
            f"{member.role}: the tokenizer in {member.config.model}, which its class names need, cannot be read: "
            f"{one_line(error)}"
        ) from error
