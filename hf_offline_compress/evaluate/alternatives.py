"""Simple alternatives to compressing a base: bfloat16, and int8 by torch's dynamic quantization."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from ..errors import CompressionError


def int8(model: Any) -> Any:
    """Turn a model's linear layers into int8, in place, and return it: weights once, activations at every use.

    Embeddings and norms stay as they are, and so does a tied embedding beside its head's int8 copy.

    Args:
        model: stock, in float32, on the CPU.

    Raises:
        CompressionError: this torch cannot do it.
    """
    try:
        from torch.ao.quantization import quantize_dynamic
    except ImportError as error:
        raise CompressionError(f"torch {torch.__version__} has no dynamic quantization.") from error
    if "none" in torch.backends.quantized.supported_engines and len(torch.backends.quantized.supported_engines) == 1:
        raise CompressionError("torch has no kernels for int8 on this machine.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated in favour of another package
        return quantize_dynamic(with_linear_layers(model), {nn.Linear}, dtype=torch.qint8, inplace=True)


def with_linear_layers(model: Any) -> Any:
    """Replace GPT-2's Conv1D, which torch's quantization passes over, by linear layers of the same weights, in place."""
    from transformers.pytorch_utils import Conv1D

    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, Conv1D):
                columns, rows = module.weight.shape
                linear = nn.Linear(columns, rows, device=module.weight.device, dtype=module.weight.dtype)
                linear.weight = nn.Parameter(module.weight.data.T.contiguous(), requires_grad=False)
                linear.bias = nn.Parameter(module.bias.data, requires_grad=False)
                setattr(parent, name, linear)
    return model


def tensor_bytes(model: Any) -> int:
    """Return the bytes of all tensors that a checkpoint of the model would hold, shared ones once, without file headers."""
    sizes = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values() if torch.is_tensor(tensor)}
    for module in model.modules():
        if isinstance(module, torch.ao.nn.quantized.dynamic.Linear):
            weight, bias = module._packed_params._weight_bias()
            sizes[id(module)] = weight.numel() * weight.element_size() + (0 if bias is None else bias.nbytes)
    return sum(sizes.values())
