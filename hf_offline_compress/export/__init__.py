"""What other tools load, made from a compressed folder."""
