"""Factors → integers of few bits with scales: to the nearest, or each factor under the metric that others induce."""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.numbers_compressed import in_order, pack_numbers
from ..runtime.packing_compressed import even_steps, pack
from ..structures import LowRank, Stored
from ..structures.storage import GROUP_SIZE, Storage
from .base import Factors, Problem
from .feedback import DAMPING, feed_back, inverse_roots
from .low_rank import damped_root
from .quantized import decoded_codes, nearest_codes

# Damping of the metric that one factor induces on the other. It is exact, so this only keeps it from being singular.
INDUCED_DAMPING = 1e-6


@torch.no_grad()
def rounded_to_integers(problem: Problem, factors: Factors, storage: Storage) -> Factors:
    """Return factors with their numbers as codes, scales and zeros, by the names that `Storage.kept` gives them.

    Of low rank, the basis is rounded first, with error feedback in the metric H of the inputs; the latents are then
    refitted to the rounded basis, in closed form, and rounded in the metric B H Bᵀ that it induces. Everything else
    is rounded to the nearest.

    Args:
        problem: what was solved.
        factors: its answer.
        storage: with bits.
    """
    if isinstance(problem.structure, LowRank) and not problem.structure.identity_block:
        bits = storage.integers(
            {"latents": _stored(factors.members[0]["latents"]), "weight": _stored(factors.decoder["weight"])}
        )
        if len(bits) == 2:
            return _low_rank(problem, factors, bits, getattr(torch, storage.dtype))
    return Factors(
        tuple(_rounded(member, storage) for member in factors.members),
        _rounded(factors.decoder, storage),
        factors.notes,
    )


def shared_steps(numbers: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return scales and zeros of numbers in the order in which they are packed, `GROUP_SIZE` of them to each."""
    parts = torch.nn.functional.pad(numbers, (0, -len(numbers) % GROUP_SIZE)).view(-1, GROUP_SIZE)
    return even_steps(parts.amin(dim=1), parts.amax(dim=1), bits)


def _stored(tensor: Tensor) -> Stored:
    return Stored(tuple(tensor.shape), None if tensor.is_floating_point() else "uint8")


def _rounded(tensors: dict[str, Tensor], storage: Storage) -> dict[str, Tensor]:
    integers = storage.integers({name: _stored(tensor) for name, tensor in tensors.items()})
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name not in integers:
            kept[name] = tensor
            continue
        packed = pack_numbers(tensor.float(), integers[name], GROUP_SIZE)
        kept |= {f"{name}_{part}": value for part, value in packed.items()}
    return kept


def _low_rank(problem: Problem, factors: Factors, bits: dict[str, int], dtype: torch.dtype) -> Factors:
    """Return both factors rounded, W the members stacked along rows, W ≈ Z Bᵀ with B the decoder's weight."""
    basis = factors.decoder["weight"].float()  # [columns, rank]
    moments = problem.input_moments
    codes, basis = _fed_back(basis, moments, bits["weight"], DAMPING, dtype)
    decoder = {f"weight_{part}": value for part, value in codes.items()}
    weight = torch.cat([member.double() for member in problem.weights])
    # ‖(W − Z Bᵀ) L‖² with L Lᵀ = H: the least squares of Z are the same whatever weighs the rows.
    root = None if moments is None else damped_root(moments.to(weight.device))
    shaped = basis.double().T if root is None else basis.double().T @ root
    wanted = weight if root is None else weight @ root
    latents = torch.linalg.lstsq(
        shaped.T, wanted.T, driver="gelsd" if shaped.device.type == "cpu" else "gels"
    ).solution.T
    induced = (shaped @ shaped.T).float()
    members = []
    for own in latents.float().split([len(member) for member in problem.weights]):
        codes, _ = _fed_back(own.T.contiguous(), induced, bits["latents"], INDUCED_DAMPING, dtype, transposed=True)
        members.append({f"latents_{part}": value for part, value in codes.items()})
    return Factors(tuple(members), decoder, factors.notes)


def _fed_back(
    tensor: Tensor,
    moments: Tensor | None,
    bits: int,
    damping: float,
    dtype: torch.dtype,
    transposed: bool = False,
) -> tuple[dict[str, Tensor], Tensor]:
    """Return codes, scales and zeros of a factor, and what they stand for, both in the factor's own layout.

    Args:
        tensor: [dimensions of the metric, others]; errors in one are compensated in those after it.
        moments: the metric; None where there is none.
        bits: of a code.
        damping: of the metric.
        dtype: that scales are stored in.
        transposed: whether the factor is stored as [others, dimensions], and packed so.
    """

    def packing(x: Tensor) -> Tensor:
        return in_order(x.T if transposed else x)

    numbers = packing(tensor)
    scales, zeros = shared_steps(numbers, bits)
    stored = scales.to(dtype).float()
    scales = torch.where(stored > 0, stored, scales)
    # Each number's place in the order of packing says whose scale it has.
    place = torch.arange(len(numbers), device=tensor.device)
    place = place.view(tensor.shape) if transposed else place.view(tensor.shape[1], -1).T
    group = place // GROUP_SIZE
    codes, decoded = torch.empty_like(tensor), torch.empty_like(tensor)

    def code(row: int, wanted: Tensor) -> Tensor:
        scale, zero = scales[group[row]], zeros[group[row]]
        codes[row] = nearest_codes(wanted[0], scale, zero, bits)
        decoded[row] = decoded_codes(codes[row], scale, zero)
        return decoded[row][None]

    if moments is None:
        for row in range(len(tensor)):
            code(row, tensor[row][None])
    else:
        roots = inverse_roots([moments.to(tensor.device)], damping, tensor.device)
        feed_back(tensor[None].clone(), roots, [0], lambda start, end: None, code)
    packed = {"codes": pack(packing(codes)[None], bits)[0], "scales": scales, "zeros": pack(zeros[None], bits + 1)[0]}
    return packed, decoded
