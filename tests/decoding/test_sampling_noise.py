"""The noise of draws: Philox as published, its distribution at the ends, and the numbers that it is made from."""

from __future__ import annotations

import pytest
import torch
from ensembler_kernels import make_noise, reference


def test_philox_answers_as_published() -> None:
    """The vectors of Random123 (Salmon et al. 2011), kat_vectors, philox4x32 10."""

    def words(counter: list[int], seed: int) -> list[int]:
        return [int(word) for word in reference.philox(*(torch.tensor(c) for c in counter), torch.tensor(seed))]

    assert words([0, 0, 0, 0], 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert words(pi, 0x299F31D0A4093822) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_counters_and_key_are_where_the_reference_says() -> None:
    """Token v: word v mod 4 of counter (v ÷ 4, position, sample, prompt), the seed as key."""
    seed, prompt, sample, position = 0x299F31D0A4093822, 7, 2**32 + 5, 11
    found = reference.gumbel(torch.tensor([[seed, prompt, sample, position]]), 10)[0]
    for token in range(10):
        counter = (torch.tensor(c) for c in (token // 4, position, 5, prompt))
        bits = reference.philox(*counter, torch.tensor(seed))[token % 4]
        uniform = ((bits >> 9).float() + 0.5) * 2.0**-23
        assert found[token] == -(-uniform.log()).log()


def test_noise_is_finite_at_both_ends() -> None:
    bits = torch.tensor([0, 0xFFFFFFFF])
    uniform = ((bits >> 9).float() + 0.5) * 2.0**-23
    noise = -(-uniform.log()).log()
    assert noise.isfinite().all(), noise
    assert -2.9 < noise[0] < noise[1] < 16.7, noise


@pytest.mark.parametrize(("seed", "kept"), [(0, 0), (-1, -1), (2**63, -(2**63)), (2**64 - 1, -1)])
def test_numbers_of_the_noise(seed: int, kept: int) -> None:
    assert make_noise(seed, [3, 4]).tolist() == [[kept, 3, 0, 0], [kept, 4, 0, 0]]
    noise = make_noise(seed, torch.tensor([3, 4]), [1, 2], torch.tensor([7, 8]))
    assert noise.tolist() == [[kept, 3, 1, 7], [kept, 4, 2, 8]]


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 0.5])
def test_a_seed_of_more_than_64_bits_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="seed: expected an integer of 64 bits, got"):
        make_noise(seed, [0])
