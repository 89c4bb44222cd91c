"""Several members on one copy of the weights: a backbone, and the adapters that make members of it.

Members that differ only in plain LoRA run as one batched forward: the rows of one member stand behind those of the
other, and each adapter adds its update to its own rows. PEFT does the same (`adapter_names` with '__base__'), at three
times the cost of a token of a small model. Other adapters are left to PEFT and take one forward each.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from ensembler.adapters import CheckedAdapter, adapter_weights
from ensembler.errors import RunError

_FEW_ROWS = range(2, 5)


class Routing:
    """Which adapters the forward under way goes through: one for each block of rows, None for the backbone alone."""

    def __init__(self) -> None:
        self.blocks: tuple[str | None, ...] = ()
        self.num_rows = 0

    @contextmanager
    def through(self, blocks: tuple[str | None, ...], num_rows: int) -> Iterator[None]:
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

    @property
    def weight(self) -> Any:
        """The base's: some models ask for its dtype."""
        return self.base.weight

    @property
    def bias(self) -> Any:
        """The base's."""
        return self.base.bias

    def add(self, name: str, down: Tensor, up: Tensor, scaling: float) -> None:
        """Add the adapter `name`: A (r, in) and B (out, r), with its scaling s."""
        self.register_buffer(f"down_{name}", down, persistent=False)
        self.register_buffer(f"up_{name}", up, persistent=False)
        self._scaling[name] = scaling

    def forward(self, x: Tensor) -> Tensor:
        """x (rows, ..., in), the rows of the blocks one behind the other, to (rows, ..., out)."""
        y = _linear(self.base, x)
        blocks = self._routing.blocks
        if not any(name in self._scaling for name in blocks):
            return y
        if x.shape[0] % self._routing.num_rows:
            raise RunError(f"a layer was given {x.shape[0]} of {self._routing.num_rows} rows; adapters cannot be told")
        rows = x.shape[0] // len(blocks)
        for index, name in enumerate(blocks):
            if name in self._scaling:
                own = slice(index * rows, (index + 1) * rows)
                down, up = getattr(self, f"down_{name}"), getattr(self, f"up_{name}")
                small = nn.functional.linear(x[own].to(down.dtype), down).flatten(0, -2)
                update = torch.mm(small, up.t()).view(y[own].shape)
                y[own].add_(update, alpha=self._scaling[name])
        return y


class Backbone:
    """One copy of the weights and the members that it serves.

    `views` has a model for each role: it runs that member alone, like any other model, on the shared weights. Where
    `batched`, `through` lets one forward run several of them, a block of rows for each.
    """

    def __init__(self, model: PreTrainedModel, adapters: Mapping[str, CheckedAdapter | None]) -> None:
        """Attach `adapters` by role; None stands for the backbone as it is."""
        self.model = model
        self.batched = all(adapter is None or adapter.scaling is not None for adapter in adapters.values())
        attach = _attach_plain if self.batched else _attach_peft
        self._enter = attach(model, {role: adapter for role, adapter in adapters.items() if adapter is not None})
        self.views = {role: _view(model, functools.partial(self._enter, (role,))) for role in adapters}

    def through(self, roles: tuple[str, ...], num_rows: int) -> AbstractContextManager[None]:
        """Make the forwards of `model` inside this context run `roles`, one block of rows behind the other."""
        return self._enter(roles, num_rows)


def _attach_plain(
    model: PreTrainedModel, adapters: Mapping[str, CheckedAdapter]
) -> Callable[[tuple[str, ...], int], AbstractContextManager[None]]:
    """Replace the linear layers of `model` by AdaptedLinear and fill them; the rest of the model is as it was."""
    routing = Routing()
    targets = {name for adapter in adapters.values() for name in adapter.scaling or ()}
    for name, module in list(model.named_modules()):
        if name in targets or type(module) is nn.Linear:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, AdaptedLinear(module, routing))
    for role, adapter in adapters.items():
        with safe_open(adapter_weights(role, adapter.path), framework="pt") as tensors:
            for name, scaling in (adapter.scaling or {}).items():
                layer = model.get_submodule(name)
                like = _like(layer.base, model.dtype)
                pair = (tensors.get_tensor(f"base_model.model.{name}.lora_{part}.weight") for part in "AB")
                down, up = (tensor.to(**like) for tensor in pair)
                layer.add(role, down, up, scaling)

    def enter(roles: tuple[str, ...], num_rows: int) -> AbstractContextManager[None]:
        return routing.through(tuple(role if role in adapters else None for role in roles), num_rows)

    return enter


def _attach_peft(
    model: PreTrainedModel, adapters: Mapping[str, CheckedAdapter]
) -> Callable[[tuple[str, ...], int], AbstractContextManager[None]]:
    """Let PEFT attach the adapters under the names of their roles, and switch between them."""
    from peft import PeftModel

    patched: Any = None
    for role, adapter in adapters.items():
        if patched is None:
            patched = PeftModel.from_pretrained(model, adapter.path, adapter_name=role, autocast_adapter_dtype=False)
        else:
            patched.load_adapter(adapter.path, adapter_name=role, autocast_adapter_dtype=False)
    patched.eval().requires_grad_(False)

    @contextmanager
    def enter(roles: tuple[str, ...], num_rows: int) -> Iterator[None]:
        (role,) = roles
        if role in adapters:
            patched.base_model.set_adapter(role, inference_mode=True)
            yield
        else:
            with patched.disable_adapter():
                yield

    return enter


def _view(model: PreTrainedModel, enter: Callable[[int], AbstractContextManager[None]]) -> PreTrainedModel:
    """A model of the same weights whose forward goes through `enter`."""
    view = copy.copy(model)
    forward = model.forward

    @functools.wraps(forward)
    def routed(*args: Any, **kwargs: Any) -> Any:
        inputs = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        inputs = args[0] if inputs is None else inputs
        with enter(inputs.shape[0]):
            return forward(*args, **kwargs)

    view.forward = routed
    view.generation_config = copy.deepcopy(model.generation_config)
    return view


def _like(base: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """Where and in which dtype the adapter of a layer is kept: with its weights, unless those are quantised or away."""
    weight: Any = base.weight
    hook = getattr(base, "_hf_hook", None)  # accelerate's: the weights may be elsewhere between two forwards
    device = weight.device if hook is None or hook.execution_device is None else hook.execution_device
    return {"device": device, "dtype": weight.dtype if weight.dtype.is_floating_point else dtype}


def _linear(base: Any, x: Tensor) -> Tensor:
    """base(x); for two to four rows in fp32 on a CPU as W·xᵀ, for which the library below is up to six times faster."""
    num_rows = x.numel() // x.shape[-1]
    if (
        num_rows in _FEW_ROWS
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and type(base) is nn.Linear
        and base.weight.dtype == torch.float32
        and not hasattr(base, "_hf_hook")
    ):
        flat = x.reshape(num_rows, -1).t()
        y = torch.mm(base.weight, flat) if base.bias is None else torch.addmm(base.bias[:, None], base.weight, flat)
        return y.t().contiguous().view(*x.shape[:-1], -1)
    return cast(Tensor, base(x))
