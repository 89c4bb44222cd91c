"""Run one model on a step: its inputs, the members that it serves, and the error that names them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ensembler.engine.backbone import Backbone
from ensembler.engine.cuda_graphs import why_not_captured
from ensembler.engine.devices import out_of_memory, send
from ensembler.engine.row_cache import MaskKind
from ensembler.engine.scaled_positions import PositionScale, at_lengths, scaled_rotaries
from ensembler.errors import EnsemblerError, LogitsError, RunError
from ensembler.files import one_line
from ensembler.vocab import VocabularyContract

NAME = "ensembler_grouped"


def grouped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Return attention (rows, n, heads, width) of queries (rows, heads, n, width) to keys (rows, groups, slots, w)."""
    rows, heads, num, width = query.shape
    groups = key.shape[1]
    # What shapes the scores otherwise, or is no mask for all heads, is left to transformers.
    others = {name for name, given in options.items() if given is not None} - {"dropout", "scaling", "sliding_window"}
    is_plain = attention_mask is not None and attention_mask.shape[1] == 1 and not options.get("dropout")
    if heads == groups or not is_plain or others & {"position_bias", "softcap", "s_aux", "head_mask"}:
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return found
    assert attention_mask is not None
    of_group = heads // groups
    packed = query.reshape(rows, groups, of_group * num, width)
    mask = attention_mask[:, :, None].expand(-1, -1, of_group, -1, -1).flatten(2, 3)
    attended = torch.nn.functional.scaled_dot_product_attention(
        packed, key, value, attn_mask=mask, scale=options.get("scaling")
    )
    return attended.reshape(rows, heads, num, value.shape[-1]).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, grouped_attention)


@contextmanager
def grouped(model: PreTrainedModel) -> Iterator[None]:
    """Let `model` run with grouped attention inside, where it takes any attention and has sdpa."""
    config: Any = model.config.get_text_config(decoder=True)
    if config._attn_implementation != "sdpa" or not getattr(model, "_supports_attention_backend", False):
        yield
        return
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


