"""How a weight that has to be decoded is held between uses, and applied: one class a way, chosen in one place."""

import itertools
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import logging

from .engines_compressed import Engine, fast_engine, has_vnni, rounded, saturates
from .numbers_compressed import takes_gradient, with_gradient, with_gradients_of

logger = logging.get_logger(__name__)
# Tokens that a layer is tried with before it is decided how its activations are scaled, at most and at least.
TRIED, FEWEST = 128, 8
# Numbers of outputs that are made for it at most.
NUMBERS_TRIED = 2**21
# Inputs that stand out from the others by so much are multiplied as they are, at most so many of them.
OUTLYING, MOST_OUTLYING = 4.0, 8
# One scale for all tokens may leave this error, of the size of a layer's output.
ERROR_BY_ALL = 0.015


class Source(Protocol):
    """A weight [rows, columns] that can be decoded, and its bias [rows]."""

    rows: int
    columns: int
    bias: Any

    def dense_weight(self) -> Tensor:
        """Return all of it."""

    def row_blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Return blocks of rows, and where each begins."""

    def sources(self) -> list[Tensor]:
        """Return the tensors that the weight is made from."""

    def forget(self) -> None:
        """Drop what is kept of it."""


class Execution:
    """A way to hold and apply a weight. This one holds nothing: the weight is decoded at every use."""

    def keeps_for(self, x: Tensor | None) -> bool:
        """Whether something is held for products with inputs, or without any for looking up rows."""
        return False

    def compiles(self, x: Tensor | None) -> bool:
        """Whether a compiled graph may use what is held."""
        return True

    def sources(self, own: list[Tensor], source: Source) -> list[Tensor]:
        """Return all tensors that what is held is made from; `own` are those of the weight."""
        return own

    def bytes(self, rows: int, columns: int, dtype: torch.dtype) -> int:
        """Return the bytes that are held of a weight."""
        return 0

    def prepare(self, source: Source, x: Tensor | None) -> Any:
        """Return what is held of a weight, made when `x` [..., columns] is the first to be multiplied by it."""
        raise NotImplementedError

    def apply(self, held: Any, x: Tensor, source: Source) -> Tensor:
        """Return x Wᵀ + bias, [..., columns] → [..., rows]."""
        raise NotImplementedError

    def look_up(self, held: Any, ids: Tensor, source: Source) -> Tensor:
        """Return rows of W, [...] → [..., columns]."""
        raise NotImplementedError


class Decoded(Execution):
    """The weight in the model's dtype."""

    def keeps_for(self, x: Tensor | None) -> bool:
        """See the base class."""
        return True

    def bytes(self, rows: int, columns: int, dtype: torch.dtype) -> int:
        """See the base class."""
        return rows * columns * dtype.itemsize

    def prepare(self, source: Source, x: Tensor | None) -> Tensor:
        """See the base class."""
        return source.dense_weight()

    def apply(self, held: Tensor, x: Tensor, source: Source) -> Tensor:
        """See the base class."""
        if not torch.is_grad_enabled():
            return F.linear(x, held, source.bias)
        return F.linear(x, with_gradient(held, source.dense_weight, source.forget, source.sources), source.bias)

    def look_up(self, held: Tensor, ids: Tensor, source: Source) -> Tensor:
        """See the base class."""
        return F.embedding(ids, with_gradient(held, source.dense_weight, source.forget, source.sources))


