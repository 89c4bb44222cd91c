"""Members of vLLM on one copy of the weights: layers are one object, a LoRA is added to the output of its layers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.linear import (
    LinearBase,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.parameter import ModelWeightParameter

from ensembler.patch.addition import load_update
from ensembler.patch.patch_plan import PatchPlan
from ensembler.serving.vllm_adapted import Factors, adapt

LOAD_ERRORS = (KeyError, ValueError, AttributeError, AssertionError)
"""Errors that `load_weights` of vLLM's models raises for tensors that they do not take."""

_MOST_ERROR = 0.02
"""Of a layer's update from its factors in the model's dtype, against the update itself, by Frobenius norms."""

_logger = init_logger(__name__)


class _NotShared(Exception):
    """A member needs weights of its own; the message says why."""


@dataclass(frozen=True)
class Backbone:
    """Members on the weights of one folder; the first of `members` holds them. `factors`: by role and layer."""

    members: Mapping[str, nn.Module]
    factors: Mapping[str, Mapping[str, Factors]]

    @property
    def holder(self) -> str:
        """The role whose model loads the weights."""
        return next(iter(self.members))

    def join(self) -> None:
        """Put the holder's layers into the other members, and each member's LoRA around its layers."""
        for parent, name, layer in self.changes():
            setattr(parent, name, layer)

    def changes(self) -> list[tuple[nn.Module, str, nn.Module]]:
        """Return (module, name of a child, what to put there), the holder's last: the others' are found by its own.

        Raises _NotShared where a module with weights is a member's own.
        """
        base = self.members[self.holder]
        layers = {name: base.get_submodule(name) for factors in self.factors.values() for name in factors}
        apart = set(layers.values())
        found: list[tuple[nn.Module, str, nn.Module]] = []
        for role in [*self.members][::-1]:
            adapted = {layers[name]: adapt(layers[name], factors) for name, factors in self.factors[role].items()}
            found += _changes(self.members[role], base, apart, adapted)
        return found


def find_backbones(members: Mapping[str, nn.Module], plans: Mapping[str, PatchPlan]) -> list[Backbone]:
    """Return the members that can share their weights, for each folder that several are of.

    Their patches are plain LoRAs on linear layers. Weights of these members are overwritten; load them afterwards.
    """
    found = []
    for folder in dict.fromkeys(plan.model.folder for plan in plans.values()):
        roles = [role for role in members if plans[role].model.folder == folder]
        if len(roles) > 1:
            factors = {role: _try_reading(role, members[role], plans[role]) for role in roles}
            backbone = _backbone(members, {role: own for role, own in factors.items() if own is not None})
            found += [] if backbone is None else [backbone]
    return found


def _backbone(members: Mapping[str, nn.Module], factors: Mapping[str, Mapping[str, Factors]]) -> Backbone | None:
    backbone = Backbone({role: members[role] for role in factors}, factors)
    if len(factors) < 2:
        return None
    try:
        backbone.changes()
    except _NotShared as reason:
        _logger.warning("%s have a copy of their weights each: %s", " and ".join(factors), reason)
        return None
    return backbone


def _try_reading(role: str, member: nn.Module, plan: PatchPlan) -> dict[str, Factors] | None:
    try:
        return _read_factors(member, plan)
    except (_NotShared, RuntimeError, *LOAD_ERRORS) as reason:
        _logger.warning("%s has a copy of the weights of its own, with its patch added: %s", role, reason)
        return None


@torch.no_grad()
def _read_factors(member: Any, plan: PatchPlan) -> dict[str, Factors]:
    """Return the factors of a member's patches by the layer that they change; raise _NotShared for another patch.

    The member's own `load_weights` says which layer a tensor of the files goes to, and where in it. It is given the
    update itself too, and the factors must give the same.
    """
    for weight in member.parameters():
        weight.zero_()
    parts: dict[str, list[_Part]] = {}
    for name in plan.names:
        part = _Part.read(plan, name)
        parts.setdefault(_load_update(member, part), []).append(part)
    return {name: _layer_factors(member, member.get_submodule(name), own) for name, own in parts.items()}


@dataclass(frozen=True)
class _Part:
    """A LoRA of the tensor `name`, in fp32: `a` (r, in), `b` (out, r); `turned`: the tensor lies as (in, out)."""

    name: str
    a: Tensor
    b: Tensor
    turned: bool

    @classmethod
    def read(cls, plan: PatchPlan, name: str) -> _Part:
        kinds = {patch.low_rank[name].transposed for patch in plan.patches if name in patch.low_rank}
        is_whole = any(name in patch.full or name in patch.replaced for patch in plan.patches)
        update = load_update(plan.patches, name)
        if is_whole or update.parts or len(kinds) != 1 or update.left is None or update.right is None:
            raise _NotShared(f"its patch changes {name} as a whole")
        turned = kinds.pop()
        a, b = (update.left.T, update.right.T) if turned else (update.right, update.left)
        return cls(name, a, b, turned)

    def as_stored(self, matrix: Tensor) -> tuple[str, Tensor]:
        """Return a matrix whose rows are outputs as the files would hold it, with the name."""
        return self.name, matrix.T.contiguous() if self.turned else matrix


