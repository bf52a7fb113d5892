"""A saved folder is loaded again in this process, and must give the outputs of the model in memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CompressionError, listing
from .probe import difference, probe_outputs
from .record import TOLERANCES, read_record

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_saved(folder: Path, model: PreTrainedModel) -> None:
    """Raise CompressionError unless a folder, loaded again, gives the outputs in its record and nothing else.

    Its weights are decoded on use, so that this takes little more memory than the folder has bytes.

    Args:
        folder: just written, with its record.
        model: that was saved.
    """
    from ..base.checkpoint import quiet_transformers

    record = read_record(folder)
    assert record is not None
    if broken := [name for name, digest in record["outputs"].items() if None in _numbers(digest)]:
        raise CompressionError(
            f"The compressed model gives NaN or infinite values in its {listing(broken)}, so nothing was saved. Pass "
            "dtype='float32' (--dtype float32) or ask for a smaller ratio; the base may give them too."
        )
    reader: Any = type(model)
    with quiet_transformers():
        loaded, info = reader.from_pretrained(folder, output_loading_info=True)
    problems = [
        f"{kind.replace('_', ' ')} {listing(sorted(info[kind])[:3])}"
        for kind in ("missing_keys", "unexpected_keys")
        if info[kind]
    ]
    loaded.set_decoding("on_the_fly")
    error = difference(record["outputs"], probe_outputs(loaded, record["inputs"]))
    if error > TOLERANCES.get(record["dtype"], 1e-3):
        far = "of other names or shapes, or not finite" if math.isinf(error) else f"off by {error:.1e} of their size"
        problems.append(f"outputs {far}")
    if problems:
        raise CompressionError(
            f"The saved model's outputs differ from those of the model in memory ({'; '.join(problems)}), so it was "
            "discarded. Pass dtype='float32' (--dtype float32) or another storage."
        )


def _numbers(digest: dict[str, Any]) -> list[float | None]:
    return [digest["root_mean_square"], *digest["values"]]
