"""What becomes of every matrix, and in how many bytes, before any weight is read."""
