"""What the snippets of a card load."""

from __future__ import annotations

import re

_CODE = re.compile(r"^```(?:python|js)\n.*?^```", re.MULTILINE | re.DOTALL)
# The name in what our snippets load; the second form is that of `get_class_from_dynamic_module`.
_LOADED = re.compile(
    r'((?:from_pretrained|SentenceTransformer)\(|get_class_from_dynamic_module\("[^"\n]*", |model_id = )"(?:[^"\\\n]|\\.)*"'
)


def with_model_id(card: str, model_id: str) -> str:
    """Return a card whose snippets load a model by this id; a card that is not ours, and the user's notes, stay.

    Args:
        card: text of a README.md.
        model_id: of the repository that it is published in.
    """
    from .writing import BEGIN, END, free_section

    if free_section(card) is None:
        return card
    before, rest = card.split(BEGIN, 1)
    notes, after = rest.split(END, 1)

    def renamed(text: str) -> str:
        return _CODE.sub(lambda block: _LOADED.sub(lambda call: f'{call[1]}"{model_id}"', block[0]), text)

    return f"{renamed(before)}{BEGIN}{notes}{END}{renamed(after)}"
