"""What each matrix becomes, and its exact bytes, before any weight is read."""
