"""The integer kernels that torch offers on this CPU: found by trying each of them on an int8 matrix."""

import platform
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# Codes of weights lie between −LARGEST and LARGEST, those of activations between 0 and 255.
LARGEST = 127


class Engine:
    """A kernel that multiplies activations by an int8 matrix; it quantizes the activations itself, with one scale for all.

    Attributes:
        name: its name for users and in benchmarks.
    """

    name = ""

    def offered(self) -> bool:
        """Whether this torch claims to have it, on this machine."""
        raise NotImplementedError

    def pack(self, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Any:
        """Return int8 codes [rows, columns] and float32 scales [rows] of a matrix in the form that the kernel reads."""
        raise NotImplementedError

    def multiply(self, x: Tensor, packed: Any) -> Tensor:
        """Return x Wᵀ (+ bias), float32 [tokens, columns] → [tokens, rows]."""
        raise NotImplementedError


class FusedEngine(Engine):
    """`quantized::linear_dynamic`: rounding, product and scaling in one call, by one of torch's quantization engines.

    Its weights are made of quantized tensors, which torch has deprecated and not replaced: everything else that torch has is
    slower on a CPU.
    """

    def __init__(self, name: str) -> None:
        """Take an engine's name in `torch.backends.quantized.supported_engines`."""
        self.name = name

    def offered(self) -> bool:
        """See the base class."""
        return self.name in torch.backends.quantized.supported_engines

    def pack(self, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Any:
        """Return packed parameters; see the base class. Packing alone depends on the engine that is set."""
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        with _engine_set_to(self.name), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.quantize_per_tensor")
            tensor = torch._make_per_channel_quantized_tensor(codes, scales.double(), zeros, 0)
            return torch.ops.quantized.linear_prepack(tensor, bias)

    def multiply(self, x: Tensor, packed: Any) -> Tensor:
        """See the base class."""
        product: Tensor = torch.ops.quantized.linear_dynamic(x, packed, False)
        return product


class PointwiseEngine(Engine):
    """`onednn::qlinear_pointwise`, which takes activations that are already quantized."""

    name = "onednn_pointwise"

    def offered(self) -> bool:
        """See the base class."""
        return torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")

    def pack(self, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Any:
        """See the base class."""
        packed = torch.ops.onednn.qlinear_prepack(codes, None)
        return packed, scales, torch.zeros(len(scales), dtype=torch.int32), bias

    def multiply(self, x: Tensor, packed: Any) -> Tensor:
        """See the base class."""
        weight, scales, zeros, bias = packed
        low, high = (float(bound) for bound in torch.aminmax(x))
        low, high = min(low, 0.0), max(high, 0.0)
        step = max((high - low) / 255, torch.finfo(x.dtype).tiny)
        zero = min(255, max(0, round(-low / step)))
        codes = (x / step).round_().add_(zero).clamp_(0, 255).to(torch.uint8)
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes, step, zero, weight, scales, zeros, bias, 1.0, 0, torch.float32, "none", [], ""
        )
        return product


class PlainEngine(Engine):
    """`torch._int_mm`, with per-token scales applied separately."""

    name = "int_mm"

    def offered(self) -> bool:
        """See the base class."""
        return hasattr(torch, "_int_mm")

    def pack(self, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Any:
        """See the base class."""
        return codes.t(), scales, bias

    def multiply(self, x: Tensor, packed: Any) -> Tensor:
        """See the base class."""
        codes, scales, bias = packed
        steps = (x.abs().amax(dim=1, keepdim=True) / LARGEST).clamp_min(torch.finfo(x.dtype).tiny)
        whole: Tensor = torch._int_mm((x / steps).round().to(torch.int8), codes)
        product = whole.to(x.dtype).mul_(steps).mul_(scales)
        return product if bias is None else product.add_(bias)


# The fastest first, as measured with and without VNNI. The last two are for comparison: sometimes slower than float32.
ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        FusedEngine("x86"),
        FusedEngine("fbgemm"),
        FusedEngine("onednn"),
        FusedEngine("qnnpack"),
        PointwiseEngine(),
        PlainEngine(),
    )
}
FAST = {"x86": ("x86", "fbgemm", "onednn"), "arm": ("qnnpack", "onednn")}


_setting = threading.Lock()


@contextmanager
def _engine_set_to(name: str) -> Iterator[None]:
    """Have torch pack weights for an engine; packed weights run on the engine that they were packed for."""
    with _setting:
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = name
        try:
            yield
        finally:
            torch.backends.quantized.engine = before


@lru_cache
def saturates(name: str) -> bool | None:
    """Whether an engine saturates sums of two products at 16 bits, as AVX2 and AVX-512 without VNNI do; None if it fails.

    It is found by trying: what an engine uses depends on the CPU, the library, and environment variables.
    """
    engine, columns = ENGINES[name], 64
    if not engine.offered():
        return None
    codes = torch.full((8, columns), LARGEST, dtype=torch.int8)
    small = torch.arange(8 * columns).remainder(63).view(8, columns).sub(31).to(torch.int8)
    try:
        with torch.no_grad():
            x = torch.ones(4, columns)
            # Codes whose pairwise sums stay within 16 bits must give the right product in any case.
            exact = x @ small.float().T
            found = engine.multiply(x, engine.pack(small, torch.ones(8), None))
            if not torch.allclose(found, exact, rtol=1e-2, atol=1.0):
                return None
            whole = engine.multiply(x, engine.pack(codes, torch.ones(8), None))
    except (RuntimeError, NotImplementedError, AttributeError):
        return None
    return not torch.allclose(whole, torch.full_like(whole, float(columns * LARGEST)), rtol=1e-2)


def fast_engine() -> Engine | None:
    """Return the fastest engine that gives right products on this CPU, or None where there is none."""
    machine = platform.machine().lower()
    family = "arm" if machine.startswith(("arm", "aarch")) else "x86"
    return next((ENGINES[name] for name in FAST[family] if saturates(name) is not None), None)


def has_vnni() -> bool:
    """Whether this CPU multiplies bytes without saturating, by the features that it reports (x86 with VNNI, or ARM)."""
    engine = fast_engine()
    return engine is not None and saturates(engine.name) is False


def rounded(rows: Tensor, pairs: bool) -> tuple[Tensor, Tensor]:
    """Return int8 codes [rows, columns] and float32 scales [rows] of rows of a weight.

    Args:
        rows: [rows, columns], of any float dtype.
        pairs: keep sums of neighbours so small that, times 255, they fit into 16 bits: then no engine saturates. It
            costs a third of the resolution, where codes of 7 bits would cost half.
    """
    rows = rows.float()
    peaks = rows.abs().amax(dim=1)
    if pairs:
        even = torch.nn.functional.pad(rows, (0, rows.shape[1] % 2))
        peaks = torch.maximum(peaks, (even[:, ::2] + even[:, 1::2]).abs().amax(dim=1))
    scales = (peaks / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    return (rows / scales[:, None]).round_().to(torch.int8), scales
