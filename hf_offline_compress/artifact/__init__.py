"""The compressed model and its folder: built, reported, recorded, written whole, read back without torch."""
