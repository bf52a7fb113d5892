"""An ONNX file in place of a torch model: the calls that evaluations make, answered by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from ..errors import CompressionError, needs_extra


def check_onnx(given: str | Path | None, fine_tune: bool, dtype: str) -> None:
    """Raise CompressionError unless a file, if there is one, can be evaluated in the place of a folder's weights."""
    if given is None:
        return
    file = Path(given)
    if find_spec("onnxruntime") is None:
        raise CompressionError(needs_extra("An ONNX file", "onnxruntime", "onnx"))
    if not file.is_file():
        raise CompressionError(
            f"There is no file '{file}'; pass an ONNX file, such as export --format onnx writes into onnx/."
        )
    if fine_tune:
        raise CompressionError("An ONNX file cannot be fine-tuned; leave --fine-tune out, or --onnx.")
    if dtype != "float32":
        raise CompressionError(f"An ONNX file computes as it was exported, not in {dtype}; leave --dtype out.")


class OpenVinoSession:
    """A file run by OpenVINO, asked as a session of ONNX Runtime is."""

    def __init__(self, file: Path, threads: int) -> None:
        """Compile it for the CPU."""
        import openvino

        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self.compiled = openvino.Core().compile_model(str(file), "CPU", settings)

    def get_inputs(self) -> list[SimpleNamespace]:
        """Return names and shapes; sizes that may be any are None."""
        return [SimpleNamespace(name=port.any_name, shape=_sizes(port.partial_shape)) for port in self.compiled.inputs]

    def get_outputs(self) -> list[SimpleNamespace]:
        """Return names."""
        return [SimpleNamespace(name=port.any_name) for port in self.compiled.outputs]

    def run(self, names: list[str], feeds: dict[str, Any]) -> list[Any]:
        """Return outputs by their names."""
        found = self.compiled(feeds)
        return [found[name] for name in names]


def _sizes(shape: Any) -> list[int | None]:
    return [None if size.is_dynamic else size.get_length() for size in shape]


def session_of(file: Path, runtime: str = "onnxruntime") -> Any:
    """Return what runs a file on torch's number of threads, by "onnxruntime" or "openvino".

    Raises:
        CompressionError: it does not take the file.
    """
    try:
        if runtime == "openvino":
            return OpenVinoSession(file, torch.get_num_threads())
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        title = "OpenVINO" if runtime == "openvino" else "ONNX Runtime"
        raise CompressionError(f"{title} does not load '{file.name}': {str(error)[:200]}") from error


class OnnxModel(torch.nn.Module):
    """An exported file that is called as the stock model is, on the CPU and without gradients."""

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, file: Path, config: Any, runtime: str = "onnxruntime") -> None:
        """Make a session.

        Args:
            file: of one model.
            config: of the model.
            runtime: what runs it, "onnxruntime" or "openvino".

        Raises:
            CompressionError: it does not take the file, or that is none of ours.
        """
        super().__init__()
        self.config, self.file, self.session = config, file, session_of(file, runtime)
        self.inputs = {value.name: value.shape for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        if "input_ids" not in self.inputs:
            raise CompressionError(f"'{file.name}' takes no input_ids, so it is not a text model.")

    @property
    def has_hidden_states(self) -> bool:
        """Whether it gives hidden states, as a file of a model without a head does."""
        return self.outputs[0] == "last_hidden_state"

    @property
    def base_model(self) -> OnnxModel:
        """Itself, as the model whose first output is the last hidden state [batch, tokens, width].

        Raises:
            CompressionError: it gives none.
        """
        if not self.has_hidden_states:
            raise CompressionError(
                f"'{self.file.name}' gives {self.outputs[0]} and no hidden states, which embeddings are made of."
            )
        return self

    def get_output_embeddings(self) -> str | None:
        """Return something if it gives logits, else None."""
        return next((name for name in self.outputs if name.endswith("logits")), None)

    def to(self, *_: Any, **__: Any) -> OnnxModel:
        """Return itself: it stays on its device."""
        return self

    def forward(self, input_ids: Tensor, **given: Tensor) -> ModelOutput:
        """Return the outputs of ids [batch, tokens], by their names; a cache is empty."""
        batch, tokens = input_ids.shape
        feeds: dict[str, Tensor] = {"input_ids": input_ids, **given}
        feeds.setdefault("attention_mask", torch.ones_like(input_ids))
        feeds.setdefault("token_type_ids", torch.zeros_like(input_ids))
        feeds.setdefault("position_ids", torch.arange(tokens).expand(batch, tokens))
        for name, shape in self.inputs.items():
            if name.startswith("past_key_values."):
                feeds[name] = torch.zeros(batch, int(shape[1]), 0, int(shape[3]))
        asked = [name for name in self.outputs if not name.startswith("present.")]
        found = self.session.run(asked, {name: feeds[name].numpy() for name in self.inputs})
        values: Mapping[str, Any] = {name: torch.from_numpy(value) for name, value in zip(asked, found, strict=True)}
        return ModelOutput(values)
