"""A process that holds one model, so that the memory of one is not mixed with another's.

It reads a JSON object a line and answers each by one. The first says what to hold, see `Held`; then come
``{"do": "load"}``, ``{"do": "forward", "batch": 1, "length": 128}``, ``{"do": "memory"}`` and
``{"do": "agree", "ids": [[5, 6]], "file": "base.npy", "write": false}``, until the input ends.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch

from ..errors import CompressionError
from ..foundation.memory import peak_memory, resident_memory


@dataclass
class Held:
    """What a process holds.

    Attributes:
        kind: one of `MODELS`.
        folder: of the checkpoint; of an ONNX file, what has its config.
        architecture: stock class.
        file: what is run in place of the folder's weights, if it is an ONNX file.
        device: where it computes.
        threads: of the CPU; None for torch's own choice.
        seed: of the tokens.
    """

    kind: str
    folder: str
    architecture: str
    device: str
    threads: int | None
    seed: int
    file: str | None = None
    model: Any = None
    batches: dict[tuple[int, int], Any] = field(default_factory=dict)
    before: int = 0

    def prepare(self) -> dict[str, Any]:
        """Import all that loading will need, and take note of the memory in use."""
        import transformers

        if self.threads:
            torch.set_num_threads(self.threads)
        self._class(transformers)
        if self.file is not None:
            importlib.import_module(runtime_of(self.kind))
        torch.ones(8, 8, device=self.device) @ torch.ones(8, 8, device=self.device)
        gc.collect()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            _forget_peak()
            self.before = resident_memory()
        return {"threads": torch.get_num_threads()}

    @property
    def on_gpu(self) -> bool:
        """Whether it computes on a GPU."""
        return torch.device(self.device).type == "cuda"

    def load(self) -> dict[str, Any]:
        """Load the model, in place of one that was loaded before; return seconds, and bytes of its tensors."""
        import transformers

        from .alternatives import int8, tensor_bytes
        from .benchmarking import OURS
        from .onnx_model import OnnxModel
        from .pair import load

        self.model = None
        gc.collect()
        if self.file is not None:
            config = transformers.AutoConfig.from_pretrained(self.folder)
            started = time.perf_counter()
            self.model = OnnxModel(Path(self.file), config, runtime_of(self.kind)).eval()
            seconds = time.perf_counter() - started
            return {"seconds": seconds, "tensor_bytes": Path(self.file).stat().st_size, "decodes": True}
        model_class = self._class(transformers)
        started = time.perf_counter()
        model = load(model_class, Path(self.folder), "bfloat16" if self.kind == "bfloat16" else "float32")
        if self.kind == "int8":
            model = int8(model)
        self.model = model.to(self.device)
        self._wait()
        seconds = time.perf_counter() - started
        _touch(self.model)
        decodes = False
        if self.kind in OURS:
            from ..runtime.weights_compressed import DecodedWeight

            decodes = any(isinstance(module, DecodedWeight) for module in model.modules())
            try:
                model.set_decoding(OURS[self.kind])
            except ValueError as error:
                raise CompressionError(str(error)) from error
        return {"seconds": seconds, "tensor_bytes": tensor_bytes(self.model), "decodes": decodes}

    @torch.inference_mode()
    def forward(self, batch: int, length: int) -> dict[str, Any]:
        """Run one forward pass over random tokens, and return its milliseconds."""
        inputs = self.batches.setdefault((batch, length), self._inputs(batch, length))
        self._wait()
        started = time.perf_counter()
        self.model(**inputs)
        self._wait()
        return {"ms": (time.perf_counter() - started) * 1000}

    @torch.inference_mode()
    def agree(self, ids: list[list[int]], file: str, write: bool) -> dict[str, Any]:
        """Return the mean cosine of the first output's vectors to those in a file, or write them there.

        Args:
            ids: of tokens [batch, length].
            file: an .npy file.
            write: whether this is the model that others are compared with.
        """
        inputs = torch.tensor(ids, device=self.device)
        found = self.model(**self._given(inputs))[0].float().cpu().flatten(0, -2)
        if write:
            numpy.save(file, found.numpy())
        expected = torch.from_numpy(numpy.load(file))
        return {"agreement": float(torch.cosine_similarity(found, expected, dim=-1).mean())}

    def memory(self) -> dict[str, Any]:
        """Return bytes above those before loading: at the peak, and now."""
        gc.collect()
        if self.on_gpu:
            peak, now = torch.cuda.max_memory_allocated(self.device), torch.cuda.memory_allocated(self.device)
        else:
            now = resident_memory()
            peak = peak_memory()  # read last: asking takes memory itself
        return {"peak": max(0, peak - self.before), "now": max(0, now - self.before)}

    def _class(self, transformers: Any) -> Any:
        from .benchmarking import OURS

        stock = getattr(transformers, self.architecture)
        if self.kind not in OURS:
            return stock
        from ..runtime.modeling_compressed import compressed_class

        return compressed_class(stock)

    def _inputs(self, batch: int, length: int) -> dict[str, Any]:
        vocabulary = self.model.config.vocab_size
        generator = torch.Generator().manual_seed(self.seed)
        # Special tokens, the first of a vocabulary in most cases, are no part of ordinary text.
        ids = torch.randint(vocabulary // 2, vocabulary, (batch, length), generator=generator)
        return self._given(ids.to(self.device))

    def _given(self, ids: Any) -> dict[str, Any]:
        if self.architecture.endswith(("ForMultipleChoice", "DoubleHeadsModel")):
            ids = ids[:, None]  # [batch, choices, length]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


def runtime_of(kind: str) -> str:
    """Return the package that runs a file of a kind."""
    return "openvino" if kind.startswith("openvino") else "onnxruntime"


def _touch(model: Any) -> None:
    """Read every weight once: of a file that is mapped into memory, only what has been read counts as resident."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().sum()  # which makes no copy


def _forget_peak() -> None:
    """Let the kernel count the peak of resident memory anew, where it can."""
    with suppress(OSError):  # without it, the peak of the imports counts too
        Path("/proc/self/clear_refs").write_text("5")


def failure(error: Exception) -> str:
    """Return an error as a sentence."""
    kind = "" if isinstance(error, CompressionError) else f"{type(error).__name__}: "
    return f"{kind}{' '.join(str(error).split())[:600]}"


def main() -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    held = Held(**json.loads(sys.stdin.readline()))

    def answer(work: Callable[..., dict[str, Any]], **options: Any) -> None:
        try:
            content = work(**options)
        except Exception as error:
            content = {"error": failure(error)}
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    works: dict[str, Callable[..., dict[str, Any]]] = {
        "load": held.load,
        "forward": held.forward,
        "memory": held.memory,
        "agree": held.agree,
    }
    answer(held.prepare)
    for line in sys.stdin:
        request = json.loads(line)
        answer(works[request.pop("do")], **request)


if __name__ == "__main__":
    main()
