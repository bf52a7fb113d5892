"""All that a loaded model needs. Its flat files are copied into every saved folder, next to the weights."""
