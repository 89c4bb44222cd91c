"""Several members on one copy of the weights: a backbone, and the adapters that make members of it.

Members that differ only in plain LoRA run as one batched forward: the rows of one member stand behind those of the
other, and each adapter adds its update to its own rows. PEFT does the same (`adapter_names` with '__base__'), at three
times the cost of a token of a small model. Other adapters are left to PEFT and take one forward each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from ensembler.adapters import CheckedAdapter, base_name
from ensembler.errors import OutputError, RunError
from ensembler.patch.addition import deltas_added, read_tensor
from ensembler.patch.formats import ADAPTER_WEIGHTS


class Routing:
    """The members that the forward under way serves, a block of rows for each."""

    def __init__(self) -> None:
        self.blocks: tuple[str, ...] = ()
        self.num_rows = 0

    @contextmanager
    def through(self, blocks: tuple[str, ...], num_rows: int) -> Iterator[None]:
        """Send a forward of `num_rows` rows (all blocks together) through `blocks`."""
        before = self.blocks, self.num_rows
        self.blocks, self.num_rows = blocks, num_rows
        try:
            yield
        finally:
            self.blocks, self.num_rows = before


class AdaptedLinear(nn.Module):
    """A linear layer of the backbone: x·Wᵀ, and for the rows of an adapter + s·(x·Aᵀ)·Bᵀ."""

    def __init__(self, base: nn.Module, routing: Routing) -> None:
        super().__init__()
        self.base = base
        self._routing = routing
        self._scaling: dict[str, float] = {}

    weight = property(lambda self: self.base.weight, doc="The weight of the base: some models ask for its dtype.")
    bias = property(lambda self: self.base.bias, doc="The bias of the base.")

    def add(self, name: str, down: Tensor, up: Tensor, scaling: float) -> None:
        """Add the adapter `name`: A (r, in) and B (out, r), with its scaling s."""
        self.register_buffer(f"down_{name}", down, persistent=False)
        self.register_buffer(f"up_{name}", up, persistent=False)
        self._scaling[name] = scaling

    def forward(self, x: Tensor) -> Tensor:
        """x (rows, ..., in), the rows of the blocks one behind the other, to (rows, ..., out)."""
        y: Tensor = self.base(x)
        blocks = self._routing.blocks
        if not any(name in self._scaling for name in blocks):
            return y
        if x.shape[0] % self._routing.num_rows:
            raise RunError(f"a layer was given {x.shape[0]} rows; expected a multiple of {self._routing.num_rows}")
        if y.requires_grad:  # autograd lets nobody write into what a function of bitsandbytes returned
            y = y.clone()
        y = y.contiguous()  # of any other layout `flatten` would give a copy, and the update be lost with it
        flat_x, flat_y = x.flatten(0, -2), y.flatten(0, -2)
        rows = flat_x.shape[0] // len(blocks)
        for index, name in enumerate(blocks):
            if name in self._scaling:
                own = slice(index * rows, (index + 1) * rows)
                down, up = getattr(self, f"down_{name}"), getattr(self, f"up_{name}")
                small = nn.functional.linear(flat_x[own].to(down.dtype), down)
                flat_y[own].addmm_(small.to(y.dtype), up.t().to(y.dtype), alpha=self._scaling[name])
        return y


class Backbone:
    """One copy of the weights and the members that it serves.

    `views` has a model for each role: it runs that member alone, like any other model, on the shared weights. Where
    `batched`, `through` lets one forward run several of them, a block of rows for each.
    """

    def __init__(self, model: PreTrainedModel, adapters: Mapping[str, CheckedAdapter | None]) -> None:
        """Attach `adapters` by role; None stands for the backbone as it is."""
        given = {role: adapter for role, adapter in adapters.items() if adapter is not None}
        self.model = model
        self.batched = all(_is_batchable(model, role, adapter) for role, adapter in given.items())
        self._switch = _attach_plain(model, given) if self.batched else PeftSwitch(model, given)
        self.views = {role: _view(model, self._switch, role) for role in adapters}

    def through(self, roles: tuple[str, ...], num_rows: int) -> AbstractContextManager[None]:
        """Make the forwards of `model` inside this context run `roles`, one block of rows behind the other."""
        return self._switch.through(roles, num_rows)


def _attach_plain(model: PreTrainedModel, adapters: Mapping[str, CheckedAdapter]) -> Routing:
    """Replace the linear layers of `model` by AdaptedLinear and fill them; the rest of the model is as it was."""
    routing = Routing()
    for role, adapter in adapters.items():
        for name, factors in ({} if adapter.patch is None else adapter.patch.low_rank).items():
            parent, _, child = name.removesuffix(".weight").rpartition(".")
            layer = getattr(model.get_submodule(parent), child)
            if not isinstance(layer, AdaptedLinear):
                layer = AdaptedLinear(layer, routing)
                setattr(model.get_submodule(parent), child, layer)
            like = _like(layer.base, model.dtype)
            down, up = (read_tensor(factor).to(**like) for factor in (factors.a, factors.b))
            layer.add(role, down, up, factors.scale)
    return routing


class PeftSwitch:
    """Adapters that PEFT attached under the names of their roles, one of them in use at a time.

    Biases (`bias='all'`) and embeddings that an adapter's file holds are not additions: PEFT writes them over the
    backbone's own. Here each member gets its own for the time of its forward, and the backbone keeps what it had. So
    it is with the weights to which a patch adds full deltas.
    """

    def __init__(self, model: PreTrainedModel, adapters: Mapping[str, CheckedAdapter]) -> None:
        from peft import PeftConfig, PeftModel

        self._own = {role: list[tuple[nn.Parameter, Tensor]]() for role in adapters}
        patched: Any = None
        for role, adapter in adapters.items():
            known = _base_tensors(model)
            own = _own_tensors(model, role, adapter)
            before = {name: known[name].detach().clone() for name in own}
            settings: Any = PeftConfig.from_pretrained(adapter.folder)
            if hasattr(settings, "bias"):
                settings.bias = "none"  # PEFT has no place for biases of two adapters; here is one
            if patched is None:
                patched = PeftModel.from_pretrained(
                    model, adapter.folder, adapter_name=role, config=settings, autocast_adapter_dtype=False
                )
            else:
                patched.add_adapter(role, settings, autocast_adapter_dtype=False)
                patched.load_adapter(adapter.folder, adapter_name=role, autocast_adapter_dtype=False)
            known = _base_tensors(model)
            for name, tensor in before.items():
                known[name].data.copy_(tensor)
                value = own[name].to(tensor.device, tensor.dtype)
                if not torch.equal(value, tensor):
                    self._own[role].append((known[name], value))
        self._patched = patched.eval().requires_grad_(False)

    @contextmanager
    def through(self, roles: tuple[str, ...], num_rows: int) -> Iterator[None]:
        """Run one member, with its adapter if it has one."""
        (role,) = roles
        if role not in self._own:
            with self._patched.disable_adapter():
                yield
            return
        self._patched.base_model.set_adapter(role, inference_mode=True)
        # Where the model has moved since, its own weights move once, too.
        own = self._own[role] = [(one, tensor.to(one.device, one.dtype)) for one, tensor in self._own[role]]
        before = [(parameter, parameter.data) for parameter, _ in own]
        try:
            for parameter, tensor in own:
                parameter.data = tensor
            yield
        finally:
            for parameter, tensor in before:
                parameter.data = tensor


def _is_batchable(model: PreTrainedModel, role: str, adapter: CheckedAdapter) -> bool:
    """Return whether the adapter is plain LoRA, and its file holds no tensor that the base has otherwise."""
    if not adapter.is_plain_lora or adapter.deltas:
        return False
    known = _base_tensors(model)
    return all(
        torch.equal(known[name].detach().cpu(), tensor.to(known[name].dtype))
        for name, tensor in _own_tensors(model, role, adapter).items()
    )


def _own_tensors(model: PreTrainedModel, role: str, adapter: CheckedAdapter) -> dict[str, Tensor]:
    """The tensors that stand in for the model's own by their names there: of the adapter's file, and full deltas."""
    known = _base_tensors(model)
    with safe_open(adapter.folder / ADAPTER_WEIGHTS, framework="pt") as tensors:
        names = {base_name(key): key for key in tensors.keys()}  # noqa: SIM118 - it is no mapping
        own = {name: tensors.get_tensor(key) for name, key in names.items() if name in known}
    away = next((name for name in own if known[name].is_meta), None)
    if away is not None:
        raise ValueError(
            f"the adapter of {role} holds {away}, and the base's is on disk or offloaded; keep it on a device"
        )
    return {**own, **deltas_added(known, adapter)}


def _base_tensors(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The parameters of a model by the names that they had before PEFT wrapped its layers."""
    return {base_name(name): tensor for name, tensor in model.named_parameters(remove_duplicate=False)}


