"""The head of a zero-shot member: the texts of the classes as features, made once and kept on disk.

For a class with prompts t_1 … t_n the row is s · u / ‖u‖ with u = Σ_j g(t_j) / ‖g(t_j)‖, where g is the text tower and
s its learned scale (Radford et al. 2021, section 3.1.4): with one prompt, what the dual encoder itself computes.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from huggingface_hub import constants
from torch.nn.functional import normalize
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from ensembler.errors import MemberError, OutputError
from ensembler.evaluation.provenance import config_hash
from ensembler.files import TOKENIZER_FILES, TOKENIZER_SETTINGS, digest, file_digest, is_local, one_line
from ensembler.vision.heads import Head, load_head, save_head
from ensembler.vision.image_preflight import CheckedImages, ImageMember

_logger = logging.get_logger(__name__)

DEFAULT_TEMPLATES = ("a photo of a {}.",)  # Radford et al. 2021
_BATCH = 64  # texts
_FORMAT = 3  # of what is made from texts; another number makes heads anew
_VISION = ("vision", "visual")  # prefixes of tensors that texts do not pass through


def cache_folder() -> Path:
    """Return where heads that were made from texts are kept: beside the models of the hub."""
    return Path(constants.HF_HOME) / "ensembler" / "zero_shot_heads"


def zero_shot_head(member: ImageMember, model: PreTrainedModel, checked: CheckedImages) -> Head:
    """Return the head of a dual encoder for the classes of its ensemble, from the cache where it was made before.

    A file in the cache that cannot be read is made again. Raises MemberError.
    """
    if not hasattr(model, "get_text_features") or not hasattr(model, "logit_scale"):
        raise MemberError(f"a {type(model).__name__} cannot be used zero-shot here; give it a linear head with --head")
    templates = list(checked.config.templates or DEFAULT_TEMPLATES)
    words = [(checked.config.class_texts or {}).get(name, name) for name in checked.classes]
    path = cache_folder() / f"{_key(member, model, words, templates)}.safetensors"
    if path.is_file():
        try:
            return load_head(path, normalize=True).to(model.device)
        except MemberError:
            _logger.warning("the head %s in the cache cannot be read; it is made again", path)
    head = _make(member, model, words, templates)
    with suppress(OSError, OutputError):  # a cache that cannot be written to costs time, and nothing else
        path.parent.mkdir(parents=True, exist_ok=True)
        save_head(head, checked.classes, path)
    return head


def tokenizer_hash(member: ImageMember) -> str:
    """Return an identity of a member's tokenizer: the hash of a folder's files, or the commit on the hub."""
    if not is_local(member.config.model):
        return str(getattr(member.model_config, "_commit_hash", None))
    files = (Path(member.config.model) / name for name in (*TOKENIZER_FILES, *TOKENIZER_SETTINGS))
    return digest({path.name: file_digest(path) for path in files if path.is_file()}, 64)


def _key(member: ImageMember, model: PreTrainedModel, words: Sequence[str], templates: Sequence[str]) -> str:
    """Return a hash of all that a head depends on: tensors that texts pass through, config, tokenizer and texts."""
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if not name.startswith(_VISION):
            weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    of_member = [weights.hexdigest(), config_hash(member.model_config), tokenizer_hash(member)]
    return digest([_FORMAT, *of_member, words, templates], 32)


@torch.no_grad()
def _make(member: ImageMember, model: PreTrainedModel, words: Sequence[str], templates: Sequence[str]) -> Head:
    """Make the head from the words of each class in each of the templates."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(member.config.model, revision=member.config.revision)
    except Exception as error:  # tokenizers raises bare Exceptions for files that it cannot read
        raise MemberError(
            f"the tokenizer in {member.config.model}, which its class names need, cannot be read: {one_line(error)}"
        ) from error
    prompts = [template.replace("{}", word) for word in words for template in templates]
    length = model.config.text_config.max_position_embeddings
    _check_prompts(prompts, tokenizer(prompts)["input_ids"], words, f"the text tower of {member.config.model}", length)
    # SigLIP was trained on padded texts without a mask; to CLIP, which masks, the padding makes no difference.
    inputs = tokenizer(prompts, padding="max_length", max_length=length, return_tensors="pt")
    accepted = inspect.signature(model.get_text_features).parameters
    found = []
    for start in range(0, len(prompts), _BATCH):
        batch = {name: ids[start : start + _BATCH].to(model.device) for name, ids in inputs.items() if name in accepted}
        found.append(normalize(model.get_text_features(**batch).pooler_output.float(), dim=-1))
    mean = torch.stack([features.mean(0) for features in torch.cat(found).chunk(len(words))])
    scale, bias = model.logit_scale.float().exp(), getattr(model, "logit_bias", None)  # SigLIP has a bias
    return Head(normalize(mean, dim=-1) * scale, None if bias is None else bias.float().repeat(len(words)))


def _check_prompts(
    prompts: Sequence[str], ids: Sequence[Sequence[int]], words: Sequence[str], tower: str, length: int
) -> None:
    """Raise MemberError for a prompt of more than `length` tokens, and for classes whose prompts have equal tokens."""
    remedy = "give the class other words (--classes: a JSON object from label to words)"
    num_each, longest = len(prompts) // len(words), max(range(len(prompts)), key=lambda index: len(ids[index]))
    if len(ids[longest]) > length:
        raise MemberError(
            f"{prompts[longest]!r} has {len(ids[longest])} tokens; {tower} reads {length}: shorten it, or {remedy}"
        )
    known: dict[str, str] = {}
    for index, word in enumerate(words):
        read = repr(ids[index * num_each : (index + 1) * num_each])
        if read in known:
            raise MemberError(f"{known[read]!r} and {word!r} are the same tokens to {tower}; {remedy}")
        known[read] = word
