"""One forward of one model: what it reads, whom it serves, and what to say when it fails."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ensembler.engine.backbone import Backbone
from ensembler.engine.devices import out_of_memory, send
from ensembler.engine.row_cache import MaskKind
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
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    logits_to_keep: int | Tensor = 0
    first_row: int = 0

    def on(self, device: torch.device) -> Step:
        """Return the same on a device; nothing is copied where it is there already."""
        there: dict[str, Any] = {k: send(v, device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **there)

    def padded(self, num_rows: int, num: int) -> Step:
        """Return the same on `num_rows` rows of a RowCache, with `num` tokens each: −1 is their position."""
        assert self.position_ids is not None
        more = (0, num - self.input_ids.shape[1], 0, num_rows - self.input_ids.shape[0])
        ids = torch.nn.functional.pad(self.input_ids, more)
        return replace(self, input_ids=ids, position_ids=torch.nn.functional.pad(self.position_ids, more, value=-1))


@dataclass(frozen=True)
class Reader:
    """The ids that one member reads: those from `num_held` on become `substitute` (None: it holds all of them)."""

    role: str
    num_held: int
    substitute: int | None

    def read(self, ids: Tensor) -> Tensor:
        """Return ids (rows, positions) as this member knows them."""
        return ids if self.substitute is None else torch.where(ids < self.num_held, ids, self.substitute)


@dataclass(frozen=True)
class Forward:
    """One forward of one model: for one member, or for several on a shared backbone, a block of rows for each.

    `accepts` names the arguments of the model's forward; `device` is where its inputs are wanted; `probe` is one of its
    weights, which says whether they have moved.
    """

    readers: tuple[Reader, ...]
    model: PreTrainedModel
    accepts: frozenset[str]
    device: torch.device
    probe: Tensor | None
    backbone: Backbone | None = None

    @cached_property
    def roles(self) -> tuple[str, ...]:
        """The members that it serves, in the order of their rows."""
        return tuple(reader.role for reader in self.readers)

    @cached_property
    def name(self) -> str:
        """Return its roles in one word."""
        return "+".join(self.roles)

    @cached_property
    def mask_kind(self) -> MaskKind:
        """Return which masks its model takes on a RowCache."""
        return MaskKind.of(plain_model(self.model))

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
        num = len(self.readers)
        rows = step.input_ids.shape[0]
        keep = step.logits_to_keep
        optional = {
            "attention_mask": _repeated(mask, num, rows),
            "position_ids": _repeated(step.position_ids, num, rows),
            "logits_to_keep": keep,
        }
        accepted = {name: value for name, value in optional.items() if name in self.accepts}
        read = [reader.read(step.input_ids) for reader in self.readers]
        ids = read[0] if num == 1 else torch.cat(read)
        with nullcontext() if self.backbone is None else self.backbone.through(self.roles, num * rows):
            output = call(input_ids=ids, past_key_values=cache, use_cache=cache is not None, **accepted)
        logits: Tensor = output.logits
        if "logits_to_keep" not in accepted:
            logits = logits[:, slice(-keep, None) if isinstance(keep, int) else keep]
        return dict(zip(self.roles, torch.split(logits, rows), strict=True))


def plan_forwards(
    models: Mapping[str, PreTrainedModel], backbones: Sequence[Backbone], contract: VocabularyContract
) -> list[Forward]:
    """Return the forwards that serve `models` by role, in their order, those on the same weights one after another.

    There is one forward for each member, but one for all that a backbone batches. A view of a backbone that was
    compiled runs by itself.
    """
    groups: list[list[Forward]] = []
    for backbone in backbones:
        views = [role for role, model in models.items() if backbone.views.get(role) is plain_model(model)]
        together = [role for role in views if backbone.batched and models[role] is backbone.views[role]]
        together = together if len(together) > 1 else []
        group = [_forward(together, backbone.model, contract, backbone)] if together else []
        group += [_forward([role], models[role], contract) for role in views if role not in together]
        groups += [group] if group else []
    served = {role for group in groups for forward in group for role in forward.roles}
    groups += [[_forward([role], model, contract)] for role, model in models.items() if role not in served]
    order = list(models)
    groups.sort(key=lambda group: order.index(group[0].roles[0]))
    return [forward for group in groups for forward in group]


def check_nan(logits: Mapping[str, Tensor]) -> None:
    """Raise LogitsError naming the first member that computed NaN; `logits` by role, on any devices."""
    for role, values in logits.items():
        if values.isnan().any():
            raise LogitsError(f"{role} computed NaN logits in {values.dtype}; try another dtype for it")


def _forward(
    roles: Sequence[str], model: PreTrainedModel, contract: VocabularyContract, backbone: Backbone | None = None
) -> Forward:
    accepts = frozenset(inspect.signature(plain_model(model).forward).parameters)
    probe = next(model.parameters(), None)
    readers = tuple(make_reader(role, contract) for role in roles)
    return Forward(readers, model, accepts, _device_of(model, probe), probe, backbone)


def _device_of(model: PreTrainedModel, probe: Tensor | None) -> torch.device:
    """Return the device of a model's inputs: of a model on several devices the first that computes."""
    places = getattr(model, "hf_device_map", None) or {}
    first = next((place for place in places.values() if str(place) not in ("cpu", "disk")), None)
    if first is not None:
        return torch.device("cuda", first) if isinstance(first, int) else torch.device(first)
    return torch.device("cpu") if places or probe is None else probe.device


def plain_model(model: Any) -> Any:
    """The model that torch.compile wrapped, which hides the arguments of its forward; any other as it is."""
    return getattr(model, "_orig_mod", model)


def make_reader(role: str, contract: VocabularyContract) -> Reader:
    """Return how the member in this role reads ids."""
    lacks_some = contract.held[role] < max(contract.held.values())
    return Reader(role, contract.held[role], contract.substitutes[role] if lacks_some else None)


def _repeated(tensor: Any, num: int, rows: int) -> Any:
    """One block of rows for each member; a tensor of one row for many serves all blocks, and takes no more memory."""
    if isinstance(tensor, dict):
        return {kind: _repeated(one, num, rows) for kind, one in tensor.items()}
    if tensor is None or num == 1 or tensor.shape[0] != rows:
        return tensor
    if tensor.stride(0) == 0:
        return tensor[:1].expand(num * rows, *[-1] * (tensor.dim() - 1))
    return tensor.repeat(num, *[1] * (tensor.dim() - 1))
