"""A model with the distribution of another and a multiple of its cost: layers are inserted that add nothing.

    python benchmarks/deepen.py MODEL OUT [--factor 4]

The output projections of the inserted layers (attention and MLP) are zero, so that the residual stream passes through
them as it was. Their number makes the weights that a token reads (all layers, and the head) `factor` times as many.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

_OUTPUTS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def num_layers_for(model: PreTrainedModel, factor: float) -> int:
    """Return how many layers make the weights that a token reads `factor` times as many."""
    layers = model.model.layers
    of_layer = sum(parameter.numel() for parameter in layers[0].parameters())
    head = model.get_output_embeddings().weight.numel()
    return round((factor * (of_layer * len(layers) + head) - head) / of_layer)


@torch.no_grad()
def deepen(folder: Path, out: Path, factor: float) -> int:
    """Write the deeper model of the one in `folder` to `out`; return its number of layers."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    old, new = len(model.model.layers), num_layers_for(model, factor)
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = new
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index * old // new] for index in range(new)]
    deep = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    weights = model.state_dict()
    found = {name: value for name, value in weights.items() if not name.startswith("model.layers.")}
    for index in range(new):
        source = index * old // new
        is_inserted = index > 0 and (index - 1) * old // new == source
        start = f"model.layers.{source}."
        for name, value in weights.items():
            if name.startswith(start):
                own = name.removeprefix(start)
                found[f"model.layers.{index}.{own}"] = value * 0 if is_inserted and own in _OUTPUTS else value
    deep.load_state_dict(found)
    ids = torch.arange(5, 37)[None]
    difference = (deep.eval()(ids).logits - model.eval()(ids).logits).abs().max().item()
    if difference > 1e-3:
        raise SystemExit(
            f"logits of the deeper model differ by {difference:.2g}; this architecture adds something else"
        )
    deep.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    return new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--factor", type=float, default=4.0)
    args = parser.parse_args()
    print(f"{deepen(args.model, args.out, args.factor)} layers, logits as before, in {args.out}")


if __name__ == "__main__":
    main()
