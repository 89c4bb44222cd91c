"""The weights of one member, tensor by tensor from its files, with its adapter or patch added on the way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from ensembler.errors import MemberError, PatchError
from ensembler.patch.changes import load_change, patch_in_place
from ensembler.patch.plan import Part, Plan, make_plan
from ensembler.weights import naming


def plan_member(role: str, model: Path, adapter: Path | None) -> Plan:
    """Check from headers alone that the adapter fits the model's files; raise MemberError with the role where not."""
    try:
        with naming(role):
            return make_plan([] if adapter is None else [Part(adapter)], model)
    except PatchError as error:
        raise MemberError(
            f"{role}: {error}; vLLM loads what is a sum with the weights: merge it first with PEFT, or serve a merged copy"
        ) from error


def member_tensors(plan: Plan) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of the model's files under its name there, θ + Δθ where the patch changes it.

    The arithmetic is that of `patch apply`: fp32, rounded once to the tensor's own dtype. Memory is one tensor and the
    factors of its update. Raises PatchError or RunError where a value is damaged.
    """
    changed = set(plan.names)
    for file in dict.fromkeys(stored.file for stored in plan.tensors.values()):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                tensor = opened.get_tensor(name)
                if name in changed:
                    patch_in_place(tensor, load_change(plan.parts, name))
                yield name, tensor
