"""What every layer may use, and what knows nothing of models: files, progress, arguments, parsing, processes."""