class Bytes:
    """A matrix as bytes, as an engine reads it.

    Attributes:
        columns: inputs that are multiplied as they are [outlying], or None.
        added: what is added to products, for each of the factors [factors, rows]: with scales for each token the products
            of the low end of the range and the bias, then those of the outlying inputs.
        by_token: whether every token has a scale and a zero of its own.
    """

    def __init__(
        self, engine: Engine, packed: Any, rows: int, columns: Tensor | None, added: Tensor, by_token: bool
    ) -> None:
        """Hold it, so that compiled graphs find it."""
        self.engine, self.packed, self.rows, self.by_token = engine, packed, rows, by_token
        self.columns, self.added = columns, added
        self.key = next(_keys)
        _held[self.key] = self

    def multiply(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + bias, float32 [tokens, columns] → [tokens, rows]."""
        factors = []
        if self.columns is not None:
            factors, x = [x.index_select(1, self.columns)], x.index_fill(1, self.columns, 0)
        if not self.by_token:
            out = self.engine.multiply(x, self.packed)
            return out.addmm_(factors[0], self.added) if factors else out
        # One by one: `aminmax` takes ten times as long here.
        low, high = x.amin(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)
        spread = high.sub_(low).clamp_min_(torch.finfo(x.dtype).tiny)
        # Now every token lies between 0 and 1, so that one scale is each one's own, whatever the others are.
        x = x.sub_(low) if factors else x - low
        out = self.engine.multiply(x.div_(spread), self.packed)
        return out.mul_(spread).addmm_(torch.cat([low, torch.ones_like(low), *factors], dim=1), self.added)

    def apply(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + bias, [..., columns] → [..., rows], in the dtype of x or what autocast makes of it."""
        kind, dtype = x.device.type, x.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        if dtype == x.dtype == torch.float32 and self.columns is None and not self.by_token:
            return self.engine.multiply(x, self.packed)
        out = self.multiply(x.reshape(-1, x.shape[-1]).float()).view(*x.shape[:-1], self.rows)
        return out if dtype == torch.float32 else out.to(dtype)


class Int8(Execution):
    """The weight as int8 with a scale for each row, multiplied by the CPU's integer kernels.

    Activations are rounded to bytes as they come. With one scale for all tokens an engine does it by itself, in the call that
    multiplies. Where that costs too much of a layer's output, tried on the first tokens that it sees, inputs that are larger
    than the others by far, the same few for all tokens in most models, are left out and multiplied as they are; where that
    is not enough, every token has a scale of its own.
    """

    def keeps_for(self, x: Tensor | None) -> bool:
        """Rows that are looked up are decoded on use; see the base class."""
        return x is not None

    def compiles(self, x: Tensor | None) -> bool:
        """Gradients are taken outside of graphs alone; see the base class."""
        return x is not None and not takes_gradient([x])

    def sources(self, own: list[Tensor], source: Source) -> list[Tensor]:
        """The bias is held with the weight; see the base class."""
        return own if source.bias is None else [*own, source.bias]

    def bytes(self, rows: int, columns: int, dtype: torch.dtype) -> int:
        """See the base class."""
        return rows * columns + 8 * rows

    def prepare(self, source: Source, x: Tensor | None) -> Bytes:
        """See the base class; the weight is decoded in blocks of rows, and no more of it is there at a time."""
        engine = fast_engine()
        assert engine is not None and x is not None
        x = x.detach().reshape(-1, source.columns).float()
        x = x[:: max(1, len(x) // max(FEWEST, min(TRIED, NUMBERS_TRIED // source.rows)))]
        bias = None if source.bias is None else source.bias.detach().float()
        outlying = _outlying(x)
        tried = len(x) >= FEWEST
        # The cheapest first: all inputs in one call, then some of them apart, then a scale for each token.
        for columns in (None, outlying) if tried and outlying is not None else (outlying,):
            codes, scales, apart, expected = _in_bytes(source, x, columns, bool(saturates(engine.name)))
            if tried:
                held = Bytes(engine, engine.pack(codes, scales, bias), source.rows, columns, apart, by_token=False)
                if _lost(held.multiply(x), expected, bias) <= ERROR_BY_ALL:
                    return held
                del held
        sums = codes.sum(dim=1, dtype=torch.int32) * scales
        added = torch.cat([sums[None], (torch.zeros_like(sums) if bias is None else bias)[None], apart])
        return Bytes(engine, engine.pack(codes, scales, None), source.rows, outlying, added, by_token=True)

    def apply(self, held: Bytes, x: Tensor, source: Source) -> Tensor:
        """See the base class. The bias is in what is held."""
        if not x.numel():
            return x.new_empty(*x.shape[:-1], held.rows)
        if torch.compiler.is_compiling():
            product: Tensor = int8_product(x, held.key, held.rows)
            return product
        if not torch.is_grad_enabled():
            return held.apply(x)
        return with_gradients_of(
            lambda x: F.linear(x, source.dense_weight(), source.bias),
            x,
            held.apply,
            lambda: self.sources(source.sources(), source),
        )


_keys = itertools.count()
_held: weakref.WeakValueDictionary[int, Bytes] = weakref.WeakValueDictionary()


# Of this module alone. Remote code has the folder's name in its own, which may have characters that operators may not.
_NAMESPACE = "".join(c if c.isascii() and c.isalnum() else f"_{ord(c):x}_" for c in __name__)


@torch.library.custom_op(f"{_NAMESPACE}::int8_product", mutates_args=())
def int8_product(x: Tensor, key: int, rows: int) -> Tensor:
    """Return the product of x [..., columns] and what is held under a key, [..., rows]: what a compiled graph calls."""
    return _held[key].apply(x)


@int8_product.register_fake
def _(x: Tensor, key: int, rows: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


def _in_bytes(source: Source, x: Tensor, apart: Tensor | None, pairs: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a weight as int8 codes [rows, columns] with scales [rows], decoded in blocks of rows.

    With it, weights of the inputs that are left `apart` [outlying, rows], and the products of x [tokens, rows].
    """
    codes, scales = torch.empty(source.rows, source.columns, dtype=torch.int8), torch.empty(source.rows)
    weights = torch.empty(0 if apart is None else len(apart), source.rows)
    expected = torch.empty(len(x), source.rows)
    for start, block in source.row_blocks():
        here, block = slice(start, start + len(block)), block.detach().float()
        expected[:, here] = x @ block.T
        if apart is not None:
            weights[:, here] = block[:, apart].T
            block = block.index_fill(1, apart, 0)
        codes[here], scales[here] = rounded(block, pairs)
        del block
    return codes, scales, weights, expected


def _lost(found: Tensor, expected: Tensor, bias: Tensor | None) -> float:
    """Return what products [tokens, rows] lack of those expected, as a share of them."""
    lost = found - (expected if bias is None else expected + bias)
    # Each token by itself: a large one must not hide what the others lose.
    shares = lost.norm(dim=1) / expected.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    return float(shares.square().mean().sqrt())


def _outlying(x: Tensor) -> Tensor | None:
    """Return the columns of x [tokens, columns] that are larger than the others by far, or None."""
    if not len(x):
        return None
    peaks = x.abs().amax(dim=0)
    largest, columns = peaks.topk(min(MOST_OUTLYING, len(peaks) // 16))
    columns = columns[largest > OUTLYING * peaks.median()]
    return columns.sort().values if len(columns) else None


EXECUTIONS: dict[str, Execution] = {"cached": Decoded(), "on_the_fly": Execution(), "int8": Int8()}


def why_not_int8(device_type: str) -> str | None:
    """Return why weights on a device cannot be executed as int8, or None where they can."""
    if device_type not in ("cpu", "meta"):
        return f"decoding 'int8' runs on a CPU, and the model is on {device_type}; use 'cached', or move it to a CPU."
    if fast_engine() is None:
        return (
            "decoding 'int8' needs an integer kernel (fbgemm or oneDNN on x86, qnnpack on ARM), and none that this torch has "
            "works on this CPU; use 'cached' or 'on_the_fly'."
        )
    return None


def execution_of(decoding: str, device_type: str, asked: bool) -> Execution:
    """Return how weights on a device are executed: the one place that decides it.

    Args:
        decoding: one of `EXECUTIONS`, or "auto".
        device_type: of the weight.
        asked: whether somebody asked for just that. What a folder says is done as well as can be, with a warning.

    Raises:
        RuntimeError: it was asked for, and cannot be done.
    """
    name = chosen(decoding, device_type)
    if name == "int8" and (why := why_not_int8(device_type)):
        if asked:
            raise RuntimeError(why)
        logger.warning_once(f"Weights are decoded once, unlike the config: {why}")
        name = "cached"
    return EXECUTIONS[name]


def chosen(decoding: str, device_type: str) -> str:
    """Return the decoding that "auto" stands for on a device; any other is itself.

    Without VNNI or its like integers were measured to gain little on a CPU, and at small batches nothing.
    """
    if decoding != "auto":
        return decoding
    return "int8" if device_type == "cpu" and has_vnni() else "cached"
