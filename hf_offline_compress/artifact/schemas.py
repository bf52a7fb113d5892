"""What must be in the JSON files that commands share.

Only what some command reads is listed, so that files of earlier and later versions pass.
"""

from __future__ import annotations

from typing import Any

from ..foundation.schemas import ANYTHING, COUNT, NUMBER, TEXT

GROUP: dict[Any, Any] = {
    "name": str,
    "structure": str,
    "size": NUMBER,
    "members": [str],
    "rows": int,
    "columns": int,
    "parameters": int,
    "stored_bytes": int,
    "ratio": NUMBER,
    "storage": str,
    "relative_error": NUMBER,
    "calibrated_error": (*NUMBER, None),
}
COVERAGE = {"source": str, "tokens": int, "kept": NUMBER, "growth": NUMBER, "unknown": NUMBER}
VOCABULARY: dict[Any, Any] = {
    "text": {"source": str, "sha256": str},
    "size?": COUNT,
    "coverage?": (*NUMBER, None),
    "writing_systems": [str],
    "tokens_before": int,
    "tokens": int,
    "tokenizer_bytes": int,
    "rows_before": int,
    "rows": int,
    "removed_parameters": int,
    "coverage_of": {str: COVERAGE},
}
REPORT: dict[Any, Any] = {
    "base": {"name": str, "revision?": TEXT, "weight_bytes?": COUNT, "metadata?": ({}, None)},
    "architecture": str,
    "recipe": {"name": str, "description?": TEXT, "references?": ([str], None), "rules": [{}]},
    "seed": int,
    "dtype": str,
    "calibration": (
        {"source": str, "tokens": int, "texts": int, "seed": int, "sha256": str},
        None,
    ),
    "validation?": ({"source": str, "sha256": str}, None),
    "search?": ({"max_loss": NUMBER}, None),
    "options?": ({}, None),
    "rounds?": ([{"measured?": (*NUMBER, None), "in_order?": (*NUMBER, None), "last_norm?": (*NUMBER, None)}], None),
    "groups": [GROUP],
    "dense": [{"name": str, "parameters": int, "reason": str}],
    "totals": {
        "parameters": int,
        "dense_bytes": NUMBER,
        "stored_bytes": NUMBER,
        "total_ratio": NUMBER,
        "compressed_parameters": int,
        "compressed_stored_bytes": NUMBER,
        "ratio": NUMBER,
        "folder_bytes?": NUMBER,
    },
    "seconds?": ({str: NUMBER}, None),
    "versions": {str: str},
    "vocabulary?": (VOCABULARY, None),
}
CONFIG: dict[Any, Any] = {
    "model_type": str,
    "architectures": [str],
    "auto_map?": ({str: ANYTHING}, None),
    "compression": {
        "format_version": int,
        "decoding": str,
        "groups": {str: {"structure": str, "members": [{"module": str}]}},
    },
}
METRIC = {"name": str, "better": str, "base": (*NUMBER, None), "compressed": (*NUMBER, None)}
LATENCY = {"batch": int, "length": int, "median_ms": NUMBER, "low_ms?": (*NUMBER, None), "high_ms?": (*NUMBER, None)}
EVALUATION: dict[Any, Any] = {
    "format_version": int,
    "evaluations": [
        {
            "id": str,
            "task": {"type": str, "name?": TEXT},
            "data": {
                "name": str,
                "examples?": COUNT,
                "config?": TEXT,
                "split?": TEXT,
                "revision?": TEXT,
                "sha256?": TEXT,
            },
            "settings?": ({}, None),
            "metrics": [METRIC],
        }
    ],
    "benchmark?": (
        {
            "device?": TEXT,
            "threads?": COUNT,
            "memory_kind?": TEXT,
            "models": [
                {
                    "name": str,
                    "disk_bytes?": (*NUMBER, None),
                    "load_seconds?": (*NUMBER, None),
                    "memory_bytes?": (*NUMBER, None),
                    "loaded_bytes?": (*NUMBER, None),
                    "agreement?": (*NUMBER, None),
                    "latency?": ([LATENCY], None),
                }
            ],
            "versions?": ({str: str}, None),
            "unavailable?": ([{"name": str, "reason": str}], None),
        },
        None,
    ),
}
DIGEST = {"shape": [int], "root_mean_square": (*NUMBER, None), "values": [(*NUMBER, None)]}
RECORD: dict[Any, Any] = {
    "format_version": int,
    "class": str,
    "dtype": str,
    "compressed_modules": int,
    "weights": {str: {"bytes": int, "sha256": str}},
    "inputs": {str: ([[int]], [[[int]]])},
    "outputs": {str: DIGEST},
}
