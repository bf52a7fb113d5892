"""Parameters and matrices of a model, from the table of architectures and the stock model built without weights."""
