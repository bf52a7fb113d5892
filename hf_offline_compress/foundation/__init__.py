"""What every room may use, and what knows nothing of models: files, progress, arguments, parsing, processes."""
