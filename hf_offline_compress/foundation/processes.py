"""Work shared by several processes, as `accelerate launch` starts them; without it, one process does all.

Which batch there is does not depend on the number of processes, and results come back in the order of the batches: what
is computed from them is the same, however many processes there are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import CompressionError, needs_extra
from .preflight import found_device
from .progress import bar

if TYPE_CHECKING:
    from torch import Tensor

# Where launchers say how many processes there are: torchrun and accelerate, and the kinds of MPI.
COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """The processes that share a piece of work.

    Attributes:
        index: of this one.
        count: how many there are.
        device: where this one computes; None for the device of the model.
    """

    index: int = 0
    count: int = 1
    device: str | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.index == 0

    def map(
        self,
        work: Callable[[Item], Result],
        items: Sequence[Item],
        unit: str = "batch",
        *,
        works: Sequence[float] | None = None,
        desc: str = "",
        progress: bool = False,
    ) -> list[Result]:
        """Return the results of all items in their order; every process works on its share and gets all results.

        Args:
            work: item → what shall be known of it; tensors on the CPU.
            items: the same in every process, batches in most cases.
            unit: what an item is.
            works: about how long each takes, in any unit; by default all take as long.
            desc: what a progress bar says.
            progress: show one, in the main process.
        """
        doers = shared_out([1.0] * len(items) if works is None else works, [0.0] * self.count)
        mine = [i for i, doer in enumerate(doers) if doer == self.index]
        shown = bar(mine, desc, unit, progress and self.is_main)
        results = [(i, work(items[i])) for i in shown]
        results = [pair for each in self.gather(results) for pair in each]
        return [result for _, result in sorted(results, key=lambda pair: pair[0])]

    def gather(self, value: Result) -> list[Result]:
        """Return the values of all processes, in their order; each comes with its own."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        with _together():
            return list(gather_object([value]))

    def broadcast_(self, tensor: Tensor, source: int) -> None:
        """Fill a tensor with that of one process; all have one of its shape, dtype and kind of device."""
        import torch

        with _together():
            torch.distributed.broadcast(tensor, source)

    def exchange(self, sent: Iterable[tuple[int, Tensor]], received: Iterable[tuple[int, Tensor]]) -> None:
        """Send tensors to other processes, and fill tensors with what others send; all take part.

        Args:
            sent: other process, what it gets.
            received: other process, and what is filled; from each process as much, and of the same shapes and dtypes, as it
                sends to this one, in the same order.
        """
        import torch.distributed as dist

        operations = [
            dist.P2POp(operation, tensor, other)
            for operation, pairs in ((dist.isend, sent), (dist.irecv, received))
            for other, tensor in pairs
            if tensor.numel()
        ]
        if not operations:
            return
        with _together():
            for pending in dist.batch_isend_irecv(operations):
                pending.wait()

    def wait(self) -> None:
        """Return when all processes have reached this call."""
        if self.count > 1:
            from accelerate import PartialState

            with _together():
                PartialState().wait_for_everyone()


ALONE = Processes()


def shared_out(works: Sequence[float], loads: list[float]) -> list[int]:
    """Return for each piece of work the process that does it: the largest piece first, to the process with the least work.

    Args:
        works: how much each piece is.
        loads: how much each process has already; what it gets is added.
    """
    chosen = [0] * len(works)
    for i in sorted(range(len(works)), key=lambda i: -works[i]):
        chosen[i] = min(range(len(loads)), key=loads.__getitem__)
        loads[chosen[i]] += works[i]
    return chosen


@contextmanager
def _together() -> Iterator[None]:
    """Report in one sentence that another process has ended; torch prints pages."""
    try:
        yield
    except RuntimeError as error:
        raise CompressionError(
            "Another of the processes that share this work has ended, so it cannot go on; nothing was written. What that "
            "process has said comes before this; it may also have run out of memory."
        ) from error


def is_main_process() -> bool:
    """Whether this is the first of the processes that accelerate or torchrun has launched, as far as the environment says."""
    return os.environ.get("RANK", "0") == "0"


def launched_processes(device: str | None = None) -> Processes:
    """Return the processes that `accelerate launch` (or torchrun) has started; this one alone if it has started none.

    Args:
        device: where to compute; by default accelerate's choice where it has launched several processes, else the CPU.

    Raises:
        CompressionError: there are several processes and no accelerate, or there is no such device.
    """
    import torch

    wanted = found_device(device)
    if all(int(os.environ.get(name, "1")) <= 1 for name in COUNTS):
        return Processes(device=str(wanted))
    if find_spec("accelerate") is None:
        raise CompressionError(needs_extra("Sharing work among several processes", "accelerate", "accelerate"))
    from accelerate import PartialState

    # Without being told so, accelerate does not connect processes that have no GPU.
    state: Any = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    return Processes(state.process_index, state.num_processes, str(state.device))
