"""Integers of a few bits, packed into bytes without gaps."""

import math

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


def spanned_bytes(bits: int, window: int) -> int:
    """Return how many bytes `window` bits span at most, if they begin where a code of `bits` bits does."""
    return -(-(8 - math.gcd(8, bits) + window) // 8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return codes [..., count], int32, of bytes that `pack` has made."""
    groups = -(-count // TOGETHER)
    spanned = spanned_bytes(bits, bits)
    whole = F.pad(packed, (0, groups * bits + spanned - 1 - packed.shape[-1])).to(torch.int32)
    windows = whole[..., : groups * bits].clone()  # what begins with each byte
    for i in range(1, spanned):
        windows |= whole[..., i : i + groups * bits] << (8 * i)
    first = torch.arange(TOGETHER, device=packed.device, dtype=torch.int32) * bits
    codes = windows.unflatten(-1, (groups, bits)).index_select(-1, first >> 3)
    codes >>= first & 7
    codes &= 2**bits - 1
    return codes.flatten(-2)[..., :count]


def round_min_max(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return packed codes, scales and packed zeros of a weight [rows, columns], rounded to 2ᵇ evenly spaced values.

    Each `group_size` columns of a row have a scale and a zero of their own, [rows, groups] before they are packed.
    """
    columns = weight.shape[1]
    parts = F.pad(weight, (0, -columns % group_size)).unflatten(1, (-1, group_size))
    scales, zeros = even_steps(parts.amin(dim=2), parts.amax(dim=2), bits)
    codes = (parts / scales[..., None] + zeros[..., None] / 2).round().clamp(0, 2**bits - 1)
    return pack(codes.flatten(1)[:, :columns], bits), scales, pack(zeros, bits + 1)


def even_steps(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return scale and zero of 2ᵇ evenly spaced values between `low` and `high`, 0 among what they span.

    Code c stands for (c - zero / 2) · scale: zeros count half steps, so they take a bit more than codes.
    """
    low, high = low.clamp_max(0), high.clamp_min(0)
    scales = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(low.dtype).tiny)
    return scales, (-2 * low / scales).round()


def _places(bits: int) -> list[tuple[int, int, int]]:
    """Return for each code of a whole number of bytes: its index, its first byte, and its first bit there."""
    return [(k, k * bits // 8, k * bits % 8) for k in range(TOGETHER)]