class _Routed:
    """The forward of a model, through one member: what `view.forward` is. Its signature is the model's."""

    def __init__(self, forward: Callable[..., Any], switch: Routing | PeftSwitch, role: str) -> None:
        self.__wrapped__ = forward
        self._switch = switch
        self._role = role

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        inputs = args[0] if inputs is None else inputs
        with self._switch.through((self._role,), inputs.shape[0]):
            return self.__wrapped__(*args, **kwargs)


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    raise OutputError(
        "this member's weights are those of a backbone, its adapter apart; save the ensemble, with copy_members=True"
    )


def _view(model: PreTrainedModel, switch: Routing | PeftSwitch, role: str) -> PreTrainedModel:
    """A model of the same weights whose forward goes through `switch`."""
    view = copy.copy(model)
    view.forward = _Routed(model.forward, switch, role)
    view.save_pretrained = _refuse_to_save
    view.generation_config = copy.deepcopy(model.generation_config)
    return view


def _like(base: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """Return device and dtype of the adapter of a layer: those of its weights, unless those are quantised or away."""
    weight: Any = base.weight
    hook = getattr(base, "_hf_hook", None)  # accelerate's: the weights may be elsewhere between two forwards
    device = weight.device if hook is None or hook.execution_device is None else hook.execution_device
    return {"device": device, "dtype": weight.dtype if weight.dtype.is_floating_point else dtype}