@dataclass(frozen=True)
class Step:
    """One input for all members.

    `input_ids` (rows, positions) int64; `attention_mask` (rows, past + positions) or None where nothing is padded;
    `position_ids` (rows or 1, positions) or None; `logits_to_keep`: how many last positions go through the
    head (0: all), or which. On a RowCache there is no mask: `position_ids` (rows, positions) say where each token
    stands, −1 is padding, and rows of the cache are read from `first_row` on. Ids and positions are on the CPU then.
    `lengths` (rows, positions or 1) int64 on the CPU: of the text that each token is read for, where positions are
    scaled by it (None: up to the token on a RowCache, else up to the last token that is seen).
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    logits_to_keep: int | Tensor = 0
    first_row: int = 0
    lengths: Tensor | None = None

    def to(self, device: torch.device) -> Step:
        """Return the same on a device, but for `lengths`; nothing is copied where it is there already."""
        there: dict[str, Any] = {k: send(v, device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **{**there, "lengths": self.lengths})

    def last(self, num: int) -> Step:
        """Return the same for the last `num` tokens of each row, behind all others."""
        positions = None if self.position_ids is None else self.position_ids[:, -num:]
        return replace(self, input_ids=self.input_ids[:, -num:], position_ids=positions)

    def without_left_padding(self) -> Step:
        """Return whole texts with their padding on the right, and all logits: for a model that ignores masks."""
        if self.attention_mask is None or bool(self.attention_mask[:, 0].all()):
            return self
        order = self._order(self.attention_mask.argmax(1, keepdim=True))
        ids, mask = self.input_ids.gather(1, order), self.attention_mask.gather(1, order)
        return replace(self, input_ids=ids, attention_mask=mask, position_ids=None, logits_to_keep=0)

    def moved_back(self, logits: Tensor) -> Tensor:
        """Return the logits that are kept, from those (rows, positions, V) of `without_left_padding`."""
        assert self.attention_mask is not None
        order = self._order(-self.attention_mask.argmax(1, keepdim=True)).to(logits.device)
        keep = self.logits_to_keep
        order = order[:, slice(-keep, None) if isinstance(keep, int) else keep]
        return logits.gather(1, order[..., None].expand(-1, -1, logits.shape[-1]))

    def _order(self, first: Tensor) -> Tensor:
        num = self.input_ids.shape[1]
        return (torch.arange(num, device=first.device) + first) % num

    def padded(self, num_rows: int, num: int) -> Step:
        """Return the same on `num_rows` rows of a RowCache, with `num` tokens each: −1 is their position."""
        assert self.position_ids is not None
        more = (0, num - self.input_ids.shape[1], 0, num_rows - self.input_ids.shape[0])
        ids = torch.nn.functional.pad(self.input_ids, more)
        return replace(self, input_ids=ids, position_ids=torch.nn.functional.pad(self.position_ids, more, value=-1))


@dataclass(frozen=True, eq=False)
class ModelRunner:
    """Run one model: for the member in `roles`, or for several on a shared `backbone`, a block of rows for each."""

    roles: tuple[str, ...]
    model: PreTrainedModel
    contract: VocabularyContract
    backbone: Backbone | None = None

    @cached_property
    def name(self) -> str:
        """The roles joined by '+'."""
        return "+".join(self.roles)

    @cached_property
    def accepts(self) -> frozenset[str]:
        """The names of the arguments of the model's forward."""
        return frozenset(inspect.signature(plain_model(self.model).forward).parameters)

    @cached_property
    def cache_name(self) -> str:
        """The name of the cache among the arguments of the model's forward: Mamba has one of its own."""
        return next((name for name in ("past_key_values", "cache_params") if name in self.accepts), "past_key_values")

    @cached_property
    def probe(self) -> Tensor | None:
        """One of the model's weights, which shows whether they have moved."""
        return next(self.model.parameters(), None)

    @cached_property
    def device(self) -> torch.device:
        """The device of the model's inputs: of a model on several devices the first that computes."""
        devices = (getattr(self.model, "hf_device_map", None) or {}).values()
        first = next((device for device in devices if str(device) not in ("cpu", "disk")), None)
        if first is not None:
            return torch.device("cuda", first) if isinstance(first, int) else torch.device(first)
        if devices or self.probe is None:
            return torch.device("cpu")
        if self.probe.is_meta:  # offloaded by accelerate, whose hooks say where the model computes
            hooks = (getattr(module, "_hf_hook", None) for module in self.model.modules())
            found = (getattr(hook, "execution_device", None) for hook in hooks)
            return torch.device(next((one for one in found if one is not None), "cpu"))
        return self.probe.device

    @cached_property
    def mask_kind(self) -> MaskKind:
        """The masks that the model takes on a RowCache."""
        return MaskKind.of(plain_model(self.model))

    @cached_property
    def rotaries(self) -> list[nn.Module]:
        """The rotary embeddings of the model that take their frequencies from the length of a text."""
        return scaled_rotaries(self.model)

    @cached_property
    def scale(self) -> PositionScale | None:
        """The scale of the model's positions, or None where they have none."""
        return PositionScale.of(plain_model(self.model), self.rotaries)

    @cached_property
    def why_not_captured(self) -> str | None:
        """The reason why the model's steps cannot be captured as a CUDA graph, or None."""
        return why_not_captured(self.model)

    def run(self, step: Step, mask: Any, cache: Any, call: Callable[..., Any] | None = None) -> dict[str, Tensor]:
        """Return the logits (rows, kept positions, V_member) of its members in their own dtype, on their device.

        `step` is on `device`; `call` runs the model (None: itself). Raises RunError with the role where it fails.
        """
        try:
            return self._run(step, mask, cache, self.model if call is None else call)
        except EnsemblerError:
            raise
        except Exception as error:  # a model may raise anything; the user has to learn which of them it was
            roles = " and ".join(self.roles)
            if out_of_memory(error):
                raise RunError(
                    f"{roles} ran out of memory on {self.device} for {step.input_ids.shape[0]} rows; use a smaller "
                    "batch or another device (ensembler plan says what fits where)"
                ) from error
            cause = getattr(error, "inner_exception", error)  # torch.compile's own says only that a backend failed
            raise RunError(f"{roles} failed: {type(cause).__name__}: {one_line(cause)}") from error

    def _run(self, step: Step, mask: Any, cache: Any, call: Callable[..., Any]) -> dict[str, Tensor]:
        num, rows, keep = len(self.roles), step.input_ids.shape[0], step.logits_to_keep
        optional = {
            "attention_mask": self._mask(_repeated(mask, num, rows), step, cache),
            "position_ids": _repeated(step.position_ids, num, rows),
            "logits_to_keep": keep,
            self.cache_name: cache,
        }
        accepted = {name: value for name, value in optional.items() if name in self.accepts}
        known = [self.contract.known_ids(role, step.input_ids) for role in self.roles]
        ids = known[0] if num == 1 else torch.cat(known)
        through = nullcontext() if self.backbone is None else self.backbone.through(self.roles, num * rows)
        scaled = at_lengths(self.rotaries, _repeated(step.lengths, num, rows)) if self.rotaries else nullcontext()
        with through, scaled:
            output = call(input_ids=ids, use_cache=cache is not None, **accepted)
        logits: Tensor = output.logits
        if "logits_to_keep" not in accepted:
            logits = logits[:, slice(-keep, None) if isinstance(keep, int) else keep]
        return dict(zip(self.roles, torch.split(logits, rows), strict=True))

    def _mask(self, mask: Any, step: Step, cache: Any) -> Any:
        """Return a mask (rows, past + positions) as the model's own `generate` hands it over, any other as it is."""
        if cache is None or not isinstance(mask, Tensor) or mask.dim() != 2:
            return mask
        if self.cache_name == "cache_params":  # a state knows the past
            return mask if mask.shape[1] == step.input_ids.shape[1] else None
        model: Any = plain_model(self.model)
        make = getattr(model, "create_masks_for_generate", None)
        if make is None or not cache.is_compileable:
            return mask
        like = torch.empty((mask.shape[0], step.input_ids.shape[1], 0), dtype=model.dtype, device=mask.device)
        positions = step.position_ids
        return make(model.config, like, mask, past_key_values=cache, position_ids=positions)


