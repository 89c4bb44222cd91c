"""FP8 weights (e4m3) with scales: of blocks, as DeepSeek and Qwen3-FP8 keep them, of rows, or one for the weight.

Value = code · scale. A scale stays as long as all new values of its block fit it: what does not change is then kept bit
by bit. Otherwise the largest value becomes the largest code, 448 (Micikevicius et al. 2022, arXiv 2209.05433).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ensembler.patch.schemes.scheme import Parts, Scheme, power_of_two

WEIGHT, SCALE = "weight", "scale"
LARGEST = torch.finfo(torch.float8_e4m3fn).max
_DECODED_SCALE = 2.0**8  # fp16 with the bits of e4m3 is smaller by the difference of their biases, 15 and 7
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


class FP8(Scheme):
    """Codes `weight` (rows, columns) with the scales `scale`, one for each block (rows, columns) of `block`.

    `is_power`: scales are powers of two (scale_fmt ue8m0).
    """

    def __init__(self, matrix: tuple[int, int], block: tuple[int, int], *, is_power: bool = False) -> None:
        self.block = (min(block[0], matrix[0]), min(block[1], matrix[1]))
        self.is_power = is_power
        self.is_whole = self.block == matrix
        self.unit = 1 if self.is_whole else self.block[0]
        self.part_rows = {WEIGHT: self.unit, SCALE: 0 if self.is_whole else 1}
        of_row = "a scale for each row" if self.block == (1, matrix[1]) else f"blocks of {block[0]} x {block[1]}"
        self.label = "FP8 with one scale" if self.is_whole else f"FP8 with {of_row}"

    @property
    def needs_largest(self) -> bool:
        return self.is_whole

    def dequantize(self, parts: Parts) -> Tensor:
        values = _decoded(parts[WEIGHT])
        blocks, scale = self._paired(values, parts[SCALE].float() * _DECODED_SCALE)
        blocks.mul_(scale)
        return values

    def quantize(self, values: Tensor, parts: Parts, largest: float | None = None) -> dict[str, Tensor]:
        old = parts[SCALE].float()
        peaks = torch.full_like(old, largest) if self.is_whole and largest is not None else self._peaks(values)
        scale = torch.where(peaks <= old * LARGEST, old, self._rounded(peaks / LARGEST, parts[SCALE].dtype))
        blocks, inverse = self._paired(values, 1 / scale.clamp_min(_SMALLEST_SCALE))
        codes = (blocks * inverse).clamp_(-LARGEST, LARGEST).view(values.shape)
        return {WEIGHT: codes.to(torch.float8_e4m3fn), SCALE: scale.to(parts[SCALE].dtype)}

    def _rounded(self, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Return scales as their file can hold them."""
        if self.is_power or dtype == torch.float8_e8m0fnu:
            return power_of_two(torch.ceil(torch.log2(scale.clamp_min(_SMALLEST_SCALE))).int())
        return scale.to(dtype).float()

    def _paired(self, values: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return views of values and scales, in shapes that multiply each block by its scale."""
        rows, columns = values.shape
        if rows % self.block[0] or columns % self.block[1]:
            scale = scale.repeat_interleave(self.block[0], 0)[:rows].repeat_interleave(self.block[1], 1)[:, :columns]
            return values, scale
        return self._by_block(values), scale.view(-1, 1, columns // self.block[1], 1)

    def _peaks(self, values: Tensor) -> Tensor:
        """Return the largest magnitude of each block."""
        rows, columns = values.shape
        if rows % self.block[0] or columns % self.block[1]:
            values = pad(values, (0, -columns % self.block[1], 0, -rows % self.block[0]))
        blocks = self._by_block(values)
        return torch.maximum(blocks.amax((1, 3)), -blocks.amin((1, 3)))  # no copy, as abs() would make

    def _by_block(self, values: Tensor) -> Tensor:
        return values.view(values.shape[0] // self.block[0], self.block[0], -1, self.block[1])


def _decoded(codes: Tensor) -> Tensor:
    """Return the values of codes over 2⁸ in fp32: on a CPU by way of fp16, a tenth of the time of torch's own way."""
    if codes.device.type != "cpu":
        return codes.float().div_(_DECODED_SCALE)
    if codes.numel() and int((codes.view(torch.uint8) & 127).amax()) == 127:  # NaN, which fp16 has elsewhere
        return codes.float() / _DECODED_SCALE
    bits = codes.view(torch.int8).to(torch.int16)
    bits <<= 7
    bits &= ~(1 << 14)  # the sign stands in all higher bits
    return bits.view(torch.float16).float()
