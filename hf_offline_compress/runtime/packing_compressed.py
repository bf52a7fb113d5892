"""Whole numbers of a few bits, packed into bytes without gaps between them."""

import torch
from torch import Tensor
from torch.nn import functional as F

TOGETHER = 8  # so many codes of b bits fill b bytes


def packed_length(count: int, bits: int) -> int:
    """Return how many bytes `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return codes [..., count] of 1 to 16 bits each as bytes [..., packed length], the low bits first."""
    count = codes.shape[-1]
    codes = F.pad(codes.to(torch.int32), (0, -count % TOGETHER)).unflatten(-1, (-1, TOGETHER))
    packed = codes.new_zeros(*codes.shape[:-1], bits)
    for k, first, shift in _places(bits):
        for i in range((shift + bits + 7) // 8):
            packed[..., first + i] |= ((codes[..., k] << shift) >> (8 * i)) & 255
    return packed.flatten(-2)[..., : packed_length(count, bits)].to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return codes [..., count], int32, of bytes that `pack` has made."""
    whole = F.pad(packed, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits)).to(torch.int32)
    codes = []
    for _, first, shift in _places(bits):
        code = whole[..., first] >> shift
        for i in range(1, (shift + bits + 7) // 8):
            code = code | (whole[..., first + i] << (8 * i - shift))
        codes.append(code & (2**bits - 1))
    return torch.stack(codes, dim=-1).flatten(-2)[..., :count]


def round_min_max(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return packed codes, scales and minima of a weight [rows, columns], rounded to 2ᵇ evenly spaced values.

    Each `group_size` columns of a row have a scale and a minimum of their own, both [rows, groups].
    """
    columns = weight.shape[1]
    filling = -columns % group_size
    parts = torch.cat([weight, weight[:, -1:].expand(-1, filling)], dim=1).unflatten(1, (-1, group_size))
    minima, maxima = parts.aminmax(dim=2)
    scales = (maxima - minima) / (2**bits - 1)
    steps = torch.where(scales > 0, scales, torch.ones_like(scales))
    codes = ((parts - minima[..., None]) / steps[..., None]).round().clamp(0, 2**bits - 1)
    return pack(codes.flatten(1)[:, :columns].to(torch.int32), bits), scales, minima


def _places(bits: int) -> list[tuple[int, int, int]]:
    """Return for each code of a whole number of bytes: its index, its first byte, and its first bit there."""
    return [(k, k * bits // 8, k * bits % 8) for k in range(TOGETHER)]
