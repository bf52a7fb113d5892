"""The base checkpoint: found, checked, loaded, with the files that travel along."""
