"""Model cards: what was done, what it costs and how to load it, from the report and the evaluations of a folder only."""

from .inputs import CardInputs, read_inputs
from .metadata import inherited_metadata
from .writing import CARD_FILE, free_section, parse_card, render_card, renew_card, write_card

__all__ = [
    "CARD_FILE",
    "CardInputs",
    "free_section",
    "inherited_metadata",
    "parse_card",
    "read_inputs",
    "render_card",
    "renew_card",
    "write_card",
]
