"""A linear layer of vLLM with a LoRA, on the weights of another layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear
from vllm.model_executor.layers.linear import LinearMethodBase


@dataclass(frozen=True)
class Factors:
    """A LoRA of one layer on this rank, which adds (x Aᵀ) Bᵀ: `a` (r, in), `b` (out, r) and the scale in `b`."""

    a: Tensor
    b: Tensor


class AdaptedLinearMethod(LinearMethodBase):  # type: ignore[misc,unused-ignore]
    """Computes x Wᵀ + (x Aᵀ) Bᵀ on this rank, in place of a layer's own method: the layer gathers or adds up both."""

    def create_weights(self, layer: nn.Module, *arguments: Any, **options: Any) -> None:
        """Do nothing: an adapted layer is made of one that has its weights."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return outputs (tokens, out) for `x` (tokens, in)."""
        base = layer.base_layer
        outputs: Tensor = base.quant_method.apply(base, x, bias)
        return outputs + linear(linear(x, layer.lora_a), layer.lora_b)


@cache
def _adapted_class(kind: Any) -> Any:
    """Return a class whose `weight` is that of the layer inside, which vLLM may replace once it is loaded."""
    return type(f"Adapted{kind.__name__}", (kind,), {"weight": property(lambda layer: layer.base_layer.weight)})


def adapt(layer: nn.Module, factors: Factors) -> nn.Module:
    """Return a layer like `layer` and on its weights, which adds a LoRA."""
    kind = _adapted_class(type(layer))  # type: ignore[arg-type]
    adapted = kind.__new__(kind)
    adapted.__dict__.update(vars(layer))
    adapted._parameters = {name: weight for name, weight in layer._parameters.items() if name != "weight"}
    adapted._buffers, adapted._modules = dict(layer._buffers), {"base_layer": layer}
    adapted.lora_a = nn.Parameter(factors.a, requires_grad=False)
    adapted.lora_b = nn.Parameter(factors.b, requires_grad=False)
    adapted.quant_method = AdaptedLinearMethod()
    made: nn.Module = adapted
    return made
