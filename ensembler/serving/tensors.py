"""The weights of one member, tensor by tensor from its files, with its adapter or patch added on the way."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from safetensors import safe_open

from ensembler.config import MemberConfig
from ensembler.errors import MemberError, PatchError
from ensembler.patch.changes import load_change, patch_in_place
from ensembler.patch.places import local_folder
from ensembler.patch.plan import Part, Plan, make_plan
from ensembler.weights import naming


def plan_member(role: str, member: MemberConfig) -> Plan:
    """Find a member's files, and check from headers alone that its adapter fits them; raise MemberError where not."""
    try:
        with naming(role):
            parts = [] if member.adapter is None else [Part(local_folder(member.adapter))]
            return make_plan(parts, local_folder(member.model))
    except PatchError as error:
        raise MemberError(
            f"{role}: {error}; vLLM loads what is a sum with the weights: merge it with PEFT first, and give that model"
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