def _load_update(member: Any, part: _Part) -> str:
    """Add Δ to a member's zero weights as if it were a weight; return the name of the layer that it is in."""
    loaded = member.load_weights([part.as_stored(part.b @ part.a)])
    names = [name.removesuffix(".weight") for name in loaded or () if name.endswith(".weight")]
    layer = member.get_submodule(names[0]) if len(names) == 1 else None
    if not isinstance(layer, LinearBase) or not isinstance(layer.quant_method, UnquantizedLinearMethod):
        raise _NotShared(f"{part.name} is no linear layer of vLLM's model")
    return str(names[0])


def _layer_factors(member: Any, layer: Any, parts: list[_Part]) -> Factors:
    """Return the factors of a layer on this rank, of all tensors that are packed into it side by side."""
    weight = layer.weight
    a = torch.cat([part.a for part in parts])
    if isinstance(layer, RowParallelLinear):
        a = a.narrow(1, layer.tp_rank * layer.input_size_per_partition, layer.input_size_per_partition)
    a = a.to(weight).contiguous()
    layer.weight = _room_for_b(layer, a.shape[0])
    try:
        start = 0
        for part in parts:
            columns = torch.zeros(part.b.shape[0], a.shape[0])
            columns[:, start : start + part.b.shape[1]] = part.b
            member.load_weights([part.as_stored(columns)])
            start += part.b.shape[1]
        b = layer.weight.data
    finally:
        layer.weight = weight
    update = weight.data.float()
    if not (b.float() @ a.float() - update).norm() <= _MOST_ERROR * update.norm():
        raise _NotShared(f"{type(member).__name__} changes {parts[0].name} when it is loaded")
    return Factors(a, b)


def _room_for_b(layer: Any, rank: int) -> nn.Parameter:
    """Return zeros (out, r) that vLLM's loaders fill as they fill the layer's weight, but for its split inputs."""
    zeros = torch.zeros(layer.weight.shape[0], rank, dtype=layer.weight.dtype, device=layer.weight.device)
    if isinstance(layer, RowParallelLinear):
        whole = nn.Parameter(zeros, requires_grad=False)
        whole.weight_loader = lambda weight, loaded: weight.data.copy_(loaded)  # type: ignore[attr-defined]
        return whole
    room = ModelWeightParameter(data=zeros, input_dim=1, output_dim=0, weight_loader=layer.weight.weight_loader)
    room.tp_rank, room.tp_size = layer.tp_rank, layer.tp_size
    found: nn.Parameter = room
    return found


def _changes(
    own: nn.Module, base: nn.Module, apart: Collection[nn.Module], adapted: Mapping[nn.Module, nn.Module]
) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yield what to put into `own` to have it run on the layers of `base`, those `adapted` in their adapted form.

    A whole module is taken where neither a KV cache is in it nor one of the layers that stand `apart`.
    """
    if any(one is not None for one in own._parameters.values()):
        raise _NotShared(f"{type(own).__name__} has weights beside its attention")
    # A layer with a name in vLLM's forward context runs what is registered there, whatever becomes of its children.
    if type(own) is not type(base) or own._modules.keys() != base._modules.keys() or hasattr(own, "layer_name"):
        raise _NotShared(f"{type(own).__name__} cannot be taken apart")
    for name, child in list(base._modules.items()):
        mine: Any = own._modules[name]
        if child is None:
            continue
        if child in adapted:
            yield own, name, adapted[child]
        elif isinstance(child, AttentionLayerBase):
            if any(True for _ in mine.parameters()):
                raise _NotShared(f"{type(child).__name__} has weights beside its cache")
        elif any(isinstance(one, AttentionLayerBase) or (one in apart and one is not child) for one in child.modules()):
            yield from _changes(mine, child, apart, adapted)
        elif mine is not child:
            yield own, name, child


def mark_compiled(members: Mapping[str, nn.Module], backbones: Collection[Backbone]) -> None:
    """Tell vLLM's compilation cache which layers have LoRAs of which rank: its key knows configurations alone."""
    ranks = [
        (role, name, factors.a.shape[0])
        for backbone in backbones
        for role, layers in backbone.factors.items()
        for name, factors in layers.items()
    ]
    digest = sha256(repr(ranks).encode()).hexdigest()
    for module in (module for member in members.values() for module in member.modules()):
        config = getattr(module, "vllm_config", None)
        if config is not None and isinstance(config.additional_config, dict):
            config.additional_config = {**config.additional_config, "ensembler_adapted_layers": digest}
