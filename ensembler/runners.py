"""Run the members on one input. The serial runner runs one after another, each on its own device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from ensembler.errors import RunError


@dataclass(frozen=True)
class Step:
    """One input for all members.

    `input_ids` (rows, positions) int64; `attention_mask` (rows, past + positions) or None where nothing is padded;
    `position_ids` (rows or 1, positions) or None; `logits_to_keep`: how many last positions go through the
    head (0: all), or which.
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    logits_to_keep: int | Tensor = 0


@dataclass(frozen=True)
class Member:
    """A loaded model in its role. Ids from `num_held` on are replaced by `substitute`, if there is one, before they are
    read; `accepts` names the arguments of its forward.
    """

    role: str
    model: PreTrainedModel
    num_held: int
    substitute: int | None
    accepts: frozenset[str]

    def run(self, step: Step, cache: Cache | None) -> Tensor:
        """Return this member's logits (rows, kept positions, V_member) in its own dtype, on its own device."""
        device = self.model.device
        ids = step.input_ids.to(device)
        if self.substitute is not None:
            ids = torch.where(ids < self.num_held, ids, self.substitute)
        keep = step.logits_to_keep
        optional = {
            "attention_mask": _to(step.attention_mask, device),
            "position_ids": _to(step.position_ids, device),
            "logits_to_keep": keep.to(device) if isinstance(keep, Tensor) else keep,
        }
        accepted = {name: value for name, value in optional.items() if name in self.accepts}
        output = self.model(input_ids=ids, past_key_values=cache, use_cache=cache is not None, **accepted)
        logits: Tensor = output.logits
        if "logits_to_keep" not in accepted:
            logits = logits[:, slice(-keep, None) if isinstance(keep, int) else keep]
        return logits


def run_serial(members: Mapping[str, Member], step: Step, caches: Mapping[str, Cache] | None) -> dict[str, Tensor]:
    """Return the logits of every member, one after another. Raises RunError with the role that failed."""
    logits = {}
    for role, member in members.items():
        try:
            logits[role] = member.run(step, None if caches is None else caches[role])
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"{role} ran out of memory on {member.model.device} for {step.input_ids.shape[0]} rows; "
                "use a smaller batch or another device"
            ) from error
    return logits


def _to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
