"""Lets `transformers`' own loop draw with the noise of the decode loop: a reference for sampled texts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from ensembler_kernels import make_noise
from ensembler_kernels.reference import gumbel
from torch import Tensor


@contextmanager
def shared_noise(seed: int, rows_per_prompt: int = 1) -> Iterator[None]:
    """Seed torch, and make each draw inside argmax(log p + noise), the noise being that of (prompt, sample, position).

    Each call is the next position of a batch whose prompts have `rows_per_prompt` rows each.
    """
    torch.manual_seed(seed)
    own_seed = int(torch.randint(2**63 - 1, ()))
    torch.manual_seed(seed)
    position = 0

    def draw(probabilities: Tensor, num_samples: int) -> Tensor:
        nonlocal position
        assert num_samples == 1
        rows = torch.arange(probabilities.shape[0])
        noise = make_noise(own_seed, rows // rows_per_prompt, rows % rows_per_prompt, torch.full_like(rows, position))
        position += 1
        return (probabilities.log() + gumbel(noise, probabilities.shape[1])).argmax(-1, keepdim=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", draw)
        yield
