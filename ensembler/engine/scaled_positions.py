"""Members whose rotary frequencies depend on the length of the text (longrope, dynamic NTK): each row gets its own.

Such a model takes the frequencies of a forward from its largest position, so that a short row in a batch with a long
one gets those of the long one, and a piece of a prompt those of the piece. Here the length is said for each token: the
tokens of a prompt have the prompt's, a generated token has that of the text up to it. That is what `generate` gives a
text that is alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# Their `prepare_inputs_for_generation` drops the cache where a text passes `original_max_position_embeddings`.
_READ_ANEW = ("phi3", "phi4_multimodal", "phimoe")


@dataclass(frozen=True)
class PositionScale:
    """The scale of a model's positions: texts of at most `unscaled` tokens have the frequencies that it began with.

    `reread_at`: a text that grows beyond so many tokens is read anew by the model's own `generate`; None: it is not,
    and earlier tokens keep the frequencies that they were read with.
    """

    unscaled: int
    reread_at: int | None

    @classmethod
    def of(cls, model: PreTrainedModel, rotaries: Sequence[nn.Module]) -> PositionScale | None:
        """Return the scale of a model with these `scaled_rotaries`, or None where it has none."""
        if not rotaries:
            return None
        config = model.config.get_text_config(decoder=True)
        at = getattr(config, "original_max_position_embeddings", None) if config.model_type in _READ_ANEW else None
        return cls(min(_switch(one, kind) for one in rotaries for kind in _kinds(one)), at)


def scaled_rotaries(model: PreTrainedModel) -> list[nn.Module]:
    """Return the rotary embeddings of a model whose frequencies depend on a forward's largest position."""
    return [module for module in model.modules() if _kinds(module)]


def text_lengths(num_new: int, num_past: int, positions: Tensor | None, mask: Tensor | None) -> Tensor:
    """Return the lengths (rows or 1, 1) int64 of the texts of a forward: behind the last token that is seen.

    `positions` (rows or 1, new), `mask` (rows, past + new); where there are none, tokens stand behind the past.
    """
    if positions is None:
        positions = torch.arange(num_past, num_past + num_new)[None]
    positions = positions.cpu()
    if mask is not None:
        positions = positions.where(mask[:, -num_new:].cpu().bool(), 0)
    return positions.amax(1, keepdim=True) + 1


@contextmanager
def at_lengths(rotaries: Sequence[nn.Module], lengths: Tensor | None) -> Iterator[None]:
    """Let rotary embeddings take the frequencies of each token from `lengths` (rows or 1, tokens or 1) on the CPU."""
    with ExitStack() as hooks:
        if lengths is not None:
            for module in rotaries:
                hook = module.register_forward_hook(partial(_embed, lengths), with_kwargs=True)
                hooks.callback(hook.remove)
        yield


def _embed(lengths: Tensor, module: Any, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
    """Return cos and sin (rows, tokens, width), or what the module returns of both, from the module's own code."""
    given = dict(zip(("x", "position_ids", "layer_type"), args, strict=False)) | named
    kind = given.get("layer_type")
    if kind not in _kinds(module):
        return output
    switch = _switch(module, kind)
    # A longrope has two sets of frequencies, a dynamic NTK one for each length beyond the switch.
    longest = int(lengths.max())
    lengths = lengths.where(lengths > switch, switch)
    lengths = lengths.where(lengths == switch, longest) if _type(module, kind) == "longrope" else lengths
    found: tuple[Tensor, ...] | None = None
    for length in sorted(set(lengths.flatten().tolist())):
        here = _embed_at(length, module, given)
        if found is None:
            found = here
        else:
            is_here = (lengths == length)[..., None].to(here[0].device)
            found = tuple(mine.where(is_here, others) for mine, others in zip(here, found, strict=True))
    assert found is not None
    return found if isinstance(output, tuple) else found[0]


def _embed_at(length: int, module: Any, given: dict[str, Any]) -> tuple[Tensor, ...]:
    """Return the embedding of positions in a text of `length` tokens; those beyond it are of other texts."""
    positions = given["position_ids"]
    last = positions.new_full((positions.shape[0], 1), length - 1)
    if "dynamic" in _type(module, given.get("layer_type")):  # it keeps the frequencies of the longest text since
        module.forward(**{**given, "position_ids": torch.zeros_like(last)})
    embedded = module.forward(**{**given, "position_ids": torch.cat([positions.clamp(max=length - 1), last], dim=1)})
    return tuple(values[:, :-1] for values in (embedded if isinstance(embedded, tuple) else (embedded,)))


def _type(module: Any, kind: str | None) -> str:
    return str(module.rope_type if kind is None else module.rope_type[kind])


def _kinds(module: Any) -> list[str | None]:
    """The layer types whose positions a rotary embedding scales; [None] where it has one for all layers."""
    types = getattr(module, "rope_type", None)
    by_kind = types if isinstance(types, dict) else {None: types}
    return [kind for kind, one in by_kind.items() if one == "longrope" or "dynamic" in str(one)]


def _switch(module: Any, kind: str | None) -> int:
    """The length of a text, in tokens, beyond which frequencies change."""
    if _type(module, kind) != "longrope":
        return int(module.original_max_seq_len)
    numbers = module.config.rope_parameters
    return int((numbers if kind is None else numbers[kind])["original_max_position_embeddings"])
