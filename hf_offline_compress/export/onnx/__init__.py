"""One file for ONNX Runtime that holds the codes of a compressed model, and the operators that decode them."""
