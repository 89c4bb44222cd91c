"""The values of Δ that go downhill: those whose sign is that of −gradient of the loss on a few labelled examples at θ′.

GradFix (Rinaldi et al., ICLR 2026, arXiv 2510.09658): a value stays where its sign agrees, and is 0 elsewhere, so that
for the gradient that is used the update lowers the loss to first order. The sign is the majority over the examples, the
paper's way for few of them: each example is a vote, and a tie keeps nothing. (Cited without equation numbers: its
abstract and published descriptions were at hand, and not the whole text.)

Cost: one forward and one backward pass of θ′ in fp32 for each example. Memory: the model in fp32, one gradient, and 1
byte of votes for each weight value that the patch can change (2 from 128 examples on, 4 from 32,768 on); afterwards 1
bit for each, and while a tensor is written its Δ in fp32, of as many tensors at once as there are threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from ensembler.errors import MemberError, PatchError
from ensembler.files import one_line
from ensembler.patch.addition import WeightUpdate, load_update
from ensembler.patch.model_layout import layout_of
from ensembler.patch.patch_plan import PatchPlan
from ensembler.patch.transports.transport import (
    Calibration,
    Example,
    Progress,
    Sources,
    Transport,
    check_plain,
    delta_rows,
    loaded_names,
    silent,
)
from ensembler.safetensors_files import StoredTensor, listed


@dataclass(frozen=True)
class SignMask(Transport):
    """Keep the values of Δ whose bit is set: `bits` packed by tensor, 8 in a byte, in the order of the values."""

    tensors: Mapping[str, StoredTensor]
    bits: Mapping[str, np.ndarray[Any, Any]]
    kept: float
    data: Calibration

    name = "sign-mask"
    needs = ("data",)

    @classmethod
    def check(cls, plan: PatchPlan, sources: Sources) -> None:
        """Raise PatchError for quantised weights."""
        check_plain(plan, cls.name)

    @classmethod
    def prepare(cls, plan: PatchPlan, sources: Sources, progress: Progress = silent) -> Self:
        """Take the gradients of θ′ on the examples, and keep one bit for each value of Δ. Raises InputError."""
        data = _data(sources)
        examples = data.encode(AutoTokenizer.from_pretrained(plan.model.folder))
        try:
            model = AutoModelForCausalLM.from_pretrained(plan.model.folder, dtype=torch.float32).eval()
        except Exception as error:  # transformers raises what it likes for a model that it cannot load
            raise MemberError(f"{plan.model.folder} cannot be loaded: {one_line(error)}") from error
        weights = _changed_weights(model, plan)
        with progress(len(examples), "gradients") as advance:
            votes = count_votes(model, weights, examples, advance)
        del model, weights
        bits, num_kept, num_values = {}, 0, 0
        for name in list(votes):
            mask, num_nonzero = _mask(load_update(plan.patches, name), votes.pop(name))
            bits[name] = np.packbits(mask)
            num_kept, num_values = num_kept + int(mask.sum()), num_values + num_nonzero
        kept = num_kept / num_values if num_values else 0.0
        return cls(plan.model.tensors, bits, kept, data)

    def apply(self, name: str, update: WeightUpdate) -> WeightUpdate:
        """Return Δ with 0 for the values whose sign does not agree, as one full delta in memory."""
        if update.replacement is not None or name not in self.bits:
            return update
        stored = self.tensors[name]
        delta = _whole(update, *stored.matrix)
        mask = np.unpackbits(self.bits[name], count=stored.num_elements)
        delta.mul_(torch.from_numpy(mask).view(delta.shape))
        masked = replace(stored, dtype="F32", start=0, num_bytes=delta.nbytes, values=delta)
        return WeightUpdate(full=((masked, 1.0),))

    @property
    def notes(self) -> tuple[str, ...]:
        """Say how much was kept, and by which examples."""
        return (
            f"transport sign-mask: {100 * self.kept:.1f} % of the values of the update go against the gradient and are "
            f"kept, by {self.data.num_rows:,} examples of {self.data.said}",
        )


def count_votes(
    model: nn.Module, weights: Mapping[str, nn.Parameter], examples: Sequence[Example], advance: Any
) -> dict[str, Tensor]:
    """Return Σ over examples of sign(−gradient of −log p(answer | prompt)) for some weights, by name.

    A gradient is counted as soon as it is there, and dropped, so that there is one at a time.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    dtype = next(each for each in (torch.int8, torch.int16, torch.int32) if len(examples) <= torch.iinfo(each).max)
    votes: dict[int, Tensor] = {}

    def count(parameter: Tensor) -> None:
        assert parameter.grad is not None
        votes[id(parameter)].sub_(parameter.grad.sign().to(dtype))
        parameter.grad = None

    handles: list[Any] = []
    distinct: list[Any] = list({id(weight): weight for weight in weights.values()}.values())
    for parameter in distinct:
        parameter.requires_grad_(True)
        votes[id(parameter)] = torch.zeros(parameter.shape, dtype=dtype)
        handles.append(parameter.register_post_accumulate_grad_hook(count))
    for example in examples:
        ids = torch.tensor([[*example.prompt, *example.answer]])
        labels = ids.clone()
        labels[:, : len(example.prompt)] = -100
        model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        advance(1)
    for handle in handles:
        handle.remove()
    return {name: votes[id(weight)] for name, weight in weights.items()}


def _changed_weights(model: Any, plan: PatchPlan) -> dict[str, nn.Parameter]:
    """Return the weights in memory of the tensors that the plan changes, by their names on disk."""
    loaded = loaded_names(layout_of(model, plan.model.tensors))
    known = dict(model.named_parameters(remove_duplicate=False))
    replaced = {name for patch in plan.patches for name in patch.replaced}
    names = [name for name in plan.names if name not in replaced]
    unknown = [name for name in names if loaded.get(name) not in known]
    if unknown:
        raise PatchError(
            f"{listed(unknown)} in {plan.model.folder} has no weight of its own when the model is loaded, so that "
            "there is no gradient of it; use --transport add"
        )
    return {name: known[loaded[name]] for name in names}


def _whole(update: WeightUpdate, rows: int, columns: int) -> Tensor:
    delta = torch.empty(rows, columns)
    for start, block in delta_rows(update, rows, columns):
        delta[start : start + len(block)] = block
    return delta


def _mask(update: WeightUpdate, votes: Tensor) -> tuple[np.ndarray[Any, Any], int]:
    """Return whether Δ and the votes have one sign, value by value, and the number of values that are not 0."""
    matrix = votes.reshape(-1, votes.shape[-1]) if votes.dim() > 1 else votes.reshape(-1, 1)
    signs = _whole(update, *matrix.shape).sign_()
    agree = (signs == matrix.sign()) & (signs != 0)
    return agree.numpy().reshape(-1), int(torch.count_nonzero(signs))


def _data(sources: Sources) -> Calibration:
    assert sources.data is not None  # `find_transport` has seen to it
    return sources.data
