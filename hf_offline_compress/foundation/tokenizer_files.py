"""The tokenizer's file without the white space that it is saved with: for a large vocabulary that is half of its bytes."""

from __future__ import annotations

import json
from pathlib import Path

TOKENIZER_FILE = "tokenizer.json"


def without_spaces(text: str) -> str:
    """Return JSON as compact text; objects keep their order, numbers their value.

    Raises:
        ValueError: it is no JSON.
    """
    return json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":"))


def compact_tokenizer(folder: Path) -> None:
    """Rewrite a folder's tokenizer.json without white space, if it is there and is the same tokenizer afterwards.

    Both texts are loaded and compared as the library writes them. Where they differ, or either does not load, the file
    is kept as it was.
    """
    from tokenizers import Tokenizer

    file = folder / TOKENIZER_FILE
    if not file.is_file():
        return
    try:
        text = file.read_text("utf-8")
        compact = without_spaces(text)
        same = Tokenizer.from_str(compact).to_str() == Tokenizer.from_str(text).to_str()
        content = compact.encode()
    except Exception:  # tokenizers raises plain ones; a file that is odd stays as it was
        return
    if same and len(content) < file.stat().st_size:
        file.write_bytes(content)