def plan_runners(
    models: Mapping[str, PreTrainedModel], backbones: Sequence[Backbone], contract: VocabularyContract
) -> list[ModelRunner]:
    """Return the runners that serve `models` by role, in their order, those on the same weights one after another.

    There is one for each member, but one for all that a backbone batches. A view of a backbone that was compiled runs
    by itself.
    """
    runners: list[ModelRunner] = []
    for role, model in models.items():
        if any(role in runner.roles for runner in runners):
            continue
        shared = next((one for one in backbones if one.views.get(role) is plain_model(model)), None)
        if shared is None:
            runners.append(ModelRunner((role,), model, contract))
            continue
        views = [one for one in models if shared.views.get(one) is plain_model(models[one])]
        batch = tuple(one for one in views if one in shared.batched and models[one] is shared.views[one])
        if len(batch) > 1:
            runners.append(ModelRunner(batch, shared.model, contract, shared))
            views = [one for one in views if one not in batch]
        runners += [ModelRunner((one,), models[one], contract) for one in views]
    return runners


def check_nan(logits: Mapping[str, Tensor]) -> None:
    """Raise LogitsError naming the first member that computed NaN; `logits` by role, on any devices."""
    for role, values in logits.items():
        if values.isnan().any():
            raise LogitsError(f"{role} computed NaN logits in {values.dtype}; try another dtype for it")


def plain_model(model: Any) -> Any:
    """The model that torch.compile wrapped, which hides the arguments of its forward; any other as it is."""
    return getattr(model, "_orig_mod", model)


def _repeated(tensor: Any, num: int, rows: int) -> Any:
    """One block of rows for each member; a tensor of one row for many serves all blocks, and takes no more memory."""
    if isinstance(tensor, dict):
        return {kind: _repeated(one, num, rows) for kind, one in tensor.items()}
    if tensor is None or num == 1 or tensor.shape[0] != rows:
        return tensor
    if tensor.stride(0) == 0:
        return tensor[:1].expand(num * rows, *[-1] * (tensor.dim() - 1))
    return tensor.repeat(num, *[1] * (tensor.dim() - 1))
