"""Several members on one copy of the weights: a backbone, and the adapters that make members of it.

Most members run as one batched forward: the rows of one member stand behind those of the other, and each adapter acts
on its own rows: it adds s·B·A to a layer, or lets tensors of its own stand in for the layer's. PEFT does the same
(`adapter_names` with '__base__'), at three times the cost of a token of a small model. The other adapters that leave
the weights as they are run in PEFT's layers, one forward each. `ensembler.adapters` says which adapters do neither.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from ensembler.adapters import CheckedAdapter
from ensembler.errors import OutputError, RunError
from ensembler.patch.addition import deltas_added, read_tensor
from ensembler.patch.formats import base_name


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


class LayerAdapters(nn.Module):
    """The adapters of one layer of a backbone, which changes the output for the rows of their members.

    It is a child of its layer, `adapters`, and its forward hook: the layer keeps its class and its names. A linear
    layer or an embedding gets + s·(x·Aᵀ)·Bᵀ; tensors of a member's own stand in for the layer's while it computes.
    """

    def __init__(self, layer: nn.Module, routing: Routing) -> None:
        super().__init__()
        self._routing = routing
        self._scaling: dict[str, float] = {}
        self._own: dict[str, list[str]] = {}
        self._layer = (layer,)  # in a tuple: it is no part of this module
        layer.add_module("adapters", self)
        layer.register_forward_hook(self._change, with_kwargs=True)

    @classmethod
    def of(cls, layer: nn.Module, routing: Routing) -> LayerAdapters:
        """Return those of a layer; it gets some if it has none."""
        found = getattr(layer, "adapters", None)
        return found if isinstance(found, LayerAdapters) else cls(layer, routing)

    def add(self, role: str, down: Tensor, up: Tensor, scaling: float) -> None:
        """Add a LoRA: A (r, in), of an embedding Aᵀ (tokens, r); B (out, r); its scaling s."""
        self.register_parameter(f"down_{role}", nn.Parameter(down, requires_grad=False))
        self.register_parameter(f"up_{role}", nn.Parameter(up, requires_grad=False))
        self._scaling[role] = scaling

    def add_own(self, role: str, name: str, value: Tensor) -> None:
        """Let `value` stand in for the layer's tensor `name`."""
        self.register_parameter(f"own_{name}_{role}", nn.Parameter(value, requires_grad=False))
        self._own.setdefault(role, []).append(name)

    def _change(self, layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        """Give `forward` what accelerate's hooks may move between devices, and so not the layer."""
        changed: Tensor = self(args, kwargs, output)
        return changed

    def forward(self, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        """Change an output (rows, ..., out) of the layer, the rows of the blocks one behind the other."""
        (layer,) = self._layer
        blocks, num_rows = self._routing.blocks, self._routing.num_rows
        if not any(role in self._scaling or role in self._own for role in blocks):
            return output
        if output.shape[0] == 1 < num_rows:  # position embeddings: one row for all
            output = output.expand(num_rows, *output.shape[1:])
        if output.shape[0] % num_rows:
            raise RunError(f"a layer was given {output.shape[0]} rows; expected a multiple of {num_rows}")
        # A copy: autograd lets nobody write into what a function of bitsandbytes returned; of another layout `flatten`
        # would give a copy, and the update be lost with it.
        y = output.clone(memory_format=torch.contiguous_format) if output.requires_grad else output.contiguous()
        for index, role in enumerate(blocks):
            part = partial(_block, index=index, num=len(blocks))
            mine: Tensor = part(y)
            if role in self._own:
                own = {name: getattr(self, f"own_{name}_{role}") for name in self._own[role]}
                others = chain(layer.named_parameters(recurse=False), layer.named_buffers(recurse=False))
                away = next((name for name, tensor in others if tensor.is_meta and name not in own), None)
                if away is not None:  # its memory would be read as it happens to be
                    raise RunError(
                        f"the adapter of {role} replaces the {' and '.join(own)} of a layer whose {away} is on disk or "
                        "offloaded; keep that on a device"
                    )
                inputs = tuple(map(part, args)), {name: part(value) for name, value in kwargs.items()}
                with self._routing.through((), 0):  # without these adapters
                    mine.copy_(functional_call(_unhooked(layer), own, *inputs, tie_weights=False))
            if role in self._scaling:
                down, up = getattr(self, f"down_{role}"), getattr(self, f"up_{role}")
                x = part(args[0])
                if isinstance(layer, nn.Embedding):
                    small = nn.functional.embedding(x, down)
                else:
                    small = nn.functional.linear(x.to(down.dtype), down)
                small = small.to(y.dtype).expand(*mine.shape[:-1], -1).flatten(0, -2)
                mine.flatten(0, -2).addmm_(small, up.t().to(y.dtype), alpha=self._scaling[role])
        return y


def _unhooked(layer: nn.Module) -> nn.Module:
    """Return the layer without the forward of accelerate's hooks, which would put its own weights back."""
    if "forward" not in vars(layer):
        return layer
    plain = copy.copy(layer)
    del plain.__dict__["forward"]
    return plain


def _block(value: Any, index: int, num: int) -> Any:
    """Return the rows of one of `num` blocks of a tensor; a row for all of them, and what has no rows, as it is."""
    if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] == 1:
        return value
    rows = value.shape[0] // num
    return value[index * rows : (index + 1) * rows]


class PeftLayers:
    """Adapters that PEFT attached beside the weights under the names of their roles, one of them in use at a time."""

    def __init__(self, model: PreTrainedModel, adapters: Mapping[str, CheckedAdapter]) -> None:
        from peft import PeftConfig, PeftModel

        self._roles = frozenset(adapters)
        self._patched: Any = None
        for role, adapter in adapters.items():
            options: dict[str, Any] = {"adapter_name": role, "autocast_adapter_dtype": False}
            if self._patched is None:
                self._patched = PeftModel.from_pretrained(model, adapter.folder, **options)
                continue
            settings = PeftConfig.from_pretrained(adapter.folder)
            self._patched.add_adapter(role, settings, autocast_adapter_dtype=False)
            self._patched.load_adapter(adapter.folder, **options)
        if self._patched is None:
            return
        self._patched.eval().requires_grad_(False)
        for module in model.modules():  # tied weights stay tied, under names that transformers would look for in vain
            if isinstance(module, PreTrainedModel):
                module._tied_weights_keys, module.all_tied_weights_keys = None, {}

    @contextmanager
    def using(self, roles: tuple[str, ...]) -> Iterator[None]:
        """Run one member with its adapter, or others with none of them."""
        if self._patched is None:
            yield
        elif self._roles.isdisjoint(roles):
            with self._patched.disable_adapter():
                yield
        else:
            (role,) = roles
            self._patched.base_model.set_adapter(role, inference_mode=True)
            yield


class Backbone:
    """One copy of the weights and the members that it serves.

    `views` has a model for each role: it runs that member alone, like any other model, on the shared weights. Those in
    `batched` may share a forward, a block of rows for each: `through`.
    """

    def __init__(self, model: PreTrainedModel, adapters: Mapping[str, CheckedAdapter | None]) -> None:
        """Attach `adapters` by role; None stands for the backbone as it is."""
        given = {role: adapter for role, adapter in adapters.items() if adapter is not None}
        by_peft = {role: adapter for role, adapter in given.items() if adapter.needs_peft}
        self.model = model
        self.batched = tuple(role for role in adapters if role not in by_peft)
        self._layers = PeftLayers(model, by_peft)
        self._routing = Routing()
        for role in self.batched:
            if role in given:
                _attach(model, role, given[role], self._routing)
        self.views = {role: _view(model, self, role) for role in adapters}

    @contextmanager
    def through(self, roles: tuple[str, ...], num_rows: int) -> Iterator[None]:
        """Make the forwards of `model` inside this context run `roles`, one block of rows behind the other."""
        with self._layers.using(roles), self._routing.through(roles, num_rows):
            yield


def _attach(model: PreTrainedModel, role: str, adapter: CheckedAdapter, routing: Routing) -> None:
    """Attach a patch to the layers of a model, whose own tensors stay as they are."""
    if adapter.patch is None:
        return
    layers = {base_name(f"{name}.")[:-1]: module for name, module in model.named_modules(remove_duplicate=False)}
    for name, factors in adapter.patch.low_rank.items():
        layer = layers[name.removesuffix(".weight")]
        like = _like(layer, model.dtype)
        down, up = (read_tensor(factor).to(**like) for factor in (factors.a, factors.b))
        scale = torch.as_tensor(getattr(layer, "embed_scale", 1), dtype=up.dtype)  # of Gemma's embeddings
        is_embedding = isinstance(layer, nn.Embedding)
        LayerAdapters.of(layer, routing).add(
            role, down.t().contiguous() if is_embedding else down, up, factors.scale * float(scale)
        )
    known = {base_name(name): tensor for name, tensor in model.named_parameters(remove_duplicate=False)}
    replaced = {name: read_tensor(stored).view(stored.shape) for name, stored in adapter.patch.replaced.items()}
    away = next((name for name in (*replaced, *adapter.deltas) if known[name].is_meta), None)
    if away is not None:
        raise ValueError(
            f"the adapter of {role} holds {away}, and the base's is on disk or offloaded; keep it on a device"
        )
    packed = next((name for name in (*replaced, *adapter.deltas) if _is_packed(known[name])), None)
    if packed is not None:
        raise ValueError(
            f"the adapter of {role} holds {packed}, and the base's is quantised; load the base without quantization, "
            "or merge the adapter into its model: ensembler patch apply"
        )
    own = dict(replaced)
    for name, value in deltas_added(known, adapter).items():  # of the weight itself, in all layers that are tied to it
        own |= {other: value for other, tensor in known.items() if tensor is known[name]}
    for name, value in own.items():
        value = value.to(known[name].device, known[name].dtype)
        if not torch.equal(value, known[name]):
            module, _, tensor_name = name.rpartition(".")
            LayerAdapters.of(layers[module], routing).add_own(role, tensor_name, value)


class _Routed:
    """The forward of a model, through one member: what `view.forward` is. Its signature is the model's."""

    def __init__(self, forward: Callable[..., Any], backbone: Backbone, role: str) -> None:
        self.__wrapped__ = forward
        self._backbone = backbone
        self._role = role

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        inputs = args[0] if inputs is None else inputs
        with self._backbone.through((self._role,), inputs.shape[0]):
            return self.__wrapped__(*args, **kwargs)


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    raise OutputError(
        "this member's weights are those of a backbone, its adapter apart; save the ensemble, with copy_members=True"
    )


def _view(model: PreTrainedModel, backbone: Backbone, role: str) -> PreTrainedModel:
    """A model of the same weights whose forward goes through `backbone`."""
    view = copy.copy(model)
    view.forward = _Routed(model.forward, backbone, role)
    view.save_pretrained = _refuse_to_save
    view.generation_config = copy.deepcopy(model.generation_config)
    return view


def _is_packed(weight: Tensor) -> bool:
    """Return whether a weight is quantised: integers, or floats of less than 16 bits."""
    return not weight.is_floating_point() or weight.dtype.itemsize < 2


def _like(layer: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """Return device and dtype of the adapter of a layer: those of its weights, unless those are quantised or away."""
    weight: Any = layer.weight
    hook = getattr(layer, "_hf_hook", None)  # accelerate's: the weights may be elsewhere between two forwards
    device = weight.device if hook is None or hook.execution_device is None else hook.execution_device
    return {"device": device, "dtype": dtype if _is_packed(weight) else weight.dtype}
